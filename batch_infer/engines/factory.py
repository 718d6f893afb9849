"""Choose the engine that renders a run."""

from __future__ import annotations

from batch_infer.engines.launched import LaunchedEngine, RankInfo
from batch_infer.engines.local import LocalEngine
from batch_infer.engines.protocol import Engine
from batch_infer.store import Store


def make_engine(device: str, processes: int | None, rank_info: RankInfo | None, store: Store) -> Engine:
    """Return the engine for `--device` and `--num-processes`, or for the launcher that started this process."""
    if rank_info is not None:
        return LaunchedEngine(device, rank_info, store)
    if processes == 0:
        from batch_infer.engines.inline import InlineEngine  # imports torch, which the other engines do not need

        return InlineEngine(device)
    return LocalEngine(device, processes)
