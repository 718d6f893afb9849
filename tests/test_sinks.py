"""Test sinks: images are complete and only in OUT, and each has its own path. The first tests check all SINKS.

They store flagged images, which are files in every sink. `test_shards.py` tests shards.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batch_infer.errors import StorageError
from batch_infer.records import PromptRequest, SamplingParams, Source
from batch_infer.sinks import BACKUP_PREFIX, Sink, is_image_path, make_sink, original_path
from batch_infer.sinks.folder import FolderSink
from batch_infer.sinks.names import hashed_name, safe_name
from batch_infer.sinks.sink import SINKS
from batch_infer.store import IMAGE_FOLDERS, TEMPORARY_PREFIX, LocalStore
from batch_infer.table.ids import Ids, find_colliding_stems
from tests.storage import no_rows

SAFE = ["a", "row-00000012", "a.b_c-d", "0", "_", "x" * 80, "prompts-2026.05"]
relaxed = settings(deadline=None)
UNSAFE = [
    *("", ".", "..", "../../x", "/etc/passwd", "a/b", "a\\b", "C:\\x", "~", "~root", "-rf", "a b", "a.", ".hidden"),
    *("x" * 300, "a\nb", "a\0b", "名前", "🎨", "é", "e\N{COMBINING ACUTE ACCENT}", "\udcff"),
    *("A", "a:b", "a*?<>|", "%2e%2e"),
    *("con", "nul", "aux", "prn", "com1", "lpt9", "con.txt", "NUL", "~a"),
]


def request(name: str, *, index: int = 0, file: str = "t.csv", row: int = 0, **more: Any) -> PromptRequest:
    params = SamplingParams(64, 64, 2, 5.0, 0.0)
    return PromptRequest(name, index, "x", None, 1, params, Source(file, row), "f", **more)


# The protocol


@pytest.fixture(params=SINKS)
def sink_of(request: pytest.FixtureRequest) -> Callable[[Path], Sink]:
    """A function that creates a sink for an OUT. Tests with this fixture run for every sink in SINKS."""
    return partial(make_sink, name=request.param)


def test_images_appear_when_they_are_published(tmp_path: Path, sink_of: Callable[[Path], Sink]) -> None:
    sink = sink_of(tmp_path)
    path = sink.path_of(request("a"), is_flagged=True)
    stored = sink.write(path, b"first")
    assert (stored.path, stored.sha256, stored.image_bytes) == (path, hashlib.sha256(b"first").hexdigest(), 5)
    assert (sink.has(path), sink.read(path)) == (False, None)
    sink.publish([path], no_rows)
    assert sink.has(path)
    assert (sink.read(path), sink.read(path, 5), sink.read(path, 4)) == (b"first", b"first", None)
    assert sink.write(path, b"second") != stored
    assert sink_of(tmp_path).read(path) == b"first", "until the second image is published"
    sink.publish([path], no_rows)
    assert sink_of(tmp_path).read(path) == b"second"
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [tmp_path / path], "no temporary file remains"
    sink.remove(path)
    sink.remove(path)
    assert not sink.has(path)


def test_a_replaced_image_is_backed_up_until_its_backup_is_removed(
    tmp_path: Path, sink_of: Callable[[Path], Sink]
) -> None:
    """Recovery recognises backups by name. A second replacement makes no backup, as the first was not committed."""
    sink = sink_of(tmp_path)
    paths = [sink.path_of(request(name), is_flagged=True) for name in "ab"]
    backups = [sink.backup_path(path) for path in paths]
    for path, backup in zip(paths, backups, strict=True):
        assert Path(backup).name.startswith(BACKUP_PREFIX)
        assert original_path(backup) == path
        sink.write(path, b"old")
    sink.publish(paths, no_rows)
    missing = [sink.path_of(request("missing", file=file), is_flagged=True) for file in ("t.csv", "other.csv")]
    for content in (b"new", b"newer"):
        for path in paths:
            sink.write(path, content)
        sink.back_up([*paths, *missing])
        sink.publish(paths, no_rows)
    assert [sink.read(path) for path in (*paths, *backups)] == [b"newer", b"newer", b"old", b"old"]
    sink.restore(backups[0])
    sink.remove(backups[1])
    assert [sink.read(path) for path in (*paths, *backups)] == [b"old", b"newer", None, None]


def test_every_image_has_its_own_path(tmp_path: Path, sink_of: Callable[[Path], Sink]) -> None:
    sink = sink_of(tmp_path)
    requests = [request(name, index=index, row=row) for name, row in (("a", 0), ("b", 5000)) for index in (0, 1)]
    paths = [
        sink.path_of(request, is_flagged=True, quarantine=quarantine)
        for request in requests
        for quarantine in (False, True)
    ]
    assert len(set(paths)) == 8
    assert {path.partition("/")[0] for path in paths} == set(IMAGE_FOLDERS)
    for number, path in enumerate(paths):
        image = requests[number // 2]
        assert path in sink.possible_paths(image)
        assert sink.path_in(path, quarantine=True) == sink.path_of(image, is_flagged=True, quarantine=True)
        assert sink.path_of(replace(image, replaces=path), is_flagged=True, quarantine=bool(number % 2)) == path
        sink.write(path, path.encode())
    sink.publish(paths, no_rows)
    assert [sink.read(path) for path in paths] == [path.encode() for path in paths]
    assert {path.rpartition("/")[0] for path in paths} <= set(sink.folders_of(["t.csv"]))


@pytest.mark.parametrize("path", ["../precious", "images/../../precious", "/precious", "images/link/precious"])
def test_paths_outside_out_are_missing(tmp_path: Path, sink_of: Callable[[Path], Sink], path: str) -> None:
    """Paths come from manifest parts, which anyone may have edited."""
    precious = tmp_path / "precious"
    precious.touch()
    out = tmp_path / "out"
    (out / "images").mkdir(parents=True)
    (out / "images" / "link").symlink_to(tmp_path)
    sink, path = sink_of(out), path if path != "/precious" else str(precious)
    assert (sink.has(path), sink.read(path)) == (False, None)
    sink.remove(path)
    assert precious.exists()


def test_publishing_a_missing_image_is_an_error(tmp_path: Path, sink_of: Callable[[Path], Sink]) -> None:
    with pytest.raises(StorageError, match="a.png"):
        sink_of(tmp_path).publish(["images/a.png"], no_rows)


# The folder sink


def sink_on(*, case_matters: bool) -> FolderSink:
    """Return a sink as on a file system that is case-sensitive or not."""
    sink = FolderSink(Path("/out"), ".png")
    sink._case_sensitive = dict.fromkeys(("images", "quarantine"), case_matters)
    return sink


@pytest.mark.parametrize("name", SAFE)
def test_a_safe_name_is_kept(name: str) -> None:
    assert safe_name(name) == name


@pytest.mark.parametrize("name", UNSAFE, ids=ascii)
def test_an_unsafe_name_is_hashed(name: str) -> None:
    hashed = safe_name(name)
    assert hashed != name
    assert re.fullmatch(r"[A-Za-z0-9_-]{0,60}~[0-9a-f]{16}", hashed)


def normalize(name: str) -> str:
    """Return a name in the form that file systems compare if they ignore case and Unicode composition."""
    return unicodedata.normalize("NFKC", name).casefold().rstrip(". ")


def test_unsafe_names_do_not_collide() -> None:
    names = {*SAFE, *UNSAFE, *map(safe_name, UNSAFE), *(name.upper() for name in SAFE if name != "_")}
    assert len({normalize(safe_name(name)) for name in names}) == len(names)


@relaxed
@given(st.text(), st.text())
@example("a", "A")
@example("e\N{COMBINING ACUTE ACCENT}", "\N{LATIN SMALL LETTER E WITH ACUTE}")
@example("a", "a.")
def test_names_do_not_collide(one: str, other: str) -> None:
    assert (one == other) == (normalize(safe_name(one)) == normalize(safe_name(other)))


@relaxed
@given(st.text(), st.integers(0, 999), st.text(), st.integers(0, 10**9), st.booleans(), st.booleans())
def test_a_path_stays_in_out(name: str, index: int, file: str, row: int, case_matters: bool, collides: bool) -> None:
    image = request(name, index=index, file=file, row=row, id_collides=collides, stem_collides=collides)
    path = sink_on(case_matters=case_matters).path_of(image)
    assert path in sink_on(case_matters=case_matters).possible_paths(image)
    assert re.fullmatch(r"images/[A-Za-z0-9_.~-]+-\d{5,}/[A-Za-z0-9_.~-]+-\d+\.png", path)
    assert all(len(part) <= 120 and part not in (".", "..") for part in path.split("/"))
    assert os.path.normpath(path) == path


@relaxed
@given(
    st.tuples(st.text("a-0", max_size=4), st.integers(0, 11)), st.tuples(st.text("a-0", max_size=4), st.integers(0, 11))
)
def test_paths_of_a_table_do_not_collide(one: tuple[str, int], other: tuple[str, int]) -> None:
    """`a-1`, image 0, is not `a`, image 10."""
    paths = {FolderSink(Path(), ".png").path_of(request(name, index=index)) for name, index in {one, other}}
    assert len(paths) == len({one, other})


SIMILAR_NAMES = st.text("aAbB.~ Kk", min_size=1, max_size=3)


@relaxed
@given(st.lists(st.tuples(SIMILAR_NAMES, SIMILAR_NAMES), unique_by=lambda row: row[0]), st.booleans())
def test_paths_of_a_run_do_not_collide_on_any_file_system(rows: list[tuple[str, str]], case_matters: bool) -> None:
    """OUT may be copied to another file system."""
    sink, ids = sink_on(case_matters=case_matters), Ids(distinct=False)
    colliding = find_colliding_stems(stem for _, stem in rows)
    paths: dict[str, str] = {}
    for name, stem in rows:
        assert ids.reserve(name, stem)
        collides = {"id_collides": ids.collides(name), "stem_collides": Source(f"{stem}.csv", 0).stem in colliding}
        image = request(name, file=f"{stem}.csv", **collides)
        for path in sink.possible_paths(image):
            assert paths.setdefault(normalize(path), name) == name
    ids.close()


@pytest.mark.parametrize(
    ("name", "case_matters", "collides", "expected"),
    [
        ("SKU-1000", True, False, "SKU-1000"),
        ("SKU-1000", True, True, hashed_name("SKU-1000")),
        ("SKU-1000", False, False, hashed_name("SKU-1000")),
        ("sku-1000", True, True, hashed_name("sku-1000")),
        ("sku-1000", False, True, hashed_name("sku-1000")),
        ("sku-1000", False, False, "sku-1000"),
        ("NUL", True, False, hashed_name("NUL")),
        ("Blue Square", True, False, hashed_name("Blue Square")),
    ],
)
def test_capitals_are_kept_on_case_sensitive_file_systems(
    name: str, case_matters: bool, collides: bool, expected: str
) -> None:
    sink = sink_on(case_matters=case_matters)
    assert sink.path_of(request(name, id_collides=collides)) == f"images/t-00000/{expected}-0.png"
    of_stem = request("a", file=f"{name}.csv", stem_collides=collides)
    assert sink.path_of(of_stem, quarantine=True) == f"quarantine/{expected}-00000/a-0.png"


def test_possible_paths_include_those_of_earlier_versions_but_not_of_other_rows() -> None:
    sink = sink_on(case_matters=False)
    digest = hashed_name("SKU")
    assert sink.possible_paths(request("SKU")) == {f"{top}/t-00000/{digest}-0.png" for top in ("images", "quarantine")}
    colliding = request("sku", id_collides=True)
    assert "images/t-00000/sku-0.png" not in sink.possible_paths(colliding), "which may be SKU-0.png"
    case_sensitive = sink_on(case_matters=True)
    assert case_sensitive.possible_paths(request("SKU")) == {
        f"{top}/t-00000/{name}-0.png" for top in ("images", "quarantine") for name in ("SKU", digest)
    }


@pytest.mark.parametrize("case_matters", [False, True])
def test_an_image_keeps_its_path_after_a_collision_ends(case_matters: bool) -> None:
    sink = sink_on(case_matters=case_matters)
    path = sink.path_of(request("sku", file="a.csv", id_collides=True, stem_collides=True))
    for name in (path, path.replace(hashed_name("a"), "a"), path.replace(hashed_name("sku"), "sku")):
        assert sink.path_of(request("sku", file="a.csv", replaces=name)) == name
    assert sink.path_of(request("sku", file="b.csv", replaces=path)) == "images/b-00000/sku-0.png"


@pytest.mark.parametrize("linked", [False, True])
def test_case_sensitivity_is_probed_once_on_the_disk_of_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    probed: list[Path] = []

    def probe(folder: Path) -> bool:
        probed.append(folder)
        return not linked

    monkeypatch.setattr("batch_infer.store.local_images.is_case_sensitive", probe)
    out = tmp_path / "out"
    out.mkdir()
    if linked:
        (tmp_path / "disk").mkdir()
        (out / "images").symlink_to(tmp_path / "disk")
    sink = FolderSink(out, ".png")
    assert sink.path_of(request("a")) == "images/t-00000/a-0.png"
    assert probed == [], "lower-case names need no probe"
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(sink.path_of, [request("A")] * 8))
    assert paths == {f"images/t-00000/{hashed_name('A') if linked else 'A'}-0.png"}
    assert probed == [out / "images" if linked else out]


@pytest.mark.parametrize(
    ("file", "row", "folder"),
    [
        ("prompts.csv", 0, "prompts-00000"),
        ("/data/x/prompts.parquet", 999, "prompts-00000"),
        ("prompts.csv", 1000, "prompts-00001"),
        ("prompts.csv", 123_456_789, "prompts-123456"),
        ("prompts.v2.csv", 0, "prompts.v2-00000"),
        ("prompts.jsonl.GZ", 0, "prompts-00000"),
        ("s3://bucket/a/prompts.csv.zst", 5, "prompts-00000"),
    ],
)
def test_a_folder_holds_a_thousand_rows_of_a_file(file: str, row: int, folder: str) -> None:
    sink = FolderSink(Path(), ".webp")
    assert sink.path_of(request("a", index=3, file=file, row=row)) == f"images/{folder}/a-3.webp"
    assert sink.path_of(request("a", file=file, row=row), quarantine=True) == f"quarantine/{folder}/a-0.webp"


def test_the_error_names_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "images").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=re.escape(str(tmp_path / "images"))):
        FolderSink(tmp_path, ".png").write("images/t/a.png", b"x")


NAMES = [f"images/t-0000{k % 2}/{k}-0.png" for k in range(6)]


def write_images(out: Path) -> FolderSink:
    sink = FolderSink(out, ".png")
    for name in NAMES:
        sink.write(name, name.encode())
    return sink


def test_all_images_are_fsynced_before_the_first_rename_and_then_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders are created once, and are durable before the images in them are published."""
    steps: list[str] = []
    real_sync, real_replace, real_mkdir = os.fsync, os.replace, Path.mkdir

    def fsync(descriptor: int) -> None:
        steps.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync")
        real_sync(descriptor)

    def replace_and_record(source: Path, target: Path) -> None:
        steps.append("replace")
        real_replace(source, target)

    def mkdir(folder: Path, *args: Any, **options: Any) -> None:
        steps.append(f"mkdir {folder.name}")
        real_mkdir(folder, *args, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace_and_record)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    sink = write_images(tmp_path)
    made = [step for name in ("images", "t-00000", "t-00001") for step in (f"mkdir {name}", "sync folder")]
    assert steps == made
    steps.clear()
    sink.publish(NAMES, no_rows)
    assert steps == ["sync"] * 6 + ["replace"] * 6 + ["sync folder"] * 2


GONE = "has disappeared since the run began: .* run again to continue"


def replace_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()


@pytest.mark.parametrize("place", ["out", "out/images"], ids=["OUT", "the disk that images/ links to"])
@pytest.mark.parametrize("remove", [shutil.rmtree, replace_folder], ids=["removed", "replaced"])
def test_a_removed_folder_is_not_created_again(tmp_path: Path, place: str, remove: Callable[[Path], object]) -> None:
    """Nor is anything written to or removed from the folder that replaces it, such as an empty mount point."""
    out = tmp_path / "out"
    out.mkdir()
    sink = write_images(out)
    remove(tmp_path / place)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StorageError, match=GONE):
        sink.publish(NAMES, no_rows)
    with pytest.raises(StorageError, match=GONE):
        sink.write("images/t-00000/new-0.png", b"x")
    with pytest.raises(StorageError, match=GONE):
        sink.remove(NAMES[0])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_sink_without_its_folder_writes_nothing(tmp_path: Path) -> None:
    """A worker that starts after OUT was removed receives the folder that the run has pinned."""
    out = tmp_path / "out"
    out.mkdir()
    pinned = LocalStore(out)
    replace_folder(out)
    for sink in (FolderSink(pinned), FolderSink(tmp_path / "missing")):
        with pytest.raises(StorageError, match=GONE):
            sink.write(NAMES[0], b"x")
    assert not list(out.iterdir())


def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}/{NAMES[0]}: No space left on device"):
        FolderSink(tmp_path).write(NAMES[0], b"x")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_error_while_publishing_names_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """With delayed allocation, a full disk may be detected only then."""
    sink = write_images(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}/{NAMES[0]}: No space left on device"):
        sink.publish(NAMES, no_rows)
    assert not [path for path in tmp_path.rglob("*.png") if not path.name.startswith(TEMPORARY_PREFIX)]


def test_an_image_folder_that_is_a_link_is_not_written_into(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (out / "images").mkdir(parents=True)
    (out / "images" / "t-00000").symlink_to(elsewhere)
    with pytest.raises(StorageError, match="t-00000 is a link; only images/ and quarantine/ may be"):
        FolderSink(out).write("images/t-00000/a-0.png", b"x")
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "images/../x", "manifest/part.parquet", "images/link/x"])
def test_only_images_are_read_and_removed(tmp_path: Path, path: str) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    for folder in (out / "images", out / "manifest", other):
        folder.mkdir(parents=True)
    for file in (other / "x", tmp_path / "x", out / "x", out / "manifest" / "part.parquet"):
        file.write_bytes(b"x")
    (out / "images" / "link").symlink_to(other)
    before = sorted(tmp_path.rglob("*"))
    sink = FolderSink(out)
    assert (sink.has(path), sink.read(path)) == (False, None)
    sink.remove(path)
    assert sorted(tmp_path.rglob("*")) == before
    assert is_image_path(path) == (path == "images/link/x")
