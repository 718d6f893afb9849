"""Compare a Ray cluster with local workers while actors are killed: `python -m tests.ray_soak`.

Prints one JSON object: rows per second of both engines, with as many workers that render the same rows at no cost, and
of actors of which some are killed. The rates count the time from the first worker's readiness to the end of the last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
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

    prompts = ["a"] * rows
    figures: dict[str, Any] = {"rows": rows, "workers": workers, "kills": kills}
    local_run = EngineRun(folder / "local", prompts, workers, light_worker.load)
    figures["local"] = round(rows / local_run.run().seconds, 1)
    local_run.assert_accounted()
    with simulated_cluster(workers) as cluster:
        ray_run = RayRun(folder / "ray", prompts, workers, light_worker.load, address=cluster.address)
        figures["ray"] = round(rows / ray_run.run().seconds, 1)
        ray_run.assert_accounted()
        killed_run = RayRun(folder / "killed", prompts, workers, light_worker.load, address=cluster.address)
        killer = Killer(killed_run, kills)
        report = killed_run.run(killer)
        figures["ray_with_kills"], figures["deaths"] = round(rows / report.seconds, 1), report.deaths
        killed_run.assert_accounted()
    assert len(killer.killed) == kills
    return figures


class Killer:
    """Kills random actors that have committed rows, spread over the run. It is called as the `stop` of a run."""

    def __init__(self, run: EngineRun, kills: int) -> None:
        self._run, self._kills, self._draw = run, kills, random.Random(0)
        self._seen, self._pids = 0, set[int]()
        self.killed: list[int] = []

    def __call__(self) -> bool:
        committed = self._run.committed
        self._pids |= {int(str(row.worker).split("-")[-2]) for row in committed[self._seen :]}
        self._seen = len(committed)
        # Rows that a kill interrupts are retried last. They stay few if the kills end before most rows are rendered.
        due = self._kills * 2 * self._seen // len(self._run.prompts)
        if self._pids and len(self.killed) < min(due, self._kills):
            self.killed.append(self._draw.choice(sorted(self._pids)))
            self._pids.remove(self.killed[-1])
            os.kill(self.killed[-1], signal.SIGKILL)
        return False


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
