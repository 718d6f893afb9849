"""A worker: one device, requests in, committed results out.

This file, `committing`, `contract` and `memory` import no torch, so that the process that only watches over workers
does not either.
"""

from typing import TYPE_CHECKING

from batch_infer.lazy import import_on_use
from batch_infer.worker.committing import commit_images
from batch_infer.worker.interface import WorkerReport, WorkerSettings, smallest_batches, sum_stages_by_size
from batch_infer.worker.memory import peak_memory
from batch_infer.worker.rows import explain_flag, format_worker_name, make_row, set_image, set_verdict

if TYPE_CHECKING:
    from batch_infer.worker.loading import (
        load_any_model,
        load_chain,
        load_image_checker,
        load_model,
        make_chain,
        prepare_torch,
    )
    from batch_infer.worker.worker import Chain, ChainLoader, Worker
else:
    __getattr__ = import_on_use(
        __name__,
        worker=(
            "Chain",
            "ChainLoader",
            "Worker",
        ),
        loading=(
            "load_any_model",
            "load_chain",
            "load_image_checker",
            "load_model",
            "make_chain",
            "prepare_torch",
        ),
    )

__all__ = [
    "Chain",
    "ChainLoader",
    "Worker",
    "WorkerReport",
    "WorkerSettings",
    "commit_images",
    "smallest_batches",
    "load_any_model",
    "load_chain",
    "load_image_checker",
    "load_model",
    "make_chain",
    "peak_memory",
    "prepare_torch",
    "make_row",
    "sum_stages_by_size",
    "explain_flag",
    "set_image",
    "set_verdict",
    "format_worker_name",
]
