"""The contest: everybody renders the same rows, in turns, round by round."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from tqdm import tqdm

from batch_infer import peak_flops
from batch_infer.bench import clock
from batch_infer.bench.bare import BareUNet
from batch_infer.bench.contenders import Contender, Ours, PlainDiffusers
from batch_infer.bench.figures import (
    TERA,
    Figures,
    Parity,
    Peak,
    Report,
    Sweep,
    SweepPoint,
    TableFigures,
    median_ratio,
)
from batch_infer.bench.lanes import BareLane, Course, Lane, RenderingLane
from batch_infer.bench.plotting import draw, refuse_unfit
from batch_infer.bench.rows import Table, make_rows, row_forwards, spread, work_of
from batch_infer.bench.settings import BenchSettings, Size
from batch_infer.bench.subject import Subject, best_shapes, load_subject
from batch_infer.bench.sweep import sweep
from batch_infer.errors import SettingsError
from batch_infer.jobs import LIBRARIES
from batch_infer.models import decode_flops, denoise_flops, is_compiled
from batch_infer.worker import peak_memory

SAMPLE = 24
"""Rows whose images are compared, and that are timed one by one."""
OURS = "batch-infer"

log = logging.getLogger("batch_infer")


def benchmark(settings: BenchSettings) -> Report:
    """Time all that the settings name. Raises UsageError before anything is timed."""
    if settings.plot is not None:
        refuse_unfit(settings.plot)
    report = _hold(settings)
    if settings.plot is not None and not report.stopped:
        draw(report, settings.plot)
    return report


def _hold(settings: BenchSettings) -> Report:
    subject = load_subject(settings)
    sizes = settings.table.sizes_of(subject.sizes)
    if settings.compute.slots == "auto":
        subject = replace(subject, compute=best_shapes(subject, sizes))
    return Contest(settings, subject, sizes).go()


class Contest:
    """One table and those who render it."""

    def __init__(self, settings: BenchSettings, subject: Subject, sizes: Sequence[Size]) -> None:
        """Raises SettingsError for steps that the scheduler does not take, and for a rival that there is not here."""
        self._settings, self._subject = settings, subject
        if "grouped-compiled" in settings.against and not subject.compute.compiled:
            raise SettingsError("--against grouped-compiled: nothing is compiled here; add --compile")
        rows = make_rows(settings.table, sizes, subject.sampling)
        steps = {row.params.num_inference_steps for row in rows}
        self._evaluations = {number: subject.evaluations(number) for number in sorted(steps)}
        self._table = Table(rows, work_of(rows, self._evaluations))
        self._sample = spread(rows, SAMPLE)
        self._bare = BareUNet(subject.model, rows[0])

    def go(self) -> Report:
        table, peak = self._count(), self._peak()
        lanes = [self._lane(name) for name in (OURS, *self._settings.against)]
        points: list[SweepPoint] = []
        stopped = False
        try:
            self._time(lanes)
            swept = sweep(self._settings.sweep, self._subject, self._table, self._bare, points)
        except KeyboardInterrupt:  # a stop: what was measured until then is worth its table
            lanes = [lane for lane in lanes if lane.seconds]
            if not lanes:
                raise
            stopped, swept = True, Sweep(points)
        figures = [_figures(lane, lanes[0], table, peak) for lane in lanes]
        memory = self._memory(lanes, swept)
        return Report(self._conditions(), table, peak, figures, self._parity(lanes), swept, memory, stopped)

    def _time(self, lanes: Sequence[Lane]) -> None:
        """Have all lanes render, in turns, and log how long the rest will take."""
        for number, lane in enumerate(lanes, 1):
            log.info("warming up: %s (%d of %d)", lane.name, number, len(lanes))
            lane.warm_up()
        rounds = self._settings.rounds
        waiting = [lane.name for _ in range(rounds) for lane in lanes] + [OURS] * len(self._settings.sweep)
        took: dict[str, float] = {}
        for number in range(rounds):
            for lane in lanes:
                started = time.monotonic()
                lane.run()
                took[waiting.pop(0)] = time.monotonic() - started
                left = tqdm.format_interval(_seconds_for(waiting, took))
                message = "round %d of %d: %s %.1f s; about %s left"
                log.info(message, number + 1, rounds, lane.name, lane.seconds[-1], left)

    def _lane(self, name: str) -> Lane:
        subject, kept = self._subject, frozenset(row.id for row in self._sample)
        with_what = subject.model, subject.compute
        everything = Course(self._table.rows, kept)
        match name:
            case "bare":
                return BareLane(self._bare, self._table, subject)
            case "one-by-one":
                sampled = sum(row_forwards(row, self._evaluations) for row in self._sample)
                course = Course(self._sample, kept, self._table.row_forwards / sampled)
                return RenderingLane(name, PlainDiffusers(*with_what, grouped=False), course, subject)
            case "grouped" | "grouped-compiled":
                compiled = name == "grouped-compiled"
                rival: Contender = PlainDiffusers(*with_what, grouped=True, compiled=compiled)
                return RenderingLane(name, rival, everything, subject)
            case _:
                return RenderingLane(name, Ours(*with_what), everything, subject)

    def _count(self) -> TableFigures:
        model, table = self._subject.model, self._settings.table
        shapes = {size: model.latent_shape(*size) for size in self._table.work}
        return TableFigures(
            rows=len(self._table.rows),
            steps=table.steps,
            unguided=table.unguided,
            work=self._table.work,
            row_forward_tflop={size: denoise_flops(model, shape) / TERA for size, shape in shapes.items()},
            decode_tflop={size: decode_flops(model, shape) / TERA for size, shape in shapes.items()},
        )

    def _peak(self) -> Peak:
        compute, model = self._subject.compute, self._subject.model
        measured = clock.matmul_tflops(model.device, model.dtype)
        if self._settings.peak_tflops is not None:
            return Peak(self._settings.peak_tflops, "given", measured)
        known = peak_flops.dense_tflops(compute.device_name, compute.dtype) if compute.device == "cuda" else None
        return Peak(known, "datasheet", measured) if known else Peak(measured, "measured matmul", measured)

    def _parity(self, lanes: Sequence[Lane]) -> Parity | None:
        """How far our images are from those of the first rival that made some."""
        ours, *others = (lane for lane in lanes if isinstance(lane, RenderingLane))
        if not others:  # none was requested, or a stop came first
            return None
        theirs = others[0]
        largest = max(_furthest(ours.images[name], image) for name, image in theirs.images.items())
        return Parity(len(theirs.images), largest, theirs.name)

    def _memory(self, lanes: Sequence[Lane], swept: Sweep) -> dict[str, int]:
        """The most of all of them: a GPU's count begins anew with each."""
        counts = [lane.device_bytes or 0 for lane in lanes] + [point.device_bytes or 0 for point in swept.points]
        found = peak_memory(self._subject.compute.device)
        return found | ({"device_bytes": max(counts)} if "device_bytes" in found else {})

    def _conditions(self) -> dict[str, Any]:
        subject, settings, compute = self._subject, self._settings, self._subject.compute
        networks = subject.model.networks
        compute = replace(compute, compiled=compute.compiled and is_compiled(networks))
        return {
            "model": subject.name,
            "architecture": settings.architecture,
            "unet_parameters": sum(weight.numel() for weight in networks[0].parameters()),
            "scheduler": subject.model.solver.name,
            "compute": asdict(compute),
            "rounds": settings.rounds,
            "versions": {name: version(name) for name in ("batch-infer", *LIBRARIES)},
        }


def _figures(lane: Lane, ours: Lane, table: TableFigures, peak: Peak) -> Figures:
    seconds = statistics.median(lane.seconds)
    tflop = table.unet_tflop if isinstance(lane, BareLane) else table.tflop
    return Figures(
        name=lane.name,
        seconds=lane.seconds,
        images_per_second=table.rows / seconds,
        mfu=tflop / seconds / peak.tflops,
        mfu_of_matmul=tflop / seconds / peak.matmul_tflops,
        ratio=None if lane is ours else median_ratio(lane.seconds, ours.seconds),
        sampled=lane.sampled,
        device_bytes=lane.device_bytes,
        more=lane.more(),
    )


def _seconds_for(lanes: Sequence[str], took: Mapping[str, float]) -> float:
    """Estimate the seconds of these lanes by their last round, of one that has had none by the mean of the others."""
    mean = statistics.mean(took.values())
    return sum(took.get(lane, mean) for lane in lanes)


def _furthest(image: np.ndarray, other: np.ndarray) -> int:
    """The largest difference in any channel of any pixel, in steps of 1/255."""
    return int(np.abs(image.astype(int) - other.astype(int)).max())
