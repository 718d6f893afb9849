"""Engines: who hands requests to workers.

This package imports no torch before `Inline` is used: a process that only supervises workers stays small.
"""

from typing import TYPE_CHECKING

from batch_infer.engines.launched import LaunchedEngine, RankInfo, join_launch, read_rank_info, remove_rendezvous
from batch_infer.engines.local import LocalEngine
from batch_infer.engines.protocol import Engine, Task, TaskReport
from batch_infer.lazy import import_on_use

if TYPE_CHECKING:
    from batch_infer.engines.inline import InlineEngine
else:
    __getattr__ = import_on_use(
        __name__,
        inline=("InlineEngine",),
    )

__all__ = [
    "Engine",
    "InlineEngine",
    "LaunchedEngine",
    "LocalEngine",
    "RankInfo",
    "Task",
    "TaskReport",
    "join_launch",
    "read_rank_info",
    "remove_rendezvous",
]
