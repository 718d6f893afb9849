"""A worker: one device, requests in, committed results out.

This file, `committing`, `contract` and `memory` import no torch, so that the process that only watches over workers
does not either.
"""

from typing import TYPE_CHECKING

from batch_infer.lazy import import_on_use
from batch_infer.worker.committing import commit_images
from batch_infer.worker.contract import WorkerReport, WorkerSettings, least, together
from batch_infer.worker.memory import peak_memory
from batch_infer.worker.rows import row_of, why_flagged, with_file, with_verdict, worker_name

if TYPE_CHECKING:
    from batch_infer.worker.device import AnyChain, LoadChain, Worker
    from batch_infer.worker.loading import load_any_model, load_chain, load_judge, load_model, make_chain, prepare_torch
else:
    __getattr__ = import_on_use(
        __name__,
        device=(
            "AnyChain",
            "LoadChain",
            "Worker",
        ),
        loading=(
            "load_any_model",
            "load_chain",
            "load_judge",
            "load_model",
            "make_chain",
            "prepare_torch",
        ),
    )

__all__ = [
    "AnyChain",
    "LoadChain",
    "Worker",
    "WorkerReport",
    "WorkerSettings",
    "commit_images",
    "least",
    "load_any_model",
    "load_chain",
    "load_judge",
    "load_model",
    "make_chain",
    "peak_memory",
    "prepare_torch",
    "row_of",
    "together",
    "why_flagged",
    "with_file",
    "with_verdict",
    "worker_name",
]
