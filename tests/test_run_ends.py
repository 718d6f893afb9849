"""Runs that end early, or whose manifest lists too few parts, lose no committed result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batch_infer.jobs import execution
from batch_infer.manifest import Manifest
from batch_infer.records import PromptRequest, ResultRow
from batch_infer.store import StoredFile
from batch_infer.worker.worker import Worker
from tests.paced import MODULE
from tests.runs import results, run, start, wait_for
from tests.tables import write_csv


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "t.csv", [["prompt"], *([f"a red circle, {k}"] for k in range(6))])


def test_a_bug_in_a_worker_loses_no_committed_result(table: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Worker.render

    def broken(
        self: Worker, requests: Iterable[PromptRequest], committed: Callable[[Sequence[ResultRow]], None]
    ) -> None:
        work(self, islice(requests, 2), committed)
        raise RuntimeError("a bug")

    monkeypatch.setattr(Worker, "render", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(table, out)
    assert len(results(out)) == 2
    monkeypatch.undo()
    assert run(table, out).code == 0
    assert len(results(out)) == 6


@pytest.mark.promises
def test_finished_images_are_committed_without_waiting_for_others(table: Path, out: Path) -> None:
    """Rows that finish together are committed while the device renders the next ones."""

    def committed() -> int:
        return sum(pq.read_metadata(part).num_rows for part in (out / "manifest").glob("part-*.parquet"))

    with start(table, out, program=MODULE, PACE_HOLD="4", PACE_ROWS="256") as process:
        assert wait_for(process, lambda: committed() == 4)
        process.kill()
        process.communicate()


def hide_parts(monkeypatch: pytest.MonkeyPatch, listings: int) -> None:
    """Make a number of manifest listings miss the last part, like a stale directory on a network file system."""
    parts, left = Manifest.parts, [listings]

    def stale(self: Manifest, since_run: int = 0) -> list[StoredFile]:
        listed = parts(self, since_run)
        if not listed or not left[0]:
            return listed
        left[0] -= 1
        return listed[:-1]

    monkeypatch.setattr(Manifest, "parts", stale)


def test_a_manifest_that_lists_too_few_parts_is_not_merged(
    table: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(table, out, "--limit", "2").code == 0
    before = (out / "results.parquet").read_bytes()
    monkeypatch.setattr(execution, "LISTING_SECONDS", ())
    hide_parts(monkeypatch, 1_000)
    done = run(table, out)
    assert done.code == 75
    assert "were committed: its folder does not list all parts yet" in done.stderr
    assert (out / "results.parquet").read_bytes() == before


def test_the_manifest_is_listed_again_until_all_parts_appear(
    table: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "LISTING_SECONDS", (0.0, 0.0))
    hide_parts(monkeypatch, 2)
    assert run(table, out).code == 0
    assert len(results(out)) == 6
