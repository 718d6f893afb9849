"""What a command does from start to end."""

from typing import TYPE_CHECKING

from batch_infer.jobs.cleanup import remove_abandoned
from batch_infer.jobs.job import (
    Job,
    find_model,
    make_paths_absolute,
    make_row_rules,
    resolve_on_flagged,
    settle_compute,
)
from batch_infer.jobs.merge import Counts, read_results, results_schema
from batch_infer.jobs.out import LINKABLE, create_run_json, read_run, refuse_foreign_files
from batch_infer.jobs.plan import Plan, make_plan
from batch_infer.jobs.record import LIBRARIES, check_identity, choose_compute, describe_run
from batch_infer.jobs.recovery import restore, set_aside
from batch_infer.jobs.rejudging import RescoreCounts
from batch_infer.jobs.remerge import merge_results
from batch_infer.jobs.rescore import rescore_images
from batch_infer.jobs.results import shorten_float32, to_json
from batch_infer.jobs.retry import retry_rows
from batch_infer.jobs.run import Progress, join_run, render_tables
from batch_infer.jobs.scan import ScanResult, format_reasons, scan_tables
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
    "RescoreCounts",
    "RunStatus",
    "ScanResult",
    "Summary",
    "Throughput",
    "join_run",
    "choose_compute",
    "create_run_json",
    "describe_run",
    "format_reasons",
    "export_model",
    "find_model",
    "to_json",
    "resolve_on_flagged",
    "make_plan",
    "make_row_rules",
    "merge_results",
    "read_run",
    "read_status",
    "refuse_foreign_files",
    "check_identity",
    "remove_abandoned",
    "render_tables",
    "rescore_images",
    "restore",
    "read_results",
    "retry_rows",
    "make_paths_absolute",
    "scan_tables",
    "set_aside",
    "settle_compute",
    "shorten_float32",
    "results_schema",
]
