"""Render requests on one device, and commit their results.

`interface`, `rows` and `committing` do not import torch, so that a process that only supervises workers stays small.
"""

from typing import TYPE_CHECKING

from batch_infer.lazy import import_on_use
from batch_infer.worker.committing import commit_failed, commit_images
from batch_infer.worker.interface import (
    WorkerReport,
    WorkerSettings,
    read_peak_memory,
    sum_stages_by_size,
    take_smallest_batches,
)
from batch_infer.worker.rows import explain_flag, format_worker_name, make_row, with_image, with_verdict

if TYPE_CHECKING:
    from batch_infer.worker.loading import (
        load_chain,
        load_image_checker,
        load_model,
        make_chain,
        optimize_model,
        prepare_torch,
    )
    from batch_infer.worker.worker import ChainLoader, Worker
else:
    __getattr__ = import_on_use(
        __name__,
        loading=("load_chain", "load_image_checker", "load_model", "make_chain", "optimize_model", "prepare_torch"),
        worker=("ChainLoader", "Worker"),
    )

__all__ = [
    "ChainLoader",
    "Worker",
    "WorkerReport",
    "WorkerSettings",
    "commit_failed",
    "commit_images",
    "explain_flag",
    "format_worker_name",
    "load_chain",
    "load_image_checker",
    "load_model",
    "make_chain",
    "make_row",
    "optimize_model",
    "prepare_torch",
    "read_peak_memory",
    "sum_stages_by_size",
    "take_smallest_batches",
    "with_image",
    "with_verdict",
]
