"""Render a task on a Ray cluster of simulated nodes on this machine, with a model without torch."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_infer.engines import Engine
from batch_infer.engines.ray import RayCluster
from batch_infer.engines.ray_engine import RayEngine
from batch_infer.settings import ModelSettings
from tests import light_worker
from tests.engine_runs import EngineRun

ACTOR = b"ray::Actor"
"""Start of the command line of an actor's process."""


@contextmanager
def simulated_cluster(*cpus: int) -> Iterator[Any]:
    """Start a cluster with a node for each number of CPUs, besides a head node without any."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=0, include_dashboard=False)
        for number in cpus:
            cluster.add_node(num_cpus=number)
        yield cluster
    finally:
        cluster.shutdown()


@dataclass
class RayRun(EngineRun):
    """Runs a task in actors."""

    processes: int | None = None  # type: ignore[assignment]
    load: Any = light_worker.load
    address: str = ""

    def make_engine(self) -> Engine:
        cluster = RayCluster(self.address)
        return RayEngine(
            cluster, ModelSettings(device="cpu"), self.processes, 1, timeouts=self.timeouts, load=self.load
        )


def actors() -> list[int]:
    """Return the process ids of all actors on this machine."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(ACTOR):
                pids.append(int(path.parent.name))
        except OSError:  # the process has just ended
            pass
    return pids


def actors_of(node: Any) -> list[int]:
    """Return the process ids of the actors on a simulated node, whose raylet is their parent."""
    (raylet,) = node.all_processes["raylet"]
    return [pid for pid in actors() if _parent(pid) == raylet.process.pid]


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
