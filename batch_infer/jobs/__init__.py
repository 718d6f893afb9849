"""Implement the commands, except bench, from start to finish.

For each command, one function does the work and returns the values to print. The other functions are for the command
line, for `bench`, and for endpoints. The workers of an endpoint share OUT without locking it.
"""

from typing import TYPE_CHECKING

from batch_infer.jobs.compute import choose_compute
from batch_infer.jobs.description import LIBRARIES, check_identity
from batch_infer.jobs.diff import Diff, diff_runs
from batch_infer.jobs.frame import read_frame
from batch_infer.jobs.gallery import MAX_RESULTS, THUMBNAIL_SIZE, Gallery, GalleryOptions, make_gallery
from batch_infer.jobs.job import Job, find_model, make_paths_absolute, resolve_run
from batch_infer.jobs.merge import make_results_schema, merge_results, read_results
from batch_infer.jobs.out import create_run_json, find_gallery, read_run, refuse_foreign_files
from batch_infer.jobs.plan import Plan, make_plan
from batch_infer.jobs.progress import Progress
from batch_infer.jobs.recipe import make_recipe
from batch_infer.jobs.recovery import remove_temporary_files, restore_images, retry_without_damaged_parts, set_aside
from batch_infer.jobs.rescore import rescore_images
from batch_infer.jobs.rescorer import RescoreCounts
from batch_infer.jobs.retry import RetrySelection, retry_rows
from batch_infer.jobs.run import join_run, render_tables
from batch_infer.jobs.scan import ScanResult, format_reasons, scan_tables
from batch_infer.jobs.selection import RowSelection
from batch_infer.jobs.status import RunStatus, read_status
from batch_infer.jobs.summary import MAX_BAD_RESULTS, Counts, Summary, Throughput
from batch_infer.jobs.verify import Problem, Sample, Verification, VerifyOptions, verify_run
from batch_infer.lazy import import_on_use

if TYPE_CHECKING:
    from batch_infer.jobs.export_mlflow import export_model
else:
    __getattr__ = import_on_use(__name__, export_mlflow=("export_model",))

__all__ = [
    "Counts",
    "Diff",
    "Gallery",
    "GalleryOptions",
    "Job",
    "LIBRARIES",
    "MAX_BAD_RESULTS",
    "MAX_RESULTS",
    "Plan",
    "Problem",
    "Progress",
    "RescoreCounts",
    "RetrySelection",
    "RowSelection",
    "RunStatus",
    "Sample",
    "ScanResult",
    "Summary",
    "THUMBNAIL_SIZE",
    "Throughput",
    "Verification",
    "VerifyOptions",
    "check_identity",
    "choose_compute",
    "create_run_json",
    "diff_runs",
    "export_model",
    "find_gallery",
    "find_model",
    "format_reasons",
    "join_run",
    "make_gallery",
    "make_paths_absolute",
    "make_plan",
    "make_recipe",
    "make_results_schema",
    "merge_results",
    "read_frame",
    "read_results",
    "read_run",
    "read_status",
    "refuse_foreign_files",
    "remove_temporary_files",
    "render_tables",
    "rescore_images",
    "resolve_run",
    "restore_images",
    "retry_rows",
    "retry_without_damaged_parts",
    "scan_tables",
    "set_aside",
    "verify_run",
]
