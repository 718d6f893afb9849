"""`batch-infer bench`: measure throughput and compare it with plain diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from batch_infer.bench import (
    ARCHITECTURES,
    BASELINES,
    SWEEP,
    BenchSettings,
    WorkloadSettings,
    parse_against,
    parse_steps,
    parse_sweep,
)
from batch_infer.cli.options import command, compute_options, json_option, model_options, option
from batch_infer.cli.report import NOTHING_KEPT, format_count, print_result, stoppable
from batch_infer.cli.settings import make_compute_settings, make_model_settings
from batch_infer.cli.summary import format_energy
from batch_infer.cli.values import POSITIVE, SHARE, FiniteRange
from batch_infer.errors import StoppedError

if TYPE_CHECKING:
    from batch_infer.bench import BenchReport


@command(
    *model_options,
    *compute_options,
    option(
        "--architecture",
        type=click.Choice(ARCHITECTURES),
        help="Use a released architecture at full size with random weights instead of a model: "
        "flux-schnell is FLUX.1-schnell, flux2-klein FLUX.2-klein-4B, z-image Z-Image-Turbo, and sana SANA 1.6B. "
        "Cannot be combined with options that select or change a checkpoint, such as --model, --lora and --quantize.",
    ),
    option("--rows", type=POSITIVE, default=200, metavar="N", help="Number of rows."),
    option(
        "--steps",
        type=lambda text: parse_steps(text) if text else None,
        metavar="A-B|N",
        help="Steps of each row, or their range. Default: 20-50, or the model's default (see docs/models.md) if that "
        "is below 20.",
    ),
    option(
        "--sizes",
        default="mixed",
        metavar="WxH,...",
        help="Image sizes. native: the model's own size; mixed: also two sizes with another aspect ratio; or a list: "
        "512x512,640x448.",
    ),
    option("--unguided", type=SHARE, default=0.2, metavar="SHARE", help="Share of rows without guidance."),
    option("--rounds", type=POSITIVE, default=3, metavar="N", help="Timed rounds per contender."),
    option(
        "--against",
        type=parse_against,
        default="grouped,one-by-one,bare",
        metavar="NAME,...",
        help=f"Baselines: {', '.join(BASELINES)}.",
    ),
    option(
        "--sweep",
        type=lambda text: parse_sweep(text) if text else (),
        metavar="N,...",
        help="Also measure these numbers of slots: 4,8,16,32,64. Stops at the first that does not fit into memory.",
    ),
    option(
        "--plot",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE.png",
        help=f"Plot throughput against slots. Default --sweep: {','.join(map(str, SWEEP))}.",
    ),
    option(
        "--peak-tflops",
        type=FiniteRange(min=0, min_open=True),
        metavar="X",
        help="Peak rate of the device, for MFU. Default: the peak in the GPU's datasheet if it is known, else the "
        "measured rate of a large matrix product.",
    ),
    json_option,
)
def bench(*, as_json: bool, quiet: bool, **options: Any) -> int:
    """Compare batch-infer with plain diffusers.

    All contenders take turns in one process, with the same rows and the same loaded networks. Each ratio is the median
    over the rounds. No safety check runs, and no images are written.

    The baselines are: grouped, the diffusers pipeline on batches of rows with equal parameters that fill the slots;
    grouped-compiled, the same with networks compiled by torch.compile; one-by-one, a pipeline call per row, timed on
    24 rows; and bare, the denoiser calls alone, which set the ceiling. If a pipeline cannot render several prompts per
    call, the grouped baselines are left out.

    By default, rows have mixed steps, guidance and sizes. Published figures use rows like those of --steps 50
    --unguided 0 --sizes native. With --quantize, the images and the size of the weights are compared with those of the
    unquantized model. A denoiser evaluation is one batch element of a call of the UNet or transformer; --json counts
    them as row_forwards.

    Exit codes: 0 success; 2 usage or settings; 75 stopped, after printing any figures measured so far.
    """
    settings = BenchSettings(
        workload=WorkloadSettings(options["rows"], options["steps"], options["sizes"], options["unguided"]),
        model=make_model_settings(options),
        architecture=options["architecture"],
        compute=make_compute_settings(options),
        rounds=options["rounds"],
        against=options["against"],
        sweep=options["sweep"] or (SWEEP if options["plot"] else ()),
        plot=options["plot"],
        peak_tflops=options["peak_tflops"],
    )
    with stoppable(hint=NOTHING_KEPT):
        # This slow import is done here so that a signal during it stops the command cleanly.
        from batch_infer.bench import benchmark

        report = benchmark(settings)
    if as_json or report.stopped or not quiet:
        print_result(_report_lines(report), report.as_dict() if as_json else None)
    return StoppedError.exit_code if report.stopped else 0


def _report_lines(report: BenchReport) -> Iterator[str]:
    yield from _condition_lines(report)
    yield ""
    yield from _contender_lines(report)
    yield ""
    ours, peak = report.ours.details, report.peak
    shares = ", ".join(f"{stage} {share:.1%}" for stage, share in ours["stage_shares"].items() if share)
    yield f"slots    occupancy {ours['occupancy']:.1%}; time: {shares}"
    source = f"a large matrix product reached {peak.matmul_tflops:.4g}"
    if peak.source != "measured matmul":
        source = f"{peak.source} {peak.tflops:.4g}; {source}"
    yield f"MFU      of {peak.tflops:.4g} TFLOP/s ({source})"
    rows = len(report.workload.rows)
    energies = {name: contender.details.get("energy_wh") for name, contender in report.contenders.items()}
    if texts := [f"{name} {format_energy(energy / rows)}" for name, energy in energies.items() if energy is not None]:
        yield f"energy   per image: {', '.join(texts)}"
    if (parity := report.parity) is not None:
        images = format_count(parity.rows, "image")
        yield f"images   {images} at most {parity.largest_difference}/255 from those of diffusers ({parity.against})"
    if (quality := report.quality) is not None:
        bytes_by_model = quality.weight_bytes, quality.unquantized_weight_bytes
        quantized, plain = (tqdm.format_sizeof(size, "B", 1024) for size in bytes_by_model)
        yield f"weights  {quantized}, without --quantize {plain}"
        images = f"{format_count(quality.rows, 'image')} against the unquantized model"
        yield f"quality  PSNR {quality.mean_psnr:.1f} dB on average, {quality.min_psnr:.1f} dB at worst, of {images}"
    for point in report.sweep.points:
        yield (
            f"{point.slots:4} slots: {point.images_per_second:.3f} images/s, occupancy {point.occupancy:.1%}; "
            f"the bare denoiser allows {point.ceiling_images_per_second:.3f}"
        )
    if report.sweep.out_of_memory_at is not None:
        yield f"{report.sweep.out_of_memory_at:4} slots: out of memory"
    if report.stopped:
        yield "stopped early: these are the figures measured so far"


def _condition_lines(report: BenchReport) -> Iterator[str]:
    conditions, workload = report.conditions, report.workload
    compute, versions = conditions["compute"], conditions["versions"]
    threads = f", {format_count(compute['threads'], 'thread')}" if compute["device"] == "cpu" else ""
    device = f"{compute['dtype']} on {compute['device_name']}{threads}"
    yield f"{conditions['model']} ({conditions['denoiser_parameters'] / 1e6:.1f}M in the denoiser), {device}"
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "diffusers"))
    yield f"{libraries}{', compiled' if compute['compiled'] else ''}"
    yield report.workload_line
    slots = " or ".join(str(count) for count in dict.fromkeys(report.ours.details["slots"].values()))
    cost = f"{workload.row_forwards:,} denoiser evaluations, {workload.tflop:,.4g} TFLOP"
    yield f"{cost}; {slots} slots; {format_count(conditions['rounds'], 'round')}"


def _contender_lines(report: BenchReport) -> Iterator[str]:
    memory = f"{'GPU memory':>13}" if report.ours.device_bytes is not None else ""
    yield f"{'':24}{'images/s':>10}{'batch-infer is':>18}{'MFU':>9}{memory}"
    for name, measurement in report.contenders.items():
        if measurement.sampled_rows is not None:
            name = f"{name}, {format_count(measurement.sampled_rows, 'row')}"
        ratio = "" if measurement.ratio is None else format_ratio(measurement.ratio)
        device_bytes = measurement.device_bytes
        memory = "" if device_bytes is None else tqdm.format_sizeof(device_bytes, "B", 1024)
        yield f"{name:24}{measurement.images_per_second:10.3f}{ratio:>18}{measurement.mfu:9.1%}{memory:>13}".rstrip()


def format_ratio(ratio: float) -> str:
    """Format the relative speed of batch-infer: `2.43x as fast` or `14% slower`."""
    return f"{ratio:.2f}x as fast" if ratio >= 0.995 else f"{1 - ratio:.0%} slower"
