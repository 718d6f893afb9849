"""Render a task in local worker processes with a dummy chain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_infer.engines import Engine, Task, TaskReport
from batch_infer.engines.handle import Timeouts
from batch_infer.engines.local import LocalEngine
from batch_infer.manifest import Manifest
from batch_infer.models import read_card
from batch_infer.records import PromptRequest, ResultRow
from batch_infer.settings import Compute, ModelSettings, OutputSettings, SafetySettings
from batch_infer.store import LocalStore
from batch_infer.worker import WorkerSettings
from tests import dummies
from tests.rendering import make_request
from tests.runs import images

DEFAULT_TIMEOUTS = Timeouts()


@dataclass
class EngineRun:
    """Runs a task, and collects the rows that the engine reports as committed."""

    out: Path
    prompts: Sequence[str]
    processes: int = 2
    load: Any = dummies.load
    timeouts: Timeouts = DEFAULT_TIMEOUTS
    committed: list[ResultRow] = field(default_factory=list)

    def run(self, stop: Callable[[], bool] = lambda: False) -> TaskReport:
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        settings = WorkerSettings(
            card=read_card(ModelSettings()),
            compute=Compute("cpu", "float32", 16, 8, 1),
            safety=SafetySettings("none"),
            output=OutputSettings(),
            out=LocalStore(self.out).address,
            carried=pa.schema([("tag", pa.string())]),
        )
        requests = [self._request(k, prompt) for k, prompt in enumerate(self.prompts)]
        with self.make_engine() as engine:
            assert engine.detect_device().kind == "cpu"
            return engine.render(Task(iter(requests), len(requests), settings), self.committed.extend, stop)

    def make_engine(self) -> Engine:
        return LocalEngine("cpu", self.processes, timeouts=self.timeouts, load=self.load)

    def _request(self, number: int, prompt: str) -> PromptRequest:
        row = make_request(f"{number}", prompt, seed=number, size=(16, 16))
        return replace(row, carried={"tag": prompt})

    def rows(self) -> dict[str, dict[str, Any]]:
        """Return committed rows by id. Rows that two workers committed are equal."""
        rows: dict[str, dict[str, Any]] = {}
        for part in Manifest(self.out).parts():
            for row in pq.read_table(str(part)).to_pylist():
                before = rows.setdefault(row["id"], row)
                assert (before["status"], before["sha256"]) == (row["status"], row["sha256"])
        return rows

    def assert_accounted(self, *failed: int) -> None:
        """Assert that every row is reported once, that only rows `failed` have failed, and that the images exist."""
        rows = self.rows()
        assert Counter(row.id for row in self.committed) == Counter(str(k) for k in range(len(self.prompts)))
        assert {int(name) for name, row in rows.items() if row["status"] == "failed"} == set(failed)
        assert {int(name) for name, row in rows.items() if row["status"] == "ok"} == (
            set(range(len(self.prompts))) - set(failed)
        )
        assert all(row["tag"] == self.prompts[int(name)] for name, row in rows.items())
        kept = {path for path in images(self.out) if "/.tmp-" not in path}
        assert kept == {row["generated_image"] for row in rows.values() if row["status"] == "ok"}
