"""Choose the engine that renders a run."""

from __future__ import annotations

import os
from importlib.util import find_spec

from batch_infer.engines.launched import LaunchedEngine, RankInfo
from batch_infer.engines.local import LocalEngine
from batch_infer.engines.protocol import Engine
from batch_infer.engines.ray_engine import RayEngine
from batch_infer.engines.remote import with_absolute_paths
from batch_infer.errors import SettingsError
from batch_infer.extras import install_command
from batch_infer.settings import RunSettings
from batch_infer.store import Store


def check_engine(settings: RunSettings, rank_info: RankInfo | None) -> None:
    """Raise SettingsError if `--engine` conflicts with another option or a launcher, or needs a missing library."""
    compute = settings.compute
    if rank_info is not None and compute.processes not in (None, rank_info.world_size):
        raise SettingsError(
            f"--num-processes {compute.processes}: a launcher has started {rank_info.world_size} processes; leave the "
            "option out"
        )
    if compute.engine != "ray":
        if compute.ray_address is not None:
            raise SettingsError(f"--ray-address {compute.ray_address} has no effect without --engine ray")
        return
    if rank_info is not None:
        raise SettingsError("--engine ray does not run under a launcher: start the command once, by itself")
    if compute.processes == 0:
        raise SettingsError("--num-processes 0 renders in the command's own process: leave --engine ray out")
    if compute.slots == "auto":
        raise SettingsError("--slots auto measures this machine, not the nodes of --engine ray: give a number")
    if "://" in (compute.ray_address or os.environ.get("RAY_ADDRESS") or ""):
        raise SettingsError(
            "--engine ray does not work through Ray Client (ray://): run the command on a node of the cluster, for "
            "example with `ray job submit`"
        )
    if find_spec("ray") is None:
        raise SettingsError(f"--engine ray needs ray: {install_command('ray')}")


def make_engine(settings: RunSettings, threads: int, rank_info: RankInfo | None, store: Store) -> Engine:
    """Return the engine for the settings, or for the launcher that started this process.

    `threads` is the number of CPUs that each worker reserves on a Ray cluster.
    """
    device, compute = settings.model.device, settings.compute
    if rank_info is not None:
        return LaunchedEngine(device, rank_info, store)
    if compute.engine == "ray":
        # Read when ray is imported. Under `uv run`, Ray would otherwise upload the working folder to all nodes.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        from batch_infer.engines.ray import RayCluster

        cluster, model = RayCluster(compute.ray_address), with_absolute_paths(settings.model)
        return RayEngine(cluster, model, compute.processes, threads)
    if compute.processes == 0:
        from batch_infer.engines.inline import InlineEngine  # imports torch, which the other engines do not need

        return InlineEngine(device)
    return LocalEngine(device, compute.processes)
