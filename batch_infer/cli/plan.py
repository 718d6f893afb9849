"""`batch-infer plan`: what a run would do and take, without doing it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

import click
from tqdm import tqdm

from batch_infer.cli.asked import make_run_settings
from batch_infer.cli.logs import log, set_up_logging
from batch_infer.cli.options import job_options, json_option, logging_options, progress_option
from batch_infer.cli.report import ROWS_FAILED, duration, number, printing, say
from batch_infer.cli.signals import NOTHING_KEPT, stoppable
from batch_infer.errors import SettingsError
from batch_infer.records import ResultRow, Source
from batch_infer.store import open_temporary_text

if TYPE_CHECKING:
    from batch_infer.jobs import Plan
    from batch_infer.settings import RunSettings


DEFAULT_IDS = {
    "row": "from file name and row number: renaming, sorting or splitting the tables changes ids, derived seeds and "
    "images; with --id-from content it does not",
    "content": "from the content of each row: renaming, sorting or splitting the tables changes none",
}
FILES_SHOWN = 100
TOO_SHORT = "too short: a run stops then with exit code 75, and the same command continues"


@click.command(context_settings={"auto_envvar_prefix": "BATCH_INFER"})
@job_options
@json_option
@logging_options
@progress_option
def plan(time_limit: float | None, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> int:
    """Say what `run` would do, and render nothing.

    The options are those of `run`. Every row is validated, and each faulty one named with its reason. Then come the
    sizes, the UNet evaluations (a row with guidance takes two for each step), the time, the disk
    and, with --price-per-hour, the cost. What OUT holds already is not counted again. The time is told from a short
    calibration, or from the last run, which are remembered; with --time-limit, also whether that is enough (with -q,
    only where it is not).

    Exit codes: as `run` would have; 3 if more rows are invalid than --max-failed.
    """
    settings = make_run_settings(options)
    set_up_logging(quiet=quiet, verbose=verbose)
    # In a file: there may be as many faults as the table has rows.
    with stoppable(hint=NOTHING_KEPT), open_temporary_text() as faults:
        from batch_infer.jobs import make_plan as look

        found = look(settings, lambda row: _note(row, faults))
        for remark in found.remarks:
            log.warning("%s", remark)
        faults.seek(0)
        within = settings.max_failed.allows(found.invalid_rows, found.rows)
        enough = None if time_limit is None else found.seconds <= time_limit
        if quiet and within and enough is not False and not found.refused:
            return 0
        with printing():
            if as_json:
                _print_json(found, faults, {"time_limit": time_limit, "within_time_limit": enough})
            else:
                _print(found, faults, settings)
                if time_limit is not None:
                    say(f"limit    {duration(time_limit)}, {'sufficient' if enough else TOO_SHORT}")
    if found.refused:
        raise SettingsError(found.refused)
    return 0 if within else ROWS_FAILED


def _note(row: ResultRow, faults: TextIO) -> None:
    fault = {
        "file": row.source_file,
        "row": row.source_row,
        "line": row.line,
        "id": row.id,
        "image_index": row.image_index,
    }
    faults.write(json.dumps({**fault, "error": row.error}) + "\n")


def _print_json(plan: Plan, faults: TextIO, limits: Mapping[str, Any]) -> None:
    """One object, whose last member is written row by row."""
    click.echo(json.dumps({**plan.as_dict(), **limits, "invalid_results": []})[:-2], nl=False)
    for place, line in enumerate(faults):
        click.echo(f"{', ' if place else ''}{line.rstrip()}", nl=False)
    click.echo("]}")


def _print(plan: Plan, faults: TextIO, settings: RunSettings) -> None:
    from batch_infer.jobs import format_reasons

    for fault in map(json.loads, faults):
        if fault["image_index"] == 0:
            place = Source(fault["file"], fault["row"], fault["line"])
            say(f"{place} ({fault['id']}): {fault['error']}")
    many = f", {number(plan.total - plan.invalid, 'image')}" if plan.total > plan.rows else ""
    told = [f"{number(plan.rows, 'row')}{many}", f"{plan.invalid_rows:,} invalid"]
    if plan.truncated:
        told.append(f"{number(plan.truncated, 'prompt')} longer than the model reads")
    say(" · ".join(told))
    for name, rows in list(plan.files.items())[:FILES_SHOWN]:
        say(f"read     {name}: {number(rows, 'row')}")
    if len(plan.files) > FILES_SHOWN:
        say(f"read     {len(plan.files) - FILES_SHOWN:,} more files (--json names all)")
    if plan.default_ids:
        say(f"ids      {DEFAULT_IDS[plan.default_ids]}")
    if plan.done:
        say(f"{plan.done:,} done before, in {settings.out}")
    if not plan.pending:
        say("nothing to do")
        return
    if why := format_reasons(plan.reasons, plan.changes):
        say(f"{plan.pending:,} to render: {why}")
    say(f"{'size':12}{'images':>12}{'evaluations':>16}{'UNet calls':>14}{'device time':>16}")
    for size in plan.sizes:
        name, time = f"{size.width}x{size.height}", duration(size.seconds)
        say(f"{name:12}{size.images:12,}{size.row_forwards:16,}{size.ticks:14,}{time:>16}")
    slots = sorted({size.slots for size in plan.sizes})
    say(f"slots    {' to '.join(map(str, slots[:1] + slots[1:][-1:]))}, occupancy {plan.occupancy:.0%}")
    if plan.processes > 1:
        say(f"workers  {plan.processes}, each with its own device")
    say(f"time     about {duration(plan.seconds)}, as measured {plan.measured_at:%Y-%m-%d %H:%M} UTC")
    say(f"disk     about {tqdm.format_sizeof(plan.bytes, 'B')}")
    if plan.cost is not None:
        say(f"cost     about {plan.cost:,.2f}")
