"""Recovery: however a run dies, the next one leaves OUT as an undisturbed run would."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import signal
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest

from batch_infer.errors import DamagedPartError, StorageError
from batch_infer.jobs import recovery
from batch_infer.jobs.recovery import recover, set_aside
from batch_infer.manifest import Manifest
from batch_infer.records import ResultRow
from batch_infer.sinks import Sink
from batch_infer.sinks.folder import FolderSink
from batch_infer.store import LocalStore
from tests.deaths import die_at
from tests.storage import no_rows

NONE = pa.schema([])
END = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
NOW = 50_000.0
"""Time of a machine's clock, in seconds."""
ROOT = Path(__file__).parent.parent
LONG = "0123456789" * 6
"""A value that is stored uncompressed in a part."""


def result(sink: FolderSink, name: str, content: bytes | None = b"pixels", **more: Any) -> ResultRow:
    """Write an image without publishing it, and return its row."""
    usual = {"id": name, "image_index": 0, "prompt": "x", "status": "ok", "source_file": "t.csv", "source_row": 0}
    if content is not None:
        stored = sink.write(f"images/t-0000{name > 'b':d}/{name}-0.png", content)
        usual |= {"generated_image": stored.path, "sha256": stored.sha256, "image_bytes": stored.image_bytes}
    return ResultRow(**{**usual, "finished_at": END, "fingerprint": "f", **more})


def commit(out: Path, *rows: ResultRow, at: float = NOW, run: int = 0) -> Path:
    """Commit rows at the time `at` of the machine's clock, and return the part."""
    FolderSink(out).publish([row.generated_image for row in rows if row.generated_image], no_rows)
    manifest = Manifest(out, run)
    with mock.patch("batch_infer.manifest.manifest.monotonic", lambda: at):
        return out / "manifest" / manifest.commit(rows, NONE)


def files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def commit_twice(out: Path) -> None:
    """Commit two batches of rows like a worker. The second contains second attempts of the same rows."""
    sink, manifest = FolderSink(out), Manifest(out)
    for attempt in (1, 2):
        rows = [result(sink, name, f"{name} {attempt}".encode(), attempt=attempt) for name in "abc"]
        rows.append(result(sink, "d", None, status="failed", error="why", attempt=attempt))
        sink.publish([row.generated_image for row in rows if row.generated_image], no_rows)
        with mock.patch("batch_infer.manifest.manifest.monotonic", lambda: NOW):
            manifest.commit(rows, NONE)
        sink.remove(f"images/t-00000/old-{attempt}.png")


def new_out(out: Path) -> Path:
    """Create an OUT with two images to replace."""
    (out / "images" / "t-00000").mkdir(parents=True)
    for attempt in (1, 2):
        (out / "images" / "t-00000" / f"old-{attempt}.png").touch()
    return out


def die_everywhere(root: Path) -> None:
    """Commit in a new process for each step at which it can be killed, until one finishes. Print their exit codes."""
    for step in itertools.count(1):
        out = new_out(root / str(step))
        child = os.fork()
        if child == 0:
            die_at(step)
            commit_twice(out)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(out.name, code, flush=True)
        if code == 0:
            break


def find_wrong_images(out: Path) -> set[tuple[str, int]]:
    """Return the keys of images that do not come from the committed attempt."""
    with Manifest(out).index() as index:
        matches = {name: index.find((name, 0)) for name in "abc"}
        return {
            (name, 0)
            for name, committed in matches.items()
            if committed and (out / str(committed.path)).read_bytes() != f"{name} {committed.attempt}".encode()
        }


@pytest.mark.promises
def test_a_kill_at_any_step_of_a_commit_is_recovered_by_the_next_run(tmp_path: Path) -> None:
    """The test kills real processes, so that no `finally` cleans up."""
    command = [sys.executable, "-m", "tests.test_recovery", str(tmp_path)]
    message = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    ends = dict(line.split() for line in message.stdout.splitlines())
    *killed, intact = ends
    assert {ends[name] for name in killed} == {str(-signal.SIGKILL)}
    assert len(killed) > 30
    want = files(tmp_path / intact)
    assert sorted(path.split("/")[0] for path in want) == ["images"] * 3 + ["manifest"] * 2
    with_leftovers = 0
    for out in (tmp_path / name for name in ends):
        with_leftovers += any(".tmp-" in path for path in files(out))
        wrong = find_wrong_images(out)
        assert recover(out) == wrong, "images that were published but not committed have replaced them"
        assert not [path for path in files(out) if ".tmp-" in path or ".damaged" in path]
        commit_twice(out)
        assert files(out) == want, out.name
    assert with_leftovers > 5


def test_an_uncommitted_image_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is rendered again under the same name."""
    sink = FolderSink(tmp_path)
    commit(tmp_path, result(sink, "a"))
    sink.publish([str(result(sink, "b", b"settled").generated_image)], no_rows)
    result(sink, "aa", b"written")
    with caplog.at_level(logging.WARNING):
        assert recover(tmp_path) == frozenset()
    assert not caplog.records
    commit(tmp_path, result(sink, "b", b"again"))
    images = {name: content for name, content in files(tmp_path).items() if name.startswith("images/")}
    assert images == {"images/t-00000/a-0.png": b"pixels", "images/t-00000/b-0.png": b"again"}


def test_an_out_without_a_manifest_is_recovered(tmp_path: Path) -> None:
    assert recover(tmp_path) == frozenset()
    assert list(tmp_path.iterdir()) == []


def test_recent_lost_images_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Older images are not checked."""
    sink, early = FolderSink(tmp_path), NOW - recovery.RECENT_SECONDS
    rows = [*(result(sink, name) for name in ("a whole", "a gone", "a short", "another"))]
    commit(tmp_path, *rows, result(sink, "a failure", None, status="failed"))
    commit(tmp_path, result(sink, "a recent"), at=early)
    commit(tmp_path, result(sink, "an old"), at=early - 0.001)
    outside = result(sink, "an outside", None, generated_image="../x.png", sha256="0", image_bytes=1)
    with mock.patch("batch_infer.manifest.manifest.monotonic", lambda: NOW):
        Manifest(tmp_path).commit([outside], NONE)
    commit(tmp_path, result(sink, "an older"), at=NOW - 7200)
    folder = tmp_path / "images" / "t-00000"
    for name in ("a gone", "a recent", "an old", "an older"):
        (folder / f"{name}-0.png").unlink()
    (folder / "a short-0.png").write_bytes(b"pix")
    (folder / "another-0.png").write_bytes(b"slexip")
    with caplog.at_level(logging.WARNING):
        missing = recover(tmp_path)
    assert missing == {(name, 0) for name in ("a gone", "a short", "another", "a recent", "an outside")}
    assert f"5 committed images are missing or damaged and must be rendered again; the first is {tmp_path}/" in (
        caplog.text
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE])
def test_an_unreadable_image_is_an_error(tmp_path: Path, number: int) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"x")
    fault = OSError(number, os.strerror(number))
    with mock.patch.object(os, "open", side_effect=fault), pytest.raises(StorageError, match="cannot read .*a"):
        recovery.is_intact(FolderSink(tmp_path), "images/a.png", "sum", 1)
    with mock.patch.object(os, "open", side_effect=OSError(errno.EIO, "")):
        assert not recovery.is_intact(FolderSink(tmp_path), "images/a.png", "sum", 1), (
            "EIO means that the image is damaged on disk"
        )


def test_the_image_of_the_last_attempt_is_checked(tmp_path: Path) -> None:
    sink = FolderSink(tmp_path)
    for attempt in (2, 3, 1):
        row = result(sink, "a", f"{attempt}".encode(), attempt=attempt)
        Manifest(tmp_path).commit([row], NONE)
        if attempt == 3:
            sink.publish([str(row.generated_image)], no_rows)
    assert recover(tmp_path) == frozenset()
    (tmp_path / "images/t-00000/a-0.png").write_bytes(b"2")
    assert recover(tmp_path) == {("a", 0)}


@pytest.mark.parametrize("damage", ["empty", "cut", "late column"])
def test_damaged_parts_are_set_aside_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    sink = FolderSink(tmp_path)
    intact = commit(tmp_path, result(sink, "b"))
    part = commit(tmp_path, result(sink, "a", scheduler=LONG))
    content = part.read_bytes()
    bad = {"empty": b"", "cut": content[:-7], "late column": garbled(content)}[damage]
    for name in (f"{part.name}.damaged", f"{part.name}.damaged-2"):  # the part is damaged twice
        part.write_bytes(bad)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert recover(tmp_path) == frozenset()
        assert f"{part} is damaged (" in caplog.text
        assert f"its rows are rendered again, and it is kept as {name}" in caplog.text
        assert part.with_name(name).read_bytes() == bad
        assert [part.name for part in Manifest(tmp_path).parts()] == [intact.name]
        with Manifest(tmp_path).index() as index:
            assert index.find(("a", 0)) is None
        assert commit(tmp_path, result(sink, "a", scheduler=LONG)) == part


def garbled(content: bytes) -> bytes:
    """Replace a value by another one of the same length, which Parquet does not detect."""
    at = content.index(LONG[:10].encode())
    return content[:at] + b"98765" + content[at + 5 :]


def test_damage_outside_indexed_columns_is_set_aside_too(tmp_path: Path) -> None:
    """Recovery does not read old parts in full. A later read of other columns, or the index, detects the damage."""
    sink = FolderSink(tmp_path)
    part = commit(tmp_path, result(sink, "a", scheduler=LONG), at=NOW - 40_000)
    content = part.read_bytes()
    commit(tmp_path, result(sink, "b"))
    part.write_bytes(garbled(content))
    assert recover(tmp_path) == frozenset()
    with Manifest(tmp_path).index() as index:
        committed = index.find(("a", 0))
        assert committed is not None
        with pytest.raises(DamagedPartError) as error:
            index.read_results([committed])
    store = LocalStore(tmp_path)
    assert store.exists(set_aside(store, error.value))
    part.write_bytes(content[:100])
    with Manifest(tmp_path).index(on_damage=partial(set_aside, store)) as index:
        assert index.find(("a", 0)) is None
        assert index.find(("b", 0)) is not None
    assert not part.exists()


def test_old_parts_and_their_images_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = FolderSink(tmp_path)
    for hours in range(1, 6):
        commit(tmp_path, result(sink, f"a{hours}"), at=NOW - 3600 * hours)
    commit(tmp_path, result(sink, "a"))
    read: list[object] = []
    real_part, real_whole = vars(recovery)["read_part"], vars(recovery)["is_intact"]

    def read_part(part: Path, *columns: Any) -> pa.Table:
        read.append(columns)
        return real_part(part, *columns)

    def is_whole(sink: Sink, path: str, *message: Any) -> bool:
        read.append(path)
        return bool(real_whole(sink, path, *message))

    monkeypatch.setattr(recovery, "read_part", read_part)
    monkeypatch.setattr(recovery, "is_intact", is_whole)
    assert recover(tmp_path) == frozenset()
    assert read == [(), "images/t-00000/a-0.png"]


def test_setting_the_clock_back_does_not_hide_recent_parts(tmp_path: Path) -> None:
    """The last commit is checked although its time of day is earlier."""
    sink = FolderSink(tmp_path)
    commit(tmp_path, result(sink, "a"), at=NOW - 700)
    commit(tmp_path, result(sink, "b", finished_at=END - timedelta(days=1)))
    for name in "ab":
        (tmp_path / f"images/t-00000/{name}-0.png").write_bytes(b"lost")
    assert recover(tmp_path) == {("b", 0)}


def test_each_machine_has_its_own_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = FolderSink(tmp_path)
    commit(tmp_path, result(sink, "a"))
    monkeypatch.setattr("batch_infer.manifest.manifest.host_id", lambda: "elsewhere")
    commit(tmp_path, result(sink, "b"), at=7.0)
    for name in "ab":
        (tmp_path / f"images/t-00000/{name}-0.png").write_bytes(b"lost")
    assert recover(tmp_path) == {("a", 0), ("b", 0)}


def test_runs_before_the_last_clean_one_are_not_checked(tmp_path: Path) -> None:
    sink = FolderSink(tmp_path)
    for run, name in enumerate("abc", 1):
        commit(tmp_path, result(sink, name), run=run)
        (tmp_path / f"images/t-0000{name > 'b':d}/{name}-0.png").write_bytes(b"lost")
    assert recover(tmp_path, since_run=2) == {("b", 0), ("c", 0)}


if __name__ == "__main__":
    die_everywhere(Path(sys.argv[1]))
