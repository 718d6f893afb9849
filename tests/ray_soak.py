"""Compare a Ray cluster with local workers while actors are killed: `python -m tests.ray_soak`.

Prints one JSON object: rows per second of both engines, with as many workers that render the same rows at no cost, and
of actors of which some are killed. The rates of whole runs include the time in which the other workers start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.engine_runs import EngineRun


def measure(rows: int, workers: int, kills: int, folder: Path) -> dict[str, Any]:
    """Render the rows locally and twice on Ray, the second time with kills. Every row must have one result."""
    # Imported here, since local workers import this module too, and most of these modules import torch.
    from tests import light_worker
    from tests.engine_runs import EngineRun
    from tests.ray_runs import RayRun, simulated_cluster

    prompts, load = ["a"] * rows, light_worker.load
    figures: dict[str, Any] = {"rows": rows, "workers": workers, "kills": kills}
    figures["local"] = _run(EngineRun(folder / "local", prompts, workers, load), 0)
    with simulated_cluster(workers) as cluster:
        figures["ray"] = _run(RayRun(folder / "ray", prompts, workers, load, address=cluster.address), 0)
        figures["killed"] = _run(RayRun(folder / "killed", prompts, workers, load, address=cluster.address), kills)
    return figures


def _run(run: EngineRun, kills: int) -> dict[str, Any]:
    """Render, and return the rows per second of the whole run, and those since every worker has committed rows."""
    observer = Observer(run, kills)
    report = run.run(observer)
    run.assert_accounted()
    assert len(observer.killed) == kills
    steady = {} if kills else {"steady_rows_per_second": round(observer.rate(), 1)}
    return {"rows_per_second": round(len(run.prompts) / report.seconds, 1), **steady, "deaths": report.deaths}


class Observer:
    """Measures a run, and kills random workers that have committed rows. It is called as the `stop` of the run."""

    def __init__(self, run: EngineRun, kills: int) -> None:
        self._run, self._kills, self._draw = run, kills, random.Random(0)
        self._seen, self._pids = 0, set[int]()
        self._samples: list[tuple[float, int]] = []
        self.killed: list[int] = []

    def __call__(self) -> bool:
        committed = self._run.committed
        new_rows, self._seen = committed[self._seen :], len(committed)
        self._pids |= {int(str(row.worker).split("-")[-2]) for row in new_rows}
        if new_rows and len(self._pids) == self._run.processes:
            self._samples = [*self._samples[:1], (time.monotonic(), self._seen)]
        # Rows that a kill interrupts are retried last. They stay few if the kills end before most rows are rendered.
        due = min(self._kills, self._kills * 2 * self._seen // len(self._run.prompts))
        if self._pids and len(self.killed) < due:
            self.killed.append(self._draw.choice(sorted(self._pids)))
            self._pids.remove(self.killed[-1])
            os.kill(self.killed[-1], signal.SIGKILL)
        return False

    def rate(self) -> float:
        """Return the rows per second from when each worker had committed rows to the last commit."""
        (start, first), (end, last) = self._samples
        return (last - first) / (end - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--kills", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options.rows, options.workers, options.kills, Path(folder))))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
