"""Send the rows of a run to workers, replace workers that die where possible, and account for every row.

An engine renders in the command's own process, in local worker processes, in the processes of a launcher, or in the
actors of a Ray cluster.
"""

from batch_infer.engines.factory import check_engine, make_engine
from batch_infer.engines.launched import LaunchedEngine, RankInfo, join_launch, read_rank_info
from batch_infer.engines.protocol import Engine, Task, TaskReport
from batch_infer.engines.rendezvous import remove_rendezvous

__all__ = [
    "Engine",
    "LaunchedEngine",
    "RankInfo",
    "Task",
    "TaskReport",
    "check_engine",
    "join_launch",
    "make_engine",
    "read_rank_info",
    "remove_rendezvous",
]
