"""`batch-infer plan`: show what a run would do and cost, without rendering."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

import click
from tqdm import tqdm

from batch_infer.cli.job_options import job_options
from batch_infer.cli.logs import log
from batch_infer.cli.options import command, json_option, progress_option
from batch_infer.cli.report import (
    CHECK_FAILED,
    NOTHING_KEPT,
    format_count,
    format_duration,
    print_lines,
    printing,
    stoppable,
)
from batch_infer.cli.settings import make_run_settings
from batch_infer.errors import SettingsError
from batch_infer.records import ResultRow, Source
from batch_infer.store import open_temporary_text

if TYPE_CHECKING:
    from batch_infer.jobs import Plan
    from batch_infer.settings import RunSettings

DEFAULT_IDS = {
    "row": "from file name and row number: renaming, sorting or splitting the tables changes ids, derived seeds and "
    "images; with --id-from content it does not",
    "content": "from the content of each row: renaming, sorting or splitting the tables changes no id, seed or image",
}
FILES_SHOWN = 100
TOO_SHORT = "too short: the run would stop with exit code 75, and the same command would continue it"


@command(*job_options, json_option, progress_option)
def plan(*, time_limit: float | None, as_json: bool, quiet: bool, **options: Any) -> int:
    """Show what `run` would do, without rendering.

    It takes the options of `run`, validates every row, lists invalid rows with the reasons, and shows image sizes,
    denoiser evaluations (a row with guidance usually takes two per step; the key in --json is row_forwards), time, disk
    space and, with --price-per-hour, cost. Rows that are already finished in OUT add nothing to these figures. The time
    is estimated from a short calibration or the last run; both are remembered. With --time-limit, plan says whether the
    limit is sufficient (with -q, only if it is not). --gallery and --metrics-file have no effect. For a pipeline
    outside the model families (see docs/models.md), plan loads the weights.

    Exit codes: as for `run`; 3 if more rows are invalid than --max-failed allows.
    """
    settings = make_run_settings(options)
    # Errors are kept in a file, because every row of the table may have one.
    with stoppable(hint=NOTHING_KEPT), open_temporary_text() as errors:
        from batch_infer.jobs import make_plan

        plan = make_plan(settings, lambda row: _write_error(row, errors))
        for remark in plan.remarks:
            log.warning("%s", remark)
        errors.seek(0)
        is_accepted = settings.max_failed.allows(plan.invalid_rows, plan.rows)
        is_in_time = None if time_limit is None else plan.seconds <= time_limit
        if quiet and is_accepted and is_in_time is not False and not plan.refusal:
            return 0
        with printing():
            if as_json:
                _print_json(plan, errors, {"time_limit": time_limit, "within_time_limit": is_in_time})
            else:
                print_lines(_plan_lines(plan, errors, settings))
                if time_limit is not None:
                    verdict = "sufficient" if is_in_time else TOO_SHORT
                    print_lines([f"limit    {format_duration(time_limit)}, {verdict}"])
    if plan.refusal:
        raise SettingsError(plan.refusal)
    return 0 if is_accepted else CHECK_FAILED


def _write_error(row: ResultRow, errors: TextIO) -> None:
    """Write an invalid result as a line of JSON."""
    source = {"file": row.source_file, "row": row.source_row, "line": row.line}
    errors.write(json.dumps({**source, "id": row.id, "image_index": row.image_index, "error": row.error}) + "\n")


def _print_json(plan: Plan, errors: TextIO, limits: Mapping[str, Any]) -> None:
    """Print one JSON object. Its last member is the list of errors, which are read line by line."""
    click.echo(json.dumps({**plan.as_dict(), **limits, "invalid_results": []})[:-2], nl=False)
    for index, line in enumerate(errors):
        click.echo(f"{', ' if index else ''}{line.rstrip()}", nl=False)
    click.echo("]}")


def _plan_lines(plan: Plan, errors: TextIO, settings: RunSettings) -> Iterator[str]:
    for error in map(json.loads, errors):
        if error["image_index"] == 0:
            yield f"{Source(error['file'], error['row'], error['line'])} ({error['id']}): {error['error']}"
    images = f", {format_count(plan.total - plan.invalid, 'image')}" if plan.total > plan.rows else ""
    truncated = f" · {format_count(plan.truncated, 'prompt')} longer than the model reads" if plan.truncated else ""
    yield f"{format_count(plan.rows, 'row')}{images} · {plan.invalid_rows:,} invalid{truncated}"
    for name, rows in list(plan.files.items())[:FILES_SHOWN]:
        yield f"read     {name}: {format_count(rows, 'row')}"
    if len(plan.files) > FILES_SHOWN:
        yield f"read     {len(plan.files) - FILES_SHOWN:,} more files (--json names all)"
    if plan.default_ids:
        yield f"ids      {DEFAULT_IDS[plan.default_ids]}"
    if plan.finished:
        yield f"{plan.finished:,} already done in {settings.out}"
    if plan.pending:
        yield from _cost_lines(plan)
    else:
        yield "nothing to do"


def _cost_lines(plan: Plan) -> Iterator[str]:
    from batch_infer.jobs import format_reasons

    if reasons := format_reasons(plan.reasons, plan.changes):
        yield f"{plan.pending:,} to render: {reasons}"
    yield f"{'size':12}{'images':>12}{'evaluations':>16}{'denoiser calls':>16}{'device time':>16}"
    for size in plan.sizes:
        name, seconds = f"{size.width}x{size.height}", format_duration(size.seconds)
        yield f"{name:12}{size.images:12,}{size.row_forwards:16,}{size.ticks:16,}{seconds:>16}"
    slots = [size.slots for size in plan.sizes]
    slot_range = " to ".join(map(str, sorted({min(slots), max(slots)})))
    yield f"slots    {slot_range}, occupancy {plan.occupancy:.0%}"
    if plan.processes > 1:
        yield f"workers  {plan.processes}, one per device"
    measured_at = f"{plan.measured_at:%Y-%m-%d %H:%M} UTC"
    yield f"time     about {format_duration(plan.seconds)}, at the speed measured on {measured_at}"
    yield f"disk     about {tqdm.format_sizeof(plan.bytes, 'B')}"
    if plan.cost is not None:
        yield f"cost     about {plan.cost:,.2f}"
