"""A worker: one device, requests in, committed results out.

This file, `committing`, `contract` and `memory` import no torch, so that the process that only watches over workers
does not either.
"""

from batch_infer.worker.committing import commit_images
from batch_infer.worker.contract import WorkerReport, WorkerSettings, least, together
from batch_infer.worker.memory import peak_memory

__all__ = ["WorkerReport", "WorkerSettings", "commit_images", "least", "peak_memory", "together"]
