"""Test the files of a gallery without a run: columns, pictures, and what remains after an interruption."""

from __future__ import annotations

import hashlib
import io
import random
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from batch_infer.errors import RowError, StoppedError
from batch_infer.galleries import Snapshot
from batch_infer.galleries.scripts import to_script
from batch_infer.galleries.thumbnails import make_pictures
from tests.gallery_files import MemoryImages, make_table, pictures, read_meta, read_rows, write

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--",
    "a\u2028b\u2029c",
    "\\u003c\"'\\",
    "\0\x1b[31m",
    "名前 🎨 \ufffe",
]


STRIPES = 10
"""Number of stripes of an image."""


def picture(width: int = 200, height: int = 100, image_format: str = "png", seed: int = 0) -> bytes:
    """Return an image file of coloured stripes."""
    colors = np.random.default_rng(seed).integers(0, 256, (1, STRIPES, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(colors).resize((width, height), Image.Resampling.NEAREST).save(stream, image_format)
    return stream.getvalue()


def columns_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {column["name"]: column for column in read_meta(folder)["columns"]}


def test_hostile_texts_are_only_data(tmp_path: Path) -> None:
    rows = [{"id": text, "prompt": text, "error": text, text: text} for text in HOSTILE]
    write(tmp_path, make_table(rows, **dict.fromkeys(HOSTILE, pa.string())))
    read = read_rows(tmp_path)
    assert [(row["id"], row["prompt"], row["error"]) for row in read] == [(text, text, text) for text in HOSTILE]
    assert [row[text] for row, text in zip(read, HOSTILE, strict=True)] == HOSTILE


def test_columns_may_have_the_names_of_the_page(tmp_path: Path) -> None:
    names = ("_thumb", "_problem", "_image", "__proto__", "mark", "safety_scores.a", "rating", "input_rating", "free")
    write(tmp_path, make_table([dict.fromkeys(names, "x")], **dict.fromkeys(names, pa.string())))
    (row,) = read_rows(tmp_path)
    assert [row[f"input_{name}"] for name in (*names[:6], "input_rating")] == ["x"] * 7
    assert (row["_thumb"], row["_problem"], row["_image"], row["free"]) == (None, None, None, "x")
    assert b'"__proto__"' not in (tmp_path / "data/rows-00000.js").read_bytes()


def test_text_that_is_not_utf_8_is_escaped() -> None:
    assert (
        to_script("meta", 0, {"model": "a\udcff<"})
        == b'BatchInferGallery.receive("meta", 0, {"model": "a\\udcff\\u003c"});\n'
    )


def test_columns_have_the_kinds_of_their_values(tmp_path: Path) -> None:
    time = datetime(2026, 1, 2, 3, 4, 5, 678_000, timezone.utc)
    carried = {
        "few": (pa.string(), "a"),
        "day": (pa.date32(), date(2026, 1, 2)),
        "money": (pa.decimal128(10, 2), Decimal("1.50")),
        "ratio": (pa.float64(), 0.1),
        "half": (pa.float32(), 0.1),
        "count": (pa.int64(), 3),
        "yes": (pa.bool_(), True),
        "at": (pa.timestamp("ns", "UTC"), time),
        "tags": (pa.list_(pa.string()), ["x", "y"]),
        "blob": (pa.binary(), b"12345"),
        "empty": (pa.null(), None),
    }
    cells = {name: value for name, (_, value) in carried.items()}
    rows = [{**cells, "safety_scores": [{"category": "red", "score": 0.1}]}, {}]
    write(tmp_path, make_table(rows, **{name: dtype for name, (dtype, _) in carried.items()}))
    columns, (row, empty) = columns_of(tmp_path), read_rows(tmp_path)
    kinds = {name: columns[name]["kind"] for name in (*carried, "id", "status", "seed", "safety_scores")}
    assert kinds == {
        **dict.fromkeys(("few", "day", "money", "empty", "status"), "category"),
        **dict.fromkeys(("ratio", "half"), "number"),
        **dict.fromkeys(("count", "seed"), "integer"),
        **{"yes": "boolean", "at": "time", "tags": "json", "blob": "json", "id": "text", "safety_scores": "scores"},
    }
    assert {name: row[name] for name in carried} == {
        **{"few": "a", "day": "2026-01-02", "money": "1.50", "ratio": 0.1, "half": 0.1, "count": 3, "yes": True},
        **{"at": time.timestamp(), "tags": '["x", "y"]', "blob": "5 bytes", "empty": None},
    }
    assert row["safety_scores"] == {"red": 0.1}
    assert {empty[name] for name in carried} == {None}
    assert {name for name, column in columns.items() if column["carried"]} == set(carried)
    assert columns["tags"]["detail"]
    assert (columns["ratio"]["min"], columns["at"]["max"]) == (0.1, time.timestamp())


def test_numbers_that_scripts_cannot_read_are_texts_or_null(tmp_path: Path) -> None:
    seeds = [2**63 - 1, 2**53, 2**53 - 1, None]
    values = [float("nan"), float("inf"), -0.5, None]
    rows = [{"seed": seed, "value": value} for seed, value in zip(seeds, values, strict=True)]
    write(tmp_path, make_table(rows, value=pa.float64()))
    read = read_rows(tmp_path)
    assert [row["seed"] for row in read] == [str(2**63 - 1), str(2**53), 2**53 - 1, None]
    assert [row["value"] for row in read] == [None, None, -0.5, None]
    assert (columns_of(tmp_path)["value"]["min"], columns_of(tmp_path)["value"]["max"]) == (-0.5, -0.5)


def test_long_texts_are_whole_in_the_details(tmp_path: Path) -> None:
    prompt, error, note = "p" * 5_000, "e" * 400, "n" * 301
    write(tmp_path, make_table([{"prompt": prompt, "error": error, "note": note}, {"note": "x"}], note=pa.string()))
    assert columns_of(tmp_path)["note"]["detail"]
    row, other = read_rows(tmp_path)
    assert (row["prompt"], row["error"], row["note"]) == (prompt, error, note)
    assert (other["prompt"], other["note"]) == ("a red circle", "x")
    rows = (tmp_path / "data/rows-00000.js").read_text()
    assert f'"{prompt[:2000]}…"' in rows
    assert f'"{error[:300]}…"' in rows
    assert note not in rows


def test_text_with_many_values_is_no_category(tmp_path: Path) -> None:
    rows = [{"topic": f"topic {number}", "group": f"group {number % 200}"} for number in range(201)]
    write(tmp_path, make_table(rows, topic=pa.string(), group=pa.string()))
    columns = columns_of(tmp_path)
    assert (columns["topic"]["kind"], columns["group"]["kind"]) == ("text", "category")
    assert len(columns["group"]["values"]) == 200
    assert [row["topic"] for row in read_rows(tmp_path)] == [row["topic"] for row in rows]


@pytest.mark.parametrize("count", [0, 1, 1000, 2001])
def test_data_are_in_files_of_a_thousand_rows(tmp_path: Path, count: int) -> None:
    write(tmp_path, make_table([{} for _ in range(2500)]))
    write(tmp_path, make_table([{} for _ in range(count)]))
    assert [row["id"] for row in read_rows(tmp_path)] == [f"r{number}" for number in range(count)]
    assert len(list((tmp_path / "data").iterdir())) == 1 + 2 * -(-count // 1000)


# Pictures


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_thumbnails_are_small_and_never_enlarged(tmp_path: Path, image_format: str) -> None:
    images = {"images/large": picture(200, 100, image_format), "images/small": picture(20, 40, image_format, seed=1)}
    totals = write(tmp_path, make_table([{"generated_image": path} for path in images]), images)
    assert (totals.counts.made, totals.counts.unreadable) == (2, 0)
    sizes = []
    for row, content in zip(read_rows(tmp_path), images.values(), strict=True):
        with Image.open(tmp_path / "thumbs" / row["_thumb"]) as thumb, Image.open(io.BytesIO(content)) as image:
            sizes.append(thumb.size)
            assert thumb.format == "WEBP"
            expected = image.convert("RGB").resize(thumb.size, Image.Resampling.BOX)
            assert np.abs(np.asarray(thumb, int) - np.asarray(expected, int)).mean() < 25
    assert sizes == [(64, 32), (20, 40)]
    assert [row["_image"] for row in read_rows(tmp_path)] == [f"../{path}" for path in images]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16"])
def test_images_of_any_mode_have_thumbnails(tmp_path: Path, mode: str) -> None:
    stream = io.BytesIO()
    Image.new(mode, (100, 100)).save(stream, "png")
    assert (
        write(tmp_path, make_table([{"generated_image": "images/a"}]), {"images/a": stream.getvalue()}).counts.made == 1
    )


def test_flagged_images_are_blurred_and_have_no_preview(tmp_path: Path) -> None:
    """Both the status and the verdict count, since a rescore may leave either."""
    content = picture()
    table = make_table(
        [
            {"generated_image": "images/a", "status": "ok"},
            {"generated_image": "images/b", "status": "flagged"},
            {"generated_image": "images/c", "status": "ok", "nsfw_content_detected": True},
        ]
    )
    images = dict.fromkeys(("images/a", "images/b", "images/c"), content)
    write(tmp_path, table, MemoryImages(images, is_linked=False))
    rows = read_rows(tmp_path)
    contrasts = []
    for row in rows:
        with Image.open(tmp_path / "thumbs" / row["_thumb"]) as thumb:
            contrasts.append(float(np.asarray(thumb).std(axis=(0, 1)).mean()))
    assert contrasts[0] > 1.5 * contrasts[1] == 1.5 * contrasts[2]
    assert [bool(row["_image"]) for row in rows] == [True, False, False]
    assert len(pictures(tmp_path, "previews")) == 1
    with Image.open(tmp_path / rows[0]["_image"]) as preview:
        assert preview.size == (200, 100)


def test_unused_pictures_are_removed_and_others_kept(tmp_path: Path) -> None:
    images = {f"images/{number}": picture(seed=number) for number in range(3)}
    first = MemoryImages(images)
    write(tmp_path, hashed(images), first)
    before = {name: path.stat().st_mtime_ns for name, path in pictures(tmp_path).items()}
    assert len(before) == len(first.read_paths) == 3
    (tmp_path / "thumbs/ab").mkdir(exist_ok=True)
    (tmp_path / "thumbs/ab/foreign.webp").write_bytes(b"x")
    images["images/0"] = picture(seed=7)
    second = MemoryImages(images)
    totals = write(tmp_path, hashed(images), second)
    assert (totals.counts.made, totals.counts.kept, totals.removed) == (1, 2, 2)
    assert second.read_paths == ["images/0"], "images whose thumbnails exist are not read"
    after = {name: path.stat().st_mtime_ns for name, path in pictures(tmp_path).items()}
    assert len(after) == 3
    assert len(after.items() & before.items()) == 2
    totals = write(tmp_path, hashed(images), images, size=32)
    assert (totals.counts.made, totals.removed) == (3, 3), "thumbnails of another size are made again"


def hashed(images: dict[str, bytes]) -> pa.Table:
    """Return the results of images, with their hashes."""
    return make_table(
        [{"generated_image": path, "sha256": hashlib.sha256(content).hexdigest()} for path, content in images.items()]
    )


def test_equal_images_share_a_thumbnail(tmp_path: Path) -> None:
    images = {f"images/{number}": picture() for number in range(50)}
    write(tmp_path, hashed(images), images)
    assert len(pictures(tmp_path)) == 1
    assert len({row["_thumb"] for row in read_rows(tmp_path)}) == 1


def test_missing_and_damaged_images_are_named(tmp_path: Path) -> None:
    images = {f"images/{number}": picture(seed=number) for number in range(4)}
    table = hashed(images)
    del images["images/0"]
    images["images/1"] = images["images/1"][:100]
    images["images/2"] = picture(seed=9)
    images["images/3"] = b"no image"
    totals = write(tmp_path, table, images)
    rows = read_rows(tmp_path)
    assert (totals.counts.made, totals.counts.unreadable) == (1, 4)
    problems = [row["_problem"] for row in rows]
    assert problems[0] == "its file is missing"
    assert problems[1].startswith("its image cannot be opened")
    assert problems[2] == "its file is damaged, or another program has changed it"
    assert problems[3].startswith("its image cannot be opened")
    assert [row["_thumb"] is not None for row in rows] == [False, False, True, False]
    assert [row["_image"] for row in rows] == [None, None, "../images/2", None]


def test_a_huge_image_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch_infer.galleries.thumbnails.MAX_PIXELS", 100)
    write(tmp_path, make_table([{"generated_image": "images/a"}]), {"images/a": picture()})
    assert read_rows(tmp_path)[0]["_problem"] == "its image has 200 x 100 pixels, which is too large"


def test_an_image_that_webp_cannot_hold_is_not_called_damaged() -> None:
    wide = picture(16_384, 10)
    thumb, preview = make_pictures(wide, 64, is_blurred=False, needs_preview=False)
    assert (Image.open(io.BytesIO(thumb)).width, preview) == (64, None)
    with pytest.raises(RowError, match="^its copy for the page cannot be encoded"):
        make_pictures(wide, 64, is_blurred=False, needs_preview=True)


def test_an_interrupted_update_leaves_the_old_page(tmp_path: Path) -> None:
    """Most of the pictures are kept for the next call, but no unfinished file."""
    write(tmp_path, make_table([{"prompt": "old"}]))
    images = {f"images/{number}": picture(8, 8, seed=number) for number in range(1100)}

    def stop(done: int) -> None:
        if done == 1050:
            raise StoppedError("stopped")

    with pytest.raises(StoppedError):
        write(tmp_path, hashed(images), images, on_progress=stop)
    assert [row["prompt"] for row in read_rows(tmp_path)] == ["old"]
    assert not list(tmp_path.rglob(".tmp-*"))
    totals = write(tmp_path, hashed(images), images)
    assert totals.counts.kept >= 1000
    assert totals.counts.kept + totals.counts.made == 1100


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    write(tmp_path, make_table([{}]))
    left = [".tmp-0a1b2c3d-999999-0123456789ab-meta.js", ".tmp-0a1b2c3d-999999-0123456789ab-index.html"]
    (tmp_path / "data" / left[0]).write_bytes(b"x")
    (tmp_path / left[1]).write_bytes(b"x")
    write(tmp_path, make_table([{}]))
    assert not list(tmp_path.rglob(".tmp-*"))


def test_memory_does_not_grow_with_the_rows_of_a_snapshot(tmp_path: Path) -> None:
    """The rows wait in a file: at most one chunk is in memory."""
    table = make_table([{"prompt": random.Random(number).randbytes(2000).hex()} for number in range(500)])
    with Snapshot(table.schema) as snapshot:
        before = pa.total_allocated_bytes()
        for _ in range(20):
            snapshot.add(table)
        assert pa.total_allocated_bytes() - before < 4 * 500 * 4000
        assert sum(len(chunk) for chunk in snapshot.chunks()) == 10_000
        assert pa.total_allocated_bytes() - before < 4 * 500 * 4000
