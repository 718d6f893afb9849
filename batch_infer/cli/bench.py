"""`batch-infer bench`: throughput against plain diffusers, on the same rows in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from batch_infer.bench import (
    ARCHITECTURES,
    RIVALS,
    SWEEP,
    BenchSettings,
    TableShape,
    parse_against,
    parse_steps,
    parse_sweep,
)
from batch_infer.cli.options import command, json_option, model_options
from batch_infer.cli.report import NOTHING_KEPT, format_count, print_lines, printing, stoppable
from batch_infer.cli.settings import make_compute_settings, make_model_settings
from batch_infer.errors import Interrupted

if TYPE_CHECKING:
    from batch_infer.bench import Figures, Report, SweepPoint


@command(
    model_options,
    click.option(
        "--architecture",
        type=click.Choice(ARCHITECTURES),
        help="Instead of a model: a released architecture at full size, with random weights.",
    ),
    click.option(
        "--rows", type=click.IntRange(min=1), default=200, show_default=True, metavar="N", help="Rows of the table."
    ),
    click.option(
        "--steps", default="20-50", show_default=True, metavar="A-B|N", help="Steps of each row, drawn from this range."
    ),
    click.option(
        "--sizes",
        default="mixed",
        show_default=True,
        metavar="WxH,...",
        help="native: the model's own; mixed: that and two of another aspect ratio; or a list: 512x512,640x448.",
    ),
    click.option(
        "--unguided",
        type=click.FloatRange(0, 1),
        default=0.2,
        show_default=True,
        metavar="SHARE",
        help="The share of rows without guidance.",
    ),
    click.option(
        "--rounds",
        type=click.IntRange(min=1),
        default=3,
        show_default=True,
        metavar="N",
        help="Timed rounds per contender.",
    ),
    click.option(
        "--against",
        default="grouped,one-by-one,bare",
        show_default=True,
        metavar="NAME,...",
        help=f"Contenders: {', '.join(RIVALS)}.",
    ),
    click.option(
        "--sweep",
        metavar="N,...",
        help="Measure these numbers of slots too: 4,8,16,32,64. Stops at the first that runs out of memory.",
    ),
    click.option(
        "--plot",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE.png",
        help=f"Draw throughput against slots; sweeps {','.join(map(str, SWEEP))} if no --sweep says which.",
    ),
    click.option(
        "--peak-tflops",
        type=click.FloatRange(min=0, min_open=True),
        metavar="X",
        help="Peak of the device, for MFU. Default: the datasheet's where the GPU is known, else that of a large "
        "matrix product.",
    ),
    json_option,
)
def bench(*, as_json: bool, quiet: bool, **options: Any) -> int:
    """Compare batch-infer with plain diffusers.

    All render the same rows with the same loaded networks in one process, in turns, and a ratio is the median over the
    rounds. grouped: diffusers' pipeline on rows of equal parameters, as many to a call as fill the slots; one-by-one:
    a call for each row, timed on 24 of them; grouped-compiled: grouped with what torch.compile made of the networks;
    bare: the UNet's calls and nothing else, which is the ceiling. No safety check runs and no files are written.

    The default table mixes steps, guidance and sizes. The one of published figures: --steps 50 --unguided 0 --sizes
    native.

    Exit codes: 0; 2 usage or settings; 75 stopped, with the table of what was measured until then.
    """
    settings = _settings(options)
    with stoppable(hint=NOTHING_KEPT):
        from batch_infer.bench import benchmark  # imports torch

        report = benchmark(settings)
    with printing():
        if as_json:
            click.echo(json.dumps(report.as_dict()))
        elif report.stopped or not quiet:
            _print(report)
            if report.stopped:
                _say("stopped early: this is what was measured until then")
    return Interrupted.exit_code if report.stopped else 0


def _settings(options: dict[str, Any]) -> BenchSettings:
    """Raises SettingsError."""
    sweep = parse_sweep(options["sweep"]) if options["sweep"] else ()
    return BenchSettings(
        table=TableShape(options["rows"], parse_steps(options["steps"]), options["sizes"], options["unguided"]),
        model=make_model_settings(options),
        architecture=options["architecture"],
        compute=make_compute_settings(options),
        rounds=options["rounds"],
        against=parse_against(options["against"]),
        sweep=sweep or (SWEEP if options["plot"] else ()),
        plot=options["plot"],
        peak_tflops=options["peak_tflops"],
    )


def _print(report: Report) -> None:
    _print_conditions(report)
    memory = f"{'GPU memory':>13}" if report.ours.device_bytes is not None else ""
    print_lines([""])
    _say(f"{'':24}{'images/s':>10}{'batch-infer is':>18}{'MFU':>9}{memory}")
    for figures in report.figures:
        _say(_line(figures))
    ours, peak = report.ours.more, report.peak
    shares = ", ".join(f"{stage} {share:.1%}" for stage, share in ours["stage_shares"].items() if share)
    print_lines([""])
    _say(f"slots    occupancy {ours['occupancy']:.1%}; time: {shares}")
    product = f"a large matrix product came to {peak.matmul_tflops:.4g}"
    told = product if peak.source == "measured matmul" else f"{peak.source} {peak.tflops:.4g}; {product}"
    _say(f"MFU      of {peak.tflops:.4g} TFLOP/s ({told})")
    if (parity := report.parity) is not None:
        many = format_count(parity.rows, "image")
        _say(f"images   {many} at most {parity.largest}/255 from those of diffusers ({parity.against})")
    for point in report.sweep.points:
        _say(_swept(point))
    if report.sweep.beyond is not None:
        _say(f"{report.sweep.beyond:4} slots: out of memory")


def _print_conditions(report: Report) -> None:
    conditions, table = report.conditions, report.table
    compute, versions = conditions["compute"], conditions["versions"]
    where = f"{compute['dtype']} on {compute['device_name']}"
    threads = f", {format_count(compute['threads'], 'thread')}" if compute["device"] == "cpu" else ""
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "diffusers"))
    _say(f"{conditions['model']} ({conditions['unet_parameters'] / 1e6:.1f}M in the UNet), {where}{threads}")
    _say(f"{libraries}{', compiled' if compute['compiled'] else ''}")
    steps = " to ".join(str(count) for count in dict.fromkeys(table.steps))
    sizes = ", ".join(report.ours.more["slots"])
    _say(f"{format_count(table.rows, 'row')} of {steps} steps, {table.unguided:.0%} without guidance, {sizes}")
    slots = " or ".join(str(count) for count in dict.fromkeys(report.ours.more["slots"].values()))
    _say(
        f"{table.row_forwards:,} UNet evaluations, {table.tflop:,.4g} TFLOP; {slots} slots; "
        f"{format_count(conditions['rounds'], 'round')}"
    )


def _line(figures: Figures) -> str:
    name = figures.name if figures.sampled is None else f"{figures.name}, {format_count(figures.sampled, 'row')}"
    ratio = "" if figures.ratio is None else _speed(figures.ratio)
    memory = "" if figures.device_bytes is None else tqdm.format_sizeof(figures.device_bytes, "B", 1024)
    return f"{name:24}{figures.images_per_second:10.3f}{ratio:>18}{figures.mfu:9.1%}{memory:>13}".rstrip()


def _speed(ratio: float) -> str:
    return f"{ratio:.2f}x as fast" if ratio >= 0.995 else f"{1 - ratio:.0%} slower"


def _swept(point: SweepPoint) -> str:
    return (
        f"{point.slots:4} slots: {point.images_per_second:.3f} images/s, occupancy {point.occupancy:.1%}; "
        f"the bare UNet allows {point.ceiling:.3f}"
    )


def _say(line: str) -> None:
    print_lines([line])
