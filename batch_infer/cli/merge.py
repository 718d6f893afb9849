"""`batch-infer merge`: write results.* from the manifest."""

from __future__ import annotations

from pathlib import Path

from batch_infer.cli.options import command, json_option, out_argument, results_options
from batch_infer.cli.report import format_counts, format_results, print_result, stoppable
from batch_infer.settings import ResultsFormat


@command(out_argument, results_options, json_option)
def merge(*, out: Path, results: tuple[ResultsFormat, ...], base64: bool, as_json: bool, quiet: bool) -> int:
    """Write OUT/results.* from OUT's manifest.

    Results are in the order of the tables. `run` merges at its end; merge yourself after a run that was killed, and
    for the output of a batch endpoint. Results are limited to the rows of the tables that run.json names; if these
    cannot be read, all rows of the manifest are merged. The formats are those of the run and those of --results.

    Exit codes: 0; 2 if OUT holds no run; 75 if another command works in OUT, or interrupted.
    """
    with stoppable(hint="results.* are as they were. Run the same command again"):
        from batch_infer.jobs import merge_results

        counts, formats = merge_results(out, results, base64=base64)
    if not quiet:
        lines = [format_counts(counts), format_results(out, formats)]
        if counts.remaining:
            lines.append(f"{counts.remaining:,} left: run again to continue")
        print_result(lines, counts.as_dict() if as_json else None)
    return 0
