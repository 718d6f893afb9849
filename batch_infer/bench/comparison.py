"""Run the benchmark: time all contenders on one workload round by round, then batch-infer with other slot counts."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from batch_infer import peak_flops
from batch_infer.accelerator import out_of_memory_errors
from batch_infer.bench.contenders import (
    BareDenoiser,
    Contender,
    RenderingContender,
    denoiser_rate,
    matmul_tflops,
)
from batch_infer.bench.plotting import check_plot, draw
from batch_infer.bench.quality import Unquantized, compare_quality, render_unquantized
from batch_infer.bench.renderers import BatchInfer, PlainDiffusers, Renderer
from batch_infer.bench.report import OURS, BenchReport, Measurement, Parity, Peak, Sweep, SweepPoint
from batch_infer.bench.settings import BenchSettings
from batch_infer.bench.subject import Subject, load_subject, tune_batch_sizes
from batch_infer.bench.workload import Workload, make_workload, sample_evenly, size_name
from batch_infer.errors import SettingsError
from batch_infer.jobs import LIBRARIES
from batch_infer.models import is_compiled
from batch_infer.worker import read_peak_memory

SAMPLE_ROWS = 24
"""Maximum number of rows that the baseline one-by-one renders, and of images to compare."""

log = logging.getLogger("batch_infer")


def benchmark(settings: BenchSettings) -> BenchReport:
    """Load the model, measure all contenders, and draw the requested plot unless the benchmark was stopped.

    Raises UsageError, StorageError, and KeyboardInterrupt after a stop before the first figure.
    """
    if settings.plot is not None:
        check_plot(settings.plot)
    unquantized = None if settings.model.quantize is None else render_unquantized(settings, SAMPLE_ROWS)
    subject = load_subject(settings)
    if settings.compute.slots == "auto":
        sizes = settings.workload.sizes_of(subject.sizes)
        subject = replace(subject, compute=tune_batch_sizes(subject, sizes))
    report = compare(settings, subject, unquantized)
    if settings.plot is not None and not report.stopped:
        draw(report, settings.plot)
    return report


def compare(settings: BenchSettings, subject: Subject, unquantized: Unquantized | None = None) -> BenchReport:
    """Compare the contenders on a loaded model, and with the unquantized model if it is quantized.

    After a stop, the report has the figures measured so far.

    Raises SettingsError if the model does not support the sizes or steps, or if a baseline is unavailable, ModelError
    if batch-infer renders no image for a row, and KeyboardInterrupt after a stop before the first figure.
    """
    workload = make_workload(settings.workload, subject)
    names = (OURS, *_choose_baselines(settings, subject))
    contenders = [_make_contender(name, subject, workload) for name in names]
    peak, sweep, stopped = _find_peak(settings, subject), Sweep(), False
    try:
        _run_rounds(contenders, settings)
        measure_sweep(sweep, settings.sweep, subject, workload)
    except KeyboardInterrupt:
        contenders = [contender for contender in contenders if contender.seconds]
        if not contenders:
            raise
        stopped = True
    results = {contender.name: _summarize(contender, contenders[0], workload, peak) for contender in contenders}
    parity, memory = _compare_images(contenders), _peak_memory(subject, contenders, sweep)
    conditions, quality = _conditions(settings, subject), None
    if unquantized is not None:
        conditions["denoiser_parameters"] = unquantized.denoiser_parameters  # 4-bit weights are packed in pairs
        if isinstance(ours := contenders[0], RenderingContender):
            quality = compare_quality(subject, ours.images, unquantized)
    return BenchReport(conditions, workload, peak, results, parity, sweep, memory, stopped, quality)


def _choose_baselines(settings: BenchSettings, subject: Subject) -> Sequence[str]:
    """Return the requested baselines that are possible with the model."""
    if subject.probe.can_group:
        return settings.against
    grouped = [name for name in settings.against if name.startswith("grouped")]
    if grouped:
        log.info("left out: %s (the pipeline cannot render several prompts per call)", ", ".join(grouped))
    return [name for name in settings.against if name not in grouped]


def _make_contender(name: str, subject: Subject, workload: Workload) -> Contender:
    if name == "grouped-compiled" and not subject.compute.compiled:
        raise SettingsError("--against grouped-compiled: the networks are not compiled; add --compile")
    if name == "bare":
        return BareDenoiser(name, subject, workload)
    model, compute, sample = subject.model, subject.compute, sample_evenly(workload.rows, SAMPLE_ROWS)
    renderer: Renderer
    if name == OURS:
        renderer = BatchInfer(model, compute)
    else:
        renderer = PlainDiffusers(model, compute, grouped=name != "one-by-one", compiled=name == "grouped-compiled")
    rows = sample if name == "one-by-one" else workload.rows
    share = workload.row_forwards_of(rows) / workload.row_forwards
    return RenderingContender(name, renderer, rows, subject, compared=[row.id for row in sample], share=share)


def _run_rounds(contenders: Sequence[Contender], settings: BenchSettings) -> None:
    """Warm up all contenders, time each of them once per round, and log the estimated remaining time."""
    for index, contender in enumerate(contenders, 1):
        log.info("warming up: %s (%d of %d)", contender.name, index, len(contenders))
        contender.warm_up()
    remaining = [contender.name for contender in contenders] * settings.rounds + [OURS] * len(settings.sweep)
    seconds: dict[str, float] = {}
    for round_number in range(1, settings.rounds + 1):
        for contender in contenders:
            started = time.monotonic()
            contender.run_round()
            seconds[contender.name] = time.monotonic() - started
            del remaining[0]
            remaining_time = tqdm.format_interval(_estimate_seconds(remaining, seconds))
            message = "round %d of %d: %s %.1f s; about %s left"
            log.info(message, round_number, settings.rounds, contender.name, contender.seconds[-1], remaining_time)


def _estimate_seconds(names: Sequence[str], seconds: Mapping[str, float]) -> float:
    """Estimate the seconds of one round per name from each contender's last round, or from the mean if it had none."""
    mean = statistics.mean(seconds.values())
    return sum(seconds.get(name, mean) for name in names)


def measure_sweep(sweep: Sweep, slot_counts: Sequence[int], subject: Subject, workload: Workload) -> None:
    """Add a point for each number of slots, and stop at the first number that does not fit into memory."""
    for slots in slot_counts:
        try:
            with out_of_memory_errors():
                point = _measure_slots(slots, subject, workload)
        except torch.OutOfMemoryError:
            log.info("%d slots: out of memory", slots)
            sweep.out_of_memory_at = slots
            return
        sweep.points.append(point)
        rate, ceiling = point.images_per_second, point.ceiling_images_per_second
        log.info("%d slots: %.2f images/s (bare denoiser: %.2f)", slots, rate, ceiling)


def _measure_slots(slots: int, subject: Subject, workload: Workload) -> SweepPoint:
    """Measure the bare denoiser and batch-infer with this number of slots. Raises torch.OutOfMemoryError."""
    count = len(workload.rows)
    rates = {size: denoiser_rate(subject.probe, workload.rows[0], size, slots) for size in workload.sizes}
    # Decode no more images together than the number of rows with guidance that fit into the slots.
    decode_batch = min(subject.compute.decode_batch, slots // 2)
    compute = replace(subject.compute, slots=slots, decode_batch=decode_batch, by_size=())
    ours = BatchInfer(subject.model, compute)
    contender = RenderingContender(f"{slots} slots", ours, workload.rows, subject)
    contender.warm_up()
    contender.run_round()
    return SweepPoint(
        slots=slots,
        row_forwards_per_second={size_name(size): rate for size, rate in rates.items()},
        ceiling_images_per_second=count / workload.denoiser_seconds(rates),
        images_per_second=count / contender.seconds[0],
        occupancy=ours.chain.stages.occupancy,
        device_bytes=contender.device_bytes,
    )


def _find_peak(settings: BenchSettings, subject: Subject) -> Peak:
    compute, model = subject.compute, subject.model
    measured = matmul_tflops(model.device, model.dtype)
    if settings.peak_tflops is not None:
        return Peak(settings.peak_tflops, "given", measured)
    published = peak_flops.peak_tflops(compute.device_name, compute.dtype) if compute.device == "cuda" else None
    return Peak(published, "datasheet", measured) if published else Peak(measured, "measured matmul", measured)


def _summarize(contender: Contender, ours: Contender, workload: Workload, peak: Peak) -> Measurement:
    seconds = statistics.median(contender.seconds)
    # Compare round by round, since other work on the machine slows all contenders of a round. `zip` is not strict,
    # because the last round may be incomplete after a stop.
    ratios = [their / our for their, our in zip(contender.seconds, ours.seconds, strict=False)]
    tflop = workload.denoiser_tflop if isinstance(contender, BareDenoiser) else workload.tflop
    return Measurement(
        seconds=contender.seconds,
        images_per_second=len(workload.rows) / seconds,
        ratio=None if contender is ours else statistics.median(ratios),
        mfu=tflop / seconds / peak.tflops,
        mfu_of_matmul=tflop / seconds / peak.matmul_tflops,
        sampled_rows=contender.sampled_rows,
        device_bytes=contender.device_bytes,
        details=contender.details,
    )


def _compare_images(contenders: Sequence[Contender]) -> Parity | None:
    """Compare our images with those of the first baseline that renders images, or return None if there is none."""
    ours, *baselines = (contender for contender in contenders if isinstance(contender, RenderingContender))
    if not baselines:  # none was requested, or the benchmark was stopped first
        return None
    theirs = baselines[0].images
    differences = [np.abs(ours.images[name].astype(int) - image.astype(int)).max() for name, image in theirs.items()]
    return Parity(len(theirs), int(max(differences)), baselines[0].name)


def _peak_memory(subject: Subject, contenders: Sequence[Contender], sweep: Sweep) -> dict[str, int]:
    """Return the peak memory in bytes. Each round resets the GPU's peak, so use the largest that was recorded."""
    memory = read_peak_memory(subject.compute.device)
    if "device_bytes" in memory:
        peaks = [contender.device_bytes for contender in contenders] + [point.device_bytes for point in sweep.points]
        memory["device_bytes"] = max(peak or 0 for peak in peaks)
    return memory


def _conditions(settings: BenchSettings, subject: Subject) -> dict[str, Any]:
    networks, compute = subject.model.networks, subject.compute
    return {
        "model": subject.name,
        "architecture": settings.architecture,
        "quantize": settings.model.quantize,
        "denoiser_parameters": sum(weight.numel() for weight in subject.probe.denoiser.parameters()),
        "scheduler": subject.probe.scheduler_name,
        "compute": asdict(replace(compute, compiled=compute.compiled and is_compiled(networks))),
        "rounds": settings.rounds,
        "versions": {name: version(name) for name in ("batch-infer", *LIBRARIES)},
    }
