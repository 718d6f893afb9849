"""What a command does from start to end."""

from typing import TYPE_CHECKING

from batch_infer.jobs.cleanup import remove_abandoned
from batch_infer.jobs.job import Job, find_model, keep_policy, make_rules, rooted, settle_compute
from batch_infer.jobs.merge import Counts, results_of, with_carried
from batch_infer.jobs.out import LINKABLE, claim_run, read_run, refuse_foreign
from batch_infer.jobs.plan import Plan, make_plan
from batch_infer.jobs.record import LIBRARIES, choose_compute, describe, refuse_other
from batch_infer.jobs.recovery import restore, set_aside
from batch_infer.jobs.rejudging import Rescored
from batch_infer.jobs.remerge import merge_results
from batch_infer.jobs.rescore import rescore_images
from batch_infer.jobs.results import json_text, short
from batch_infer.jobs.retry import retry_rows
from batch_infer.jobs.run import Progress, assist, render_tables
from batch_infer.jobs.scan import ScanResult, explain, scan_tables
from batch_infer.jobs.status import RunStatus, read_status
from batch_infer.jobs.summary import Summary
from batch_infer.jobs.throughput import Throughput
from batch_infer.lazy import import_on_use

if TYPE_CHECKING:
    from batch_infer.jobs.export_mlflow import export_model
else:
    __getattr__ = import_on_use(
        __name__,
        export_mlflow=("export_model",),
    )

__all__ = [
    "Counts",
    "Job",
    "LIBRARIES",
    "LINKABLE",
    "Plan",
    "Progress",
    "Rescored",
    "RunStatus",
    "ScanResult",
    "Summary",
    "Throughput",
    "assist",
    "choose_compute",
    "claim_run",
    "describe",
    "explain",
    "export_model",
    "find_model",
    "json_text",
    "keep_policy",
    "make_plan",
    "make_rules",
    "merge_results",
    "read_run",
    "read_status",
    "refuse_foreign",
    "refuse_other",
    "remove_abandoned",
    "render_tables",
    "rescore_images",
    "restore",
    "results_of",
    "retry_rows",
    "rooted",
    "scan_tables",
    "set_aside",
    "settle_compute",
    "short",
    "with_carried",
]
