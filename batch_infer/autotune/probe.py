"""A process beside this one that knows torch, asked by commands that render nothing and so load none of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from batch_infer import main_guard
from batch_infer.autotune.calibration import Plateau, Rates
from batch_infer.autotune.facts import (
    recall_device,
    recall_evaluations,
    remember_device,
    remember_evaluations,
)
from batch_infer.autotune.processor import processor_name
from batch_infer.errors import ModelError, RowError, SettingsError
from batch_infer.models import ModelCard, SamplingRules
from batch_infer.records import PromptRequest, SamplingParams, Source, utc_now
from batch_infer.settings import Compute, Device, ImageFormat, SafetySettings
from batch_infer.stopping import STOP_SIGNALS

if TYPE_CHECKING:
    import numpy as np

    from batch_infer.chain import PipelineCallChain, StepLevelChain
    from batch_infer.diffusion import Solver
    from batch_infer.models import AnyPipeline, LatentDiffusion

P = ParamSpec("P")
Answer = TypeVar("Answer")

FEW_STEPS = (1, 2, 4, 10, 20)
LONG_SECONDS = 1.0
MOST_STEPS = 25
REPEATS = 2
"""A calibration renders at the fewest steps that the scheduler takes, and then at so many more as take so long.

The quickest of each counts: other work on the machine only ever adds.
"""


class Probe:
    """Answers what only torch can tell, from what earlier commands have kept where that is enough.

    Its process starts with the first question that is left, and ends with `close`.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._others = set(active_children())
        self._evaluations: dict[int, int | str] = {}
        self._card: ModelCard | None = None
        self._new_evaluations = False
        self.seconds_waited = 0.0
        """Seconds spent waiting for answers."""
        self._set_up: float | None = None

    def find_device(self, asked: str) -> Device:
        """Raises SettingsError where what was asked for is not there."""
        if asked == "cpu":
            return Device("cpu", processor_name())
        if (device := recall_device(asked)) is None:
            device = self._ask(_find_device, asked)
            remember_device(asked, device)
        return device

    def read_pipeline_facts(self, path: Path) -> SamplingRules:
        """What a checkpoint's pipeline takes, where only diffusers can tell. Raises ModelError."""
        return self._ask(_facts, path)

    def count_evaluations(self, card: ModelCard, steps: int) -> int:
        """How often a row of so many steps asks the model. Raises RowError where the scheduler refuses them."""
        if card.uses_pipeline_call:  # only the call knows its evaluations per step: count one for each
            return steps
        if self._card is None:
            self._card, self._evaluations = card, recall_evaluations(card)
        found = self._evaluations.get(steps)
        if found is None:
            found = self._evaluations[steps] = self._ask(_evaluations, card, steps)
            self._new_evaluations = True
        if isinstance(found, str):
            raise RowError(found)
        return found

    def find_plateau(self, card: ModelCard, compute: Compute, safety: SafetySettings, size: tuple[int, int]) -> Plateau:
        """Try out how many slots, and images in a decoder call, this (height, width) wants. Raises ModelError."""
        return self._ask(_knee, card, compute, safety, size)

    def measure_rates(
        self,
        card: ModelCard,
        compute: Compute,
        safety: SafetySettings,
        image_format: ImageFormat,
        size: tuple[int, int],
    ) -> Rates:
        """Render a few images of this (height, width) and see what it takes. Raises ModelError."""
        if self._set_up is None:  # a run imports what the process has been waited for until here
            self._ask(_import_renderer)
            self._set_up = self.seconds_waited
        found = self._ask(_rates, card, compute, safety, image_format, size)
        return replace(found, start=found.start + self._set_up)

    def close(self) -> None:
        if self._card is not None and self._new_evaluations:
            remember_evaluations(self._card, self._evaluations)
            self._new_evaluations = False
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # nobody waits for the answer any more
            for process in set(active_children()) - self._others:
                process.kill()
        self.close()

    def _ask(self, question: Callable[P, Answer], *args: P.args, **kwargs: P.kwargs) -> Answer:
        started = time.perf_counter()
        processes: set[BaseProcess] = set()
        try:
            if self._pool is None:  # making one starts multiprocessing's resource tracker, a process too
                context = get_context("spawn")
                self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_live_with_the_parent)
            answer = self._pool.submit(question, *args, **kwargs)
            processes = set(active_children()) - self._others
            return answer.result()
        except BrokenProcessPool as error:
            if self._pool is not None:
                self._pool.shutdown()  # joins the process: until then its exit code may be unknown
            if main_guard.EXIT_CODE in [process.exitcode for process in processes]:
                raise SettingsError(main_guard.ADVICE) from error
            raise ModelError("the process that was to try the model out has died; is there enough memory?") from error
        finally:
            self.seconds_waited += time.perf_counter() - started


# What follows runs in the other process.


def _live_with_the_parent() -> None:
    """Leave signals to the parent, and end when it ends, however that comes."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _find_device(asked: str) -> Device:
    from batch_infer.autotune.devices import find_device

    return find_device(asked)


def _import_renderer() -> None:
    from batch_infer.worker import load_any_model  # noqa: F401


def _facts(path: Path) -> SamplingRules:
    from batch_infer.models import inspect_pipeline

    return inspect_pipeline(path)


def _evaluations(card: ModelCard, steps: int) -> int | str:
    """Or why not: the scheduler's own error would have torch imported where it arrives."""
    if card.uses_pipeline_call:
        return steps
    try:
        return _solver(card).table(steps).evaluations
    except RowError as error:
        return str(error)


@cache
def _solver(card: ModelCard) -> Solver:
    from batch_infer.models import load_solver

    return load_solver(card)


def _model(card: ModelCard, compute: Compute, safety: SafetySettings) -> tuple[LatentDiffusion | AnyPipeline, float]:
    """A loaded model, and the seconds that it took."""
    with_checker = safety.asks_checker(has_checker=card.has_checker)
    return _load(card, replace(compute, slots=0, decode_batch=0, by_size=()), with_checker)


@cache
def _load(card: ModelCard, compute: Compute, with_checker: bool) -> tuple[LatentDiffusion | AnyPipeline, float]:
    started = time.perf_counter()
    from batch_infer.worker import load_any_model

    return load_any_model(card, compute, with_checker=with_checker), time.perf_counter() - started


def _knee(card: ModelCard, compute: Compute, safety: SafetySettings, size: tuple[int, int]) -> Plateau:
    from torch import OutOfMemoryError

    from batch_infer.autotune.plateau import find_pipeline_plateau, find_plateau
    from batch_infer.models import AnyPipeline

    with _told_of_memory():
        # Not compiled: that moves the knee little, and would take a minute for each size of batch that is tried.
        model, _ = _model(card, replace(compute, compiled=False), safety)
    params = _params(card, size, _few(card, FEW_STEPS[::-1]))
    try:
        return find_pipeline_plateau(model, params) if isinstance(model, AnyPipeline) else find_plateau(model, params)
    except OutOfMemoryError:  # of this size alone: the run fails its rows, and no others
        return Plateau(2, 1, utc_now())


def _rates(
    card: ModelCard, compute: Compute, safety: SafetySettings, image_format: ImageFormat, size: tuple[int, int]
) -> Rates:
    """Time full slots at few steps and at many: the difference is the steps', the rest the images'."""
    from batch_infer.worker import make_chain

    with _told_of_memory():
        model, start = _model(card, compute, safety)
        chain = make_chain(model, compute)
        few = _few(card, FEW_STEPS)
        _render(chain, card, size, few)  # the first call of a shape sets things up
        short = min(_render(chain, card, size, few)[0] for _ in range(REPEATS))
        many = _first_taken(card, range(few + max(2, min(MOST_STEPS, round(LONG_SECONDS / short))), 1001))
        long, images = min((_render(chain, card, size, many) for _ in range(REPEATS)), key=lambda timed: timed[0])
    asked = {steps: int(_evaluations(card, steps)) for steps in (few, many)}
    tick = max(0.0, long - short) / (asked[many] - asked[few])
    image = max(0.0, short - tick * asked[few]) / max(1, len(images))
    storing, stored = _store(images, image_format)
    if compute.device == "cpu":  # it is done beside the rendering, but by the same cores
        image += storing / compute.threads
    # Where memory did not hold the slots, a run makes as many more calls as it has fewer of them.
    tick *= compute.shape_of(*size).slots / chain.shape.of(size)[0]
    return Rates(start, tick, image, stored, utc_now())


@contextmanager
def _told_of_memory() -> Iterator[None]:
    """An error that is known where torch is not. Raises SettingsError."""
    from torch import OutOfMemoryError

    from batch_infer.autotune.devices import explain_out_of_memory

    try:
        yield
    except OutOfMemoryError as error:
        raise explain_out_of_memory(error) from None


def _first_taken(card: ModelCard, counts: Iterable[int]) -> int:
    """The first of these step counts that the scheduler takes."""
    return next(steps for steps in counts if isinstance(_evaluations(card, steps), int))


def _few(card: ModelCard, counts: Iterable[int]) -> int:
    """A small number of steps that the model takes; of a driven one that is not known, but these are seldom refused."""
    return min(4, card.num_inference_steps) if card.uses_pipeline_call else _first_taken(card, counts)


def _params(card: ModelCard, size: tuple[int, int], steps: int) -> SamplingParams:
    guidance = card.guidance_scale if card.uses_pipeline_call else 7.5
    return SamplingParams(*size, steps, guidance, 0.0, card.embedded_guidance)


def _render(
    chain: StepLevelChain | PipelineCallChain, card: ModelCard, size: tuple[int, int], steps: int
) -> tuple[float, list[np.ndarray]]:
    """The seconds that it takes to fill all slots once and to empty them, and the images."""
    params = _params(card, size, steps)
    rows = range(chain.shape.of(size)[0] // params.slots)
    requests = [PromptRequest(str(i), 0, f"number {i}", None, i, params, Source("", i), "") for i in rows]
    started = time.perf_counter()
    found = [getattr(outcome, "pixels", None) for outcome in chain.render(requests)]
    return time.perf_counter() - started, [pixels for pixels in found if pixels is not None]


def _store(pixels: list[np.ndarray], image_format: ImageFormat) -> tuple[float, float]:
    """The seconds that compressing an image takes, and its length in bytes."""
    from batch_infer.images import encode

    if not pixels:  # none that is finite: the run will say so, row by row
        return 0.0, 0.0
    started = time.perf_counter()
    lengths = [len(encode(image, image_format, "")) for image in pixels]
    return (time.perf_counter() - started) / len(pixels), sum(lengths) / len(pixels)
