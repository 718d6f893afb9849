"""Test the manifest: parts are complete, and the highest attempt of each image counts."""

from __future__ import annotations

import errno
import os
import pickle
import random
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch_infer.errors import DamagedPartError, NewerPartError, StorageError
from batch_infer.manifest import EARLIER_TYPES, SCHEMA, Manifest, read_part, to_table
from batch_infer.manifest.columns import SINCE, VERSION
from batch_infer.manifest.parts import write_part
from batch_infer.records import BOOKKEEPING, PromptRequest, ResultRow, SamplingParams, Source, digest, utc_now
from batch_infer.sinks.names import Collisions
from tests.tables import to_rows

NONE = pa.schema([])
COLUMNS = [
    *("id", "image_index", "prompt", "generated_image", "nsfw_content_detected", "status", "error"),
    *("negative_prompt", "seed", "height", "width", "num_inference_steps", "guidance_scale", "guidance_rescale"),
    *("scheduler", "prompt_tokens", "prompt_truncated", "safety_checker", "safety_scores"),
    *("sha256", "pixels_sha256", "image_bytes", "slots", "seconds", "attempt", "worker", "finished_at"),
    *("source_file", "source_row", "fingerprint"),
]
"""The documented columns, in order."""


def row(name: str = "a", index: int = 0, **values: Any) -> ResultRow:
    defaults = {
        **{"prompt": "a red circle", "status": "ok", "generated_image": f"images/{name}-{index}.png"},
        **{"finished_at": utc_now(), "source_file": "t.csv", "source_row": 7, "fingerprint": "f"},
    }
    return ResultRow(**{"id": name, "image_index": index, **defaults, **values})


def test_the_schema_has_the_documented_columns_and_types() -> None:
    assert SCHEMA.names == COLUMNS
    assert [field.name for field in fields(ResultRow)] == [*COLUMNS, "carried", "line"]
    assert set(COLUMNS) > BOOKKEEPING == {"slots", "seconds", "attempt", "worker", "finished_at"}
    types = {name: str(SCHEMA.field(name).type) for name in COLUMNS}
    assert types["id"] == types["generated_image"] == types["fingerprint"] == "string"
    assert types["image_index"] == types["prompt_tokens"] == types["attempt"] == "int32"
    assert types["seed"] == types["image_bytes"] == types["source_row"] == "int64"
    assert types["nsfw_content_detected"] == types["prompt_truncated"] == "bool"
    assert (
        types["safety_scores"].startswith("list<")
        and "struct<category: string, score: float>" in types["safety_scores"]
    )
    assert types["finished_at"] == "timestamp[us, tz=UTC]"


def test_rows_round_trip(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        **{"nsfw_content_detected": True, "status": "flagged", "error": "why", "negative_prompt": "dull"},
        **{"seed": 2**63 - 1, "height": 64, "width": 72, "num_inference_steps": 20, "guidance_scale": 7.5},
        **{"guidance_rescale": 0.5, "scheduler": "DDIMScheduler", "prompt_tokens": 3, "prompt_truncated": False},
        **{"safety_checker": "own", "safety_scores": {"concept_0": 0.25}, "sha256": "00", "image_bytes": 2**40},
        **{"pixels_sha256": "01"},
        **{"slots": 8, "seconds": 0.5, "attempt": 2, "worker": "w"},
    }
    full = row(**values)
    bare = row("ü 🎨", prompt=None, status="failed", generated_image=None)
    Manifest(tmp_path).commit([full, bare], NONE)
    (part,) = Manifest(tmp_path).parts()
    first, second = to_rows(pq.read_table(str(part)))
    assert first == {name: getattr(full, name) for name in COLUMNS}
    assert second == {name: getattr(bare, name) for name in COLUMNS}


def test_carried_columns_keep_their_types() -> None:
    carried = pa.schema([("tags", pa.list_(pa.string())), ("n", pa.int16())])
    table = to_table([row(carried={"tags": ["x"], "n": 3}), row("b")], carried)
    assert table.schema.names == [*COLUMNS, "tags", "n"]
    assert table.select(["tags", "n"]).to_pylist() == [{"tags": ["x"], "n": 3}, {"tags": None, "n": None}]


def test_find_returns_only_committed_images(tmp_path: Path) -> None:
    with Manifest(tmp_path).index() as index:
        assert index.find(("a", 0)) is None
        assert len(index.read_results([])) == 0


def test_requests_collide_with_images_whose_paths_differ_by_case_alone(tmp_path: Path) -> None:
    paths = {"sku": "images/t-00000/sku-0.png", "Sku": "images/t-00000/Sku~0123456789abcdef-0.png",
             "B": "quarantine/T-00000/B-0.png", "C-1": "images/U-00000/C-1-0.png", "d": None}  # fmt: skip
    Manifest(tmp_path).commit([row(name, generated_image=path) for name, path in paths.items()], NONE)
    params = SamplingParams(64, 64, 2, 5.0, 0.0)

    def collisions(name: str, file: str, path: str | None = None, **flags: Any) -> tuple[bool, bool]:
        new = PromptRequest(name, 0, "x", None, 1, params, Source(file, 0), "f", **flags)
        marked = Collisions(index).mark(new, path)
        assert replace(marked, id_collides=new.id_collides, stem_collides=new.stem_collides) == new
        return marked.id_collides, marked.stem_collides

    with Manifest(tmp_path).index() as index:
        assert collisions("SKU", "v.csv") == (True, False)
        assert collisions("b", "v.csv") == (True, False)
        assert collisions("c-1", "u.csv") == (True, True)
        assert collisions("D", "V.csv") == (False, False), "no image has this id in its path"
        assert collisions("sku", "T.csv", paths["sku"]) == (False, True), "the other id has a digest in its path"
        assert collisions("Sku", "t.csv", paths["Sku"]) == (True, False), "its path has a digest too"
        assert collisions("sku", "t.csv", paths["sku"], id_collides=True, stem_collides=True) == (False, False)
        assert collisions("e", "U.csv", stem_collides=True) == (False, False), "the folder of its file exists"
        assert collisions("e", "v.csv", id_collides=True, stem_collides=True) == (True, True)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1)], ids=str)
def test_the_highest_attempt_counts(tmp_path: Path, order: tuple[int, ...]) -> None:
    """The order of the part names does not matter."""
    manifest = Manifest(tmp_path)
    for attempt in order:
        manifest.commit([row("other", seed=attempt), row(attempt=attempt, seed=attempt, status="failed")], NONE)
    with manifest.index() as index:
        image = index.find(("a", 0))
        assert image is not None
        assert (image.attempt, image.status) == (3, "failed")
        assert index.read_results([image])["seed"].to_pylist() == [3]


def test_the_choice_between_rows_with_equal_attempts_is_stable(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    for fingerprint in ("f", "g", "h"):
        manifest.commit([row(fingerprint=fingerprint)], NONE)
    counted = set()
    for _ in range(3):
        with manifest.index() as index:
            image = index.find(("a", 0))
            assert image is not None
            assert index.read_results([image])["fingerprint"].to_pylist() == [image.fingerprint]
            counted.add(image.fingerprint)
    assert len(counted) == 1


@pytest.mark.parametrize("fault", ["error", "missing", "damaged"])
def test_add_retries_parts_that_it_could_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    manifest = Manifest(tmp_path)
    with manifest.index() as index:
        names = "abc"
        for name in names:
            manifest.commit([row(name)], NONE)
        parts = manifest.parts()
        path = Path(str(parts[1]))
        whole = path.read_bytes()
        damaged_parts: list[DamagedPartError] = []
        if fault == "error":
            with monkeypatch.context() as patch, pytest.raises(StorageError, match="unavailable"):
                patch.setattr("batch_infer.manifest.index.read_part", _raising(parts[1].name, read_part))
                index.add(parts, damaged_parts.append)
        else:
            path.unlink() if fault == "missing" else path.write_bytes(whole[:50])
            index.add(parts, damaged_parts.append)
            path.write_bytes(whole)
        assert [error.part for error in damaged_parts] == [str(path)] * (fault == "damaged")
        assert sum(index.find((name, 0)) is not None for name in names) < 3
        index.add(parts, damaged_parts.append)
        assert all(index.find((name, 0)) for name in names)


def _raising(bad: str, read: Callable[..., pa.Table]) -> Callable[..., pa.Table]:
    def read_part(part: Path, *columns: Any) -> pa.Table:
        if part.name == bad:
            raise StorageError("the disk is unavailable")
        return read(part, *columns)

    return read_part


def test_part_names_are_digests_of_their_rows(tmp_path: Path) -> None:
    """Two workers that render the same rows write the same part, and other rows never replace it."""
    manifest = Manifest(tmp_path)
    rows = [row("a"), row("b")]
    name = manifest.commit(rows, NONE)
    assert manifest.commit([replace(r, worker="another", finished_at=utc_now()) for r in rows], NONE) == name
    assert len(manifest.parts()) == 1
    changes: list[dict[str, Any]] = [{"id": "c"}, {"image_index": 1}, {"fingerprint": "g"}, {"attempt": 2}]
    for change in changes:
        assert manifest.commit([rows[0], replace(rows[1], **change)], NONE) != name


def test_a_recreated_manifest_is_read_again(tmp_path: Path) -> None:
    """A process with `--overwrite` has read the old parts, which may have had the same names."""
    for status in ("failed", "ok"):
        manifest = Manifest(tmp_path)
        manifest.commit([row(status=status)], NONE)
        with manifest.index() as index:
            image = index.find(("a", 0))
            assert image is not None
            assert index.read_results([image])["status"].to_pylist() == [image.status] == [status]


def test_only_complete_parts_are_listed(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    part = (tmp_path / "manifest") / manifest.commit([row()], NONE)
    ((tmp_path / "manifest") / f".tmp-1-{part.name}").write_bytes(part.read_bytes()[:100])
    ((tmp_path / "manifest") / "notes.txt").touch()
    assert [part.name for part in manifest.parts()] == [part.name]


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", b"another"], ids=["empty", "truncated", "another"])
def test_the_error_of_a_damaged_part_names_it_and_what_to_do(tmp_path: Path, content: bytes) -> None:
    manifest = Manifest(tmp_path)
    whole = (tmp_path / "manifest") / manifest.commit([row("b")], NONE)
    part = (tmp_path / "manifest") / manifest.commit([row()], NONE)
    if content == b"another":
        pq.write_table(pa.table({"prompt": ["no part"]}), part)
    else:
        part.write_bytes(content)
    sentence = rf"{re.escape(str(part))} is damaged \(.*[^.]\); run again to set it aside"
    with pytest.raises(DamagedPartError, match=sentence) as error:
        manifest.index()
    assert error.value.part == str(part)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    damaged_parts: list[DamagedPartError] = []
    with manifest.index(on_damage=damaged_parts.append) as index:
        assert (index.find(("a", 0)), index.count_rows()) == (None, (1, 0))
    assert [error.part for error in damaged_parts] == [str(part)]
    assert part.exists()
    assert whole.exists()


def test_a_part_that_cannot_be_read_is_not_damaged(tmp_path: Path) -> None:
    """Its rows would be rendered again for nothing."""
    manifest = Manifest(tmp_path)
    part = (tmp_path / "manifest") / manifest.commit([row()], NONE)
    with manifest.index() as index:
        image = index.find(("a", 0))
        part.unlink()
        assert image is not None
        with pytest.raises(StorageError, match=f"cannot read {re.escape(str(part))}: No such file"):
            index.read_results([image])


def test_columns_outside_the_index_are_verified_when_they_are_read(tmp_path: Path) -> None:
    """The changed page is not compressed, so only its checksum reveals the damage."""
    manifest = Manifest(tmp_path)
    part = (tmp_path / "manifest") / manifest.commit([row(sha256="0123456789" * 6, prompt=f"{2**70}")], NONE)
    with manifest.index() as index:
        content = part.read_bytes()
        at = content.index(b"0123456789")
        part.write_bytes(content[:at] + b"9876543210" + content[at + 10 :])
        image = index.find(("a", 0))
        assert image is not None
        with pytest.raises(DamagedPartError, match="CRC checksum"):
            index.read_results([image])


@pytest.mark.parametrize("change", ["renamed", "of another type"])
def test_a_part_with_other_columns_is_damaged(tmp_path: Path, change: str) -> None:
    manifest = Manifest(tmp_path)
    part = (tmp_path / "manifest") / manifest.commit([row(carried={"n": "x"})], pa.schema([("n", pa.string())]))
    table = pq.read_table(part)
    if change == "renamed":
        table = table.rename_columns([*SCHEMA.names, "m"]).replace_schema_metadata(table.schema.metadata)
    else:
        table = table.set_column(2, "prompt", pa.array([7]))
    pq.write_table(table, part)
    with pytest.raises(DamagedPartError, match=r"its column"), manifest.index() as index:
        image = index.find(("a", 0))
        assert image is not None
        index.read_results([image])


def as_version_1(part: Path, extra: dict[str, Any] | None = None) -> None:
    """Rewrite a part in version 1 of the format, with the carried columns `extra`."""
    table = pq.read_table(part).drop_columns(list(SINCE))
    for name, earlier_type in EARLIER_TYPES.items():
        scores = [
            None if cell is None else {c["category"]: c["score"] for c in cell} for cell in table[name].to_pylist()
        ]
        table = table.set_column(table.column_names.index(name), name, pa.array(scores, earlier_type))
    for name, values in (extra or {}).items():
        table = table.append_column(name, pa.array(values))
    mark = digest(table.column_names)
    pq.write_table(table.replace_schema_metadata({"batch-infer-columns": mark}), part)


def test_newer_columns_of_a_part_from_an_earlier_version_are_null(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    old = (tmp_path / "manifest") / manifest.commit([row("a", sha256="00", pixels_sha256="01")], NONE)
    manifest.commit([row("b", sha256="02", pixels_sha256="03")], NONE)
    as_version_1(old)
    with manifest.index() as index:
        images = [image for name in "ab" if (image := index.find((name, 0))) is not None]
        table = index.read_results(images)
    assert table.schema == SCHEMA
    assert table.select(["id", "sha256", "pixels_sha256"]).to_pylist() == [
        {"id": "a", "sha256": "00", "pixels_sha256": None},
        {"id": "b", "sha256": "02", "pixels_sha256": "03"},
    ]


def test_safety_scores_of_a_part_from_an_earlier_version_are_converted(tmp_path: Path) -> None:
    manifest, scores = Manifest(tmp_path), {"Hate": 2.0, "Violence": 0.0}
    old = (tmp_path / "manifest") / manifest.commit([row("a", safety_scores=scores), row("b"), row("c")], NONE)
    as_version_1(old)
    assert pa.types.is_map(pq.read_schema(old).field("safety_scores").type)
    table = read_part(old)
    assert table.schema == SCHEMA
    assert [cells["safety_scores"] for cells in to_rows(table)] == [scores, None, None]
    with pytest.raises(DamagedPartError, match="safety_scores has the type"):
        table = table.drop_columns(list(SINCE))
        pq.write_table(table.replace_schema_metadata(pq.read_schema(old).metadata), old)
        read_part(old)


def test_a_carried_column_that_later_became_a_result_column_is_still_carried(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    part = (tmp_path / "manifest") / manifest.commit([row()], NONE)
    as_version_1(part, {"pixels_sha256": ["the user's"]})
    assert [schema.names for schema in manifest.schemas()] == [["input_pixels_sha256"]]
    table = read_part(part)
    assert table.column_names == [*COLUMNS, "input_pixels_sha256"]
    assert (table["pixels_sha256"].to_pylist(), table["input_pixels_sha256"].to_pylist()) == ([None], ["the user's"])


def test_a_part_of_a_later_version_is_refused_and_unchanged(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    part = (tmp_path / "manifest") / manifest.commit([row()], NONE)
    table = pq.read_table(part).append_column("new", pa.array(["x"]))
    later = VERSION + 1
    mark = f"{later} {digest([later, *table.column_names])}"
    pq.write_table(table.replace_schema_metadata({"batch-infer-columns": mark}), part)
    before = part.read_bytes()
    damaged_parts: list[DamagedPartError] = []
    message = f"{part} was written by a newer batch-infer (format {later}"
    with pytest.raises(NewerPartError, match=re.escape(message)):
        manifest.index(on_damage=damaged_parts.append)
    assert (damaged_parts, part.read_bytes()) == ([], before)


def test_the_cache_of_parts_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carried = pa.schema([("text", pa.string())])
    manifest = Manifest(tmp_path)
    for name in "abc":
        manifest.commit([row(name, carried={"text": "x" * 1000})], carried)
    with manifest.index() as index:
        images = [image for name in "abc" if (image := index.find((name, 0))) is not None]
        reads: list[Path] = []

        def read(part: Path, columns: Any = None) -> pa.Table:
            reads.append(part)
            return read_part(part, columns)

        monkeypatch.setattr("batch_infer.manifest.index.read_part", read)
        schema = pa.schema([*SCHEMA, *carried])

        def take_twice() -> int:
            reads.clear()
            for image in (*images, *images):
                assert index.read_results([image], schema)["text"].to_pylist() == ["x" * 1000]
            return len(reads)

        assert take_twice() == 3
        monkeypatch.setattr("batch_infer.manifest.index.CACHED_BYTES", 2500)
        index.read_results(images[:1], SCHEMA)  # other columns: tables over the limit are dropped
        assert take_twice() == 6


def corrupt(content: bytes, random_: random.Random) -> bytes:
    """Return a file as a disk may corrupt it: truncated, with zeroed blocks, changed bits or changed bytes."""
    at = random_.randrange(len(content))
    foot = random_.randrange(len(content) - int.from_bytes(content[-8:-4], "little") - 8, len(content))
    kind = random_.choice(["cut", "block", "bit", "byte", "foot"])
    if kind == "cut":
        return content[:at]
    if kind == "block":
        length = random_.choice([1, 16, 512, 4096])
        return content[:at] + bytes(len(content[at : at + length])) + content[at + length :]
    if kind == "byte":
        return content[:at] + bytes([random_.randrange(256)]) + content[at + 1 :]
    at = foot if kind == "foot" else at
    return content[:at] + bytes([content[at] ^ 1 << random_.randrange(8)]) + content[at + 1 :]


def test_damage_is_detected_or_harmless(tmp_path: Path) -> None:
    manifest, random_ = Manifest(tmp_path), random.Random(0)
    rows = [row(f"{k}", prompt=f"{k} circles", seed=k, safety_scores={"c": k / 7}) for k in range(30)]
    part = (tmp_path / "manifest") / manifest.commit(rows, NONE)
    content, table = part.read_bytes(), pq.read_table(part).replace_schema_metadata(None)
    detected = 0
    for _ in range(800):
        part.write_bytes(corrupt(content, random_))
        try:
            list(manifest.schemas())
            with manifest.index() as index:
                images = [image for r in rows if (image := index.find(r.key)) is not None]
                assert index.read_results(images).equals(table)
        except DamagedPartError:
            detected += 1
    assert detected > 400


@pytest.mark.parametrize("is_replaced", [False, True], ids=["removed", "replaced"])
def test_a_removed_out_is_not_created_again(tmp_path: Path, is_replaced: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    manifest = Manifest(out)
    manifest.commit([row()], NONE)
    out.rename(tmp_path / "elsewhere")
    if is_replaced:
        out.mkdir()
    for name in ("a", "b"):
        with pytest.raises(StorageError, match="has disappeared since the run began"):
            manifest.commit([row(name)], NONE)
    assert out.exists() == is_replaced
    assert not is_replaced or not list(out.iterdir())
    with pytest.raises(StorageError, match="has disappeared since the run began"):
        Manifest(tmp_path / "missing").commit([row()], NONE)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_error_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    manifest = Manifest(tmp_path)
    name = manifest.commit([row()], NONE)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match="cannot write .*part-.*parquet: No space left on device"):
        manifest.commit([row("b")], NONE)
    assert [path.name for path in (tmp_path / "manifest").iterdir()] == [name]


def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "manifest").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot write"):
        Manifest(tmp_path).commit([row()], NONE)


def test_an_interrupted_write_leaves_no_part(tmp_path: Path) -> None:
    stopped = mock.patch.object(pq.ParquetWriter, "write_table", side_effect=KeyboardInterrupt)
    with stopped, pytest.raises(KeyboardInterrupt):
        write_part(tmp_path / "part-0.parquet", to_table([row()], NONE), "clock", 0.0)
    assert list(tmp_path.iterdir()) == []


keys = st.tuples(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), st.integers(0, 3))


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(keys, min_size=1, max_size=12, unique=True), st.integers(1, 5), st.data())
def test_read_results_returns_rows_in_the_requested_order(
    tmp_path_factory: pytest.TempPathFactory, names: list[tuple[str, int]], size: int, data: st.DataObject
) -> None:
    manifest = Manifest(tmp_path_factory.mktemp("out"))
    for start in range(0, len(names), size):
        manifest.commit([row(*key) for key in names[start : start + size]], NONE)
    requested = data.draw(st.lists(st.sampled_from(names), max_size=20))
    with manifest.index() as index:
        table = index.read_results([image for key in requested if (image := index.find(key)) is not None])
    assert list(zip(table["id"].to_pylist(), table["image_index"].to_pylist(), strict=True)) == requested
