"""Engines: who hands requests to workers.

This package imports no torch before `Inline` is used: a process that only supervises workers stays small.
"""

from typing import TYPE_CHECKING

from batch_infer.engines.launched import Launched, RankInfo, join, place, remove_note
from batch_infer.engines.local import Local
from batch_infer.engines.protocol import Engine, Task, TaskReport
from batch_infer.lazy import import_on_use

if TYPE_CHECKING:
    from batch_infer.engines.inline import Inline
else:
    __getattr__ = import_on_use(
        __name__,
        inline=("Inline",),
    )

__all__ = [
    "Engine",
    "Inline",
    "Launched",
    "Local",
    "RankInfo",
    "Task",
    "TaskReport",
    "join",
    "place",
    "remove_note",
]
