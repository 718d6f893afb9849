"""Small manifest parts are combined: no row is lost, doubled or read twice, however the process ends."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_infer.errors import StorageError
from batch_infer.jobs.checksums import write_checksums
from batch_infer.jobs.compaction import Compaction
from batch_infer.manifest import Manifest, commit_time, compaction, read_part, run_number
from batch_infer.manifest.parts import open_part
from batch_infer.records import ResultRow
from batch_infer.store import open_store
from tests.deaths import die_at
from tests.runs import results, run
from tests.tables import write_csv

NONE = pa.schema([])
START = datetime(2026, 1, 2, tzinfo=timezone.utc)


def row(name: str, **values: Any) -> ResultRow:
    defaults = {"image_index": 0, "prompt": name, "status": "ok", "source_file": "t.csv", "source_row": int(name[1:])}
    return ResultRow(**{"id": name, "finished_at": START, "fingerprint": "f", **defaults, **values})


def commit(out: Path, *rows: ResultRow, run: int = 1, at: float = 10.0, carried: pa.Schema = NONE) -> None:
    with mock.patch("batch_infer.manifest.manifest.monotonic", lambda: at):
        Manifest(out, run).commit(rows, carried)


def read_all(out: Path) -> list[dict[str, Any]]:
    """Return the latest results in table order."""
    with Manifest(out).index() as index:
        images = list(index.iterate_in_table_order([]))
        return [{**line, "failures": image.failures} for image, line in
                zip(images, index.read_results(images).to_pylist(), strict=True)]  # fmt: skip


def part_sizes(out: Path) -> dict[int, list[int]]:
    """Return the numbers of rows of the parts of each run."""
    sizes: dict[int, list[int]] = {}
    for part in Manifest(out).parts():
        sizes.setdefault(run_number(part), []).append(len(read_part(part)))
    return {number: sorted(rows) for number, rows in sizes.items()}


def test_small_parts_become_few_and_rows_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "COMPACTED_ROWS", 8)
    for number in range(20):
        commit(tmp_path, row(f"a{number}", seed=number), at=number)
    before = read_all(tmp_path)
    assert Manifest(tmp_path).compact(1) == 17
    assert part_sizes(tmp_path) == {1: [4, 8, 8]}
    assert read_all(tmp_path) == before
    ids = [set(read_part(part)["id"].to_pylist()) for part in Manifest(tmp_path).parts()]
    assert {f"a{number}" for number in range(8)} in ids, "rows that were committed together stay together"
    commit(tmp_path, row("a20"), at=20)
    assert Manifest(tmp_path).compact(1) == 1
    assert part_sizes(tmp_path) == {1: [5, 8, 8]}, "full parts are not written again"


def test_attempts_and_failures_keep_their_count(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        commit(tmp_path, row("a1", status="failed", attempt=attempt), row("a2", attempt=attempt, seed=attempt))
    before = read_all(tmp_path)
    assert [(line["failures"], line["attempt"]) for line in before] == [(3, 3), (0, 3)]
    assert Manifest(tmp_path).compact(1) == 2
    assert read_all(tmp_path) == before


def test_the_number_of_a_run_and_the_time_of_its_last_commit_stay(tmp_path: Path) -> None:
    for number, at in itertools.product((1, 2, 3, 4), (10.0, 20.0)):
        commit(tmp_path, row(f"a{number}{at:.0f}"), run=number, at=number + at)
    assert Manifest(tmp_path).compact(first_active_run=3) == 5
    assert part_sizes(tmp_path) == {1: [4], 3: [2], 4: [2]}, "earlier runs share a part under the lowest number"
    assert [commit_time(part)[1] for part in Manifest(tmp_path).parts()] == [22.0, 23.0, 24.0]


def test_unlike_parts_stay_apart(tmp_path: Path) -> None:
    """Parts of endpoints, with other carried columns, of another clock, or damaged."""
    for name in ("a1", "a2"):
        commit(tmp_path, row(name), run=0)
        commit(tmp_path, row(f"{name}0", carried={"n": 1}), carried=pa.schema([("n", pa.int64())]))
        commit(tmp_path, row(f"{name}1", carried={"n": "x"}), carried=pa.schema([("n", pa.string())]))
    with mock.patch("batch_infer.manifest.manifest.host_id", lambda: "elsewhere"):
        commit(tmp_path, row("a3", carried={"n": 1}), carried=pa.schema([("n", pa.int64())]))
    commit(tmp_path, row("a4"))
    *_, damaged = sorted((tmp_path / "manifest").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    damaged.write_bytes(b"PAR1")
    assert Manifest(tmp_path).compact(1) == 2
    assert part_sizes_of_readable(tmp_path) == [1, 1, 1, 2, 2]
    assert damaged.read_bytes() == b"PAR1"


def part_sizes_of_readable(out: Path) -> list[int]:
    return sorted(len(read_part(part)) for part in Manifest(out).parts() if part.store.read(part.path) != b"PAR1")


def test_of_two_rows_with_one_attempt_the_later_stays(tmp_path: Path) -> None:
    """Two workers commit the same attempt if one of them is lost."""
    late = START + timedelta(seconds=1)
    commit(tmp_path, row("a1", seed=1, finished_at=late), row("a2"), at=1)
    commit(tmp_path, row("a1", seed=2), row("a3"), at=2)
    before = read_all(tmp_path)
    assert Manifest(tmp_path).compact(1) == 1
    assert part_sizes(tmp_path) == {1: [3]}
    assert read_all(tmp_path) == before
    assert [line["seed"] for line in before] == [1, None, None]


def test_a_changed_part_of_an_earlier_run_is_left_to_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Combining it would hide the change."""
    monkeypatch.setattr("batch_infer.jobs.compaction.COMPACTION_PARTS", 1)
    store = open_store(tmp_path)
    for number in range(4):
        commit(tmp_path, row(f"a{number}"))
    first, *_ = Manifest(store).parts()
    write_checksums(store, {})
    pq.write_table(pq.ParquetFile(str(first)).read(), str(first), compression="none")
    job = Compaction(Manifest(store), 2)
    job.count_part()
    job.wait()
    assert part_sizes(tmp_path) == {1: [1, 1, 1, 1]}, "while a run renders, parts of earlier runs stay"
    job.finish()
    job.close()
    assert part_sizes(tmp_path) == {1: [1, 3]}
    assert store.exists(first.path)


def test_large_rows_end_a_part_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "COMPACTED_BYTES", 3000)
    for number in range(6):
        commit(tmp_path, row(f"a{number}", prompt="x" * 1000))
    Manifest(tmp_path).compact(1)
    assert part_sizes(tmp_path) == {1: [3, 3]}


def die_everywhere(source: Path, root: Path) -> Iterator[tuple[Path, int]]:
    """Compact a copy of OUT in a new process for each step at which it can be killed, until one finishes."""
    for step in itertools.count(1):
        out = root / str(step)
        shutil.copytree(source, out)
        child = os.fork()
        if child == 0:
            die_at(step)
            Manifest(out).compact(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        yield out, code
        if code == 0:
            return


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_kill_at_any_step_loses_and_doubles_nothing(tmp_path: Path) -> None:
    source = tmp_path / "out"
    source.mkdir()
    for number in range(4):
        commit(source, row(f"a{number}"), row("a9", status="failed", attempt=number + 1))
    want, killed = read_all(source), 0
    for out, code in die_everywhere(source, tmp_path / "copies"):
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        assert read_all(out) == want
        for part in (out / "manifest").glob(".tmp-*"):
            part.unlink()
        Manifest(out).compact(1)
        assert read_all(out) == want
        assert part_sizes(out) == {1: [8]}
    assert killed >= 4


def test_parts_that_disappear_while_they_are_indexed_are_found_in_others(tmp_path: Path) -> None:
    """`status` and `diff` do not lock OUT."""
    for number in range(4):
        commit(tmp_path, row(f"a{number}"))
    opened: list[str] = []

    def open_and_compact(part: Any) -> Any:
        opened.append(part.name)
        if len(opened) == 2:
            with mock.patch("batch_infer.manifest.parts.open_part", open_part):
                Manifest(tmp_path).compact(1)
        return open_part(part)

    with mock.patch("batch_infer.manifest.parts.open_part", open_and_compact), Manifest(tmp_path).index() as index:
        assert index.count_statuses() == {"ok": 4}
        assert index.count_rows() == (4, 0)
    assert len(opened) == 5, "two of the four parts were removed before they were read, and one was new"


def test_a_listing_that_misses_a_new_part_and_those_it_replaces_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is not listed atomically."""
    for number in range(4):
        commit(tmp_path, row(f"a{number}"))
    list_parts = Manifest.parts
    Manifest(tmp_path).compact(1)
    commit(tmp_path, row("a4"))
    (new,) = [part for part in list_parts(Manifest(tmp_path)) if len(read_part(part)) == 1]
    first = iter([[new]])
    monkeypatch.setattr(Manifest, "parts", lambda *given: next(first, None) or list_parts(*given))
    with Manifest(tmp_path).index() as index:
        assert index.count_rows() == (5, 0)


def test_a_list_of_parts_that_do_not_exist_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may list a folder as it was, without the part that has their rows now."""
    for number in range(2):
        commit(tmp_path, row(f"a{number}"))
    parts = Manifest(tmp_path).parts()
    Manifest(tmp_path).compact(1)
    monkeypatch.setattr(Manifest, "parts", lambda *_: parts)
    with pytest.raises(StorageError, match="lists parts that do not exist"):
        Manifest(tmp_path).index()


def test_copies_of_the_rows_of_a_part_are_removed(tmp_path: Path) -> None:
    """The name of a part is a digest of its keys, so the part that combines it with copies has the same name."""
    commit(tmp_path, row("a1"), row("a2"), at=1)
    (whole,) = Manifest(tmp_path).parts()
    before = (tmp_path / whole.path).read_bytes()
    commit(tmp_path, row("a2"), at=2)
    assert Manifest(tmp_path).compact(1) == 1
    assert {part.name: (tmp_path / part.path).read_bytes() for part in Manifest(tmp_path).parts()} == {
        whole.name: before
    }


def test_failures_count_since_the_last_success(tmp_path: Path) -> None:
    for attempt, status in enumerate(("failed", "failed", "ok", "failed"), 1):
        commit(tmp_path, row("a1", status=status, attempt=attempt))
    assert [line["failures"] for line in read_all(tmp_path)] == [1]


def test_a_full_disk_only_leaves_many_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        commit(tmp_path, row(f"a{number}"))
    job = Compaction(Manifest(tmp_path), 1)
    with (
        mock.patch("batch_infer.jobs.compaction.COMPACTION_PARTS", 1),
        mock.patch("batch_infer.manifest.compaction.write_part", side_effect=StorageError("the disk is full")),
    ):
        job.count_part()
        job.finish()
    job.close()
    assert (
        "small manifest parts were not combined, which only makes later commands slower: the disk is full"
        in caplog.text
    )
    assert part_sizes(tmp_path) == {1: [1, 1, 1]}


@pytest.mark.usefixtures("probe_here")
def test_a_run_leaves_few_parts(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It combines them while it renders and before it merges, and continues from them."""
    monkeypatch.setattr("batch_infer.jobs.compaction.COMPACTION_PARTS", 2)
    monkeypatch.setattr("batch_infer.worker.committing.COMMIT_ROWS", 1)
    rows = [["prompt"], *([f"a red circle {number}"] for number in range(12))]
    table = write_csv(tmp_path / "t.csv", rows)
    assert run(table, out).code == 0
    (sizes,) = part_sizes(out).values()
    assert (len(sizes) <= 2, sum(sizes)) == (True, 12)
    assert len(results(out)) == 12
    write_csv(table, [*rows, ["a blue star"], ["a blue square"], ["a blue ring"]])
    assert run(table, out, "--num-processes", "1").code == 0
    assert sum(map(sum, part_sizes(out).values())) == 15
    assert len(results(out)) == 15


def test_combined_parts_are_in_the_store_of_out(tmp_path: Path) -> None:
    """The file has the format of any other part."""
    for number in range(2):
        commit(tmp_path, row(f"a{number}"))
    store = open_store(tmp_path)
    Manifest(store).compact(1)
    (part,) = Manifest(store).parts()
    metadata = pq.read_schema(str(part)).metadata
    assert sorted(metadata) == [b"batch-infer-columns", b"batch-infer-committed"]
