"""Call functions that need torch in a separate process, since commands that do not render should not load torch."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib.metadata import version
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any, ParamSpec, TypeVar

from batch_infer.autotune.cache import Plateau, Rates, load_calibration, save_calibration
from batch_infer.autotune.calibration import (
    count_cost,
    count_evaluations,
    import_renderer,
    measure_plateau,
    measure_rates,
)
from batch_infer.autotune.devices import detect_device, load_device, read_processor_name, save_device
from batch_infer.errors import ModelError, RowError
from batch_infer.models import ModelCard, SamplingRules, skip_quantization_libraries
from batch_infer.records import PromptRequest, RowCost, digest
from batch_infer.settings import Compute, Device, ImageFormat, SafetySettings
from batch_infer.spawning import START_SECONDS, main_module_hidden
from batch_infer.stopping import STOP_SIGNALS, deferred

P = ParamSpec("P")
Result = TypeVar("Result")


class Probe:
    """Measures in a separate process, which imports torch and is started by the first call that needs it.

    Use it as a context manager, which ends the process. If the process dies, methods raise ModelError.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._processes = set[BaseProcess]()
        self._evaluations: dict[int, int | str] | None = None
        """Model evaluations by step count, or why the scheduler refuses that count, for one model."""
        self._costs: dict[str, RowCost | str] | None = None
        """The same as `_evaluations` for a pipeline without a family, by step count, guidance and negative prompt."""
        self._import_seconds: float | None = None
        self.seconds_waited = 0.0
        """Number of seconds spent starting the process and waiting for its results."""

    def detect_device(self, requested: str) -> Device:
        """Return the device for `--device`. Raises SettingsError if the requested device is missing."""
        if requested == "cpu":
            return Device("cpu", read_processor_name())
        if (device := load_device(requested)) is None:
            device = self._call(detect_device, requested)
            save_device(requested, device)
        return device

    def inspect_pipeline(self, path: Path) -> SamplingRules:
        """Return the sampling rules that diffusers determines for a checkpoint's pipeline. Raises ModelError."""
        try:
            conditions = {"files": _fingerprint_configs(path), **_library_versions()}
        except OSError:  # the other process explains it
            return self._call(_inspect_pipeline, path)
        rules = load_calibration(SamplingRules, conditions, "rules")
        if rules is None:
            rules = self._call(_inspect_pipeline, path)
            save_calibration(conditions, rules, "rules")
        return rules

    def count_evaluations(self, card: ModelCard, steps: int) -> int:
        """Return how often a row evaluates the model. Raises ModelError, and RowError if `steps` is refused."""
        if self._evaluations is None:
            cached = load_calibration(dict[int, int | str], _evaluation_conditions(card), "evaluations")
            self._evaluations = cached or {}
        if steps not in self._evaluations:
            self._evaluations[steps] = self._call(count_evaluations, card, steps)
            save_calibration(_evaluation_conditions(card), self._evaluations, "evaluations")
        count = self._evaluations[steps]
        if isinstance(count, str):
            raise RowError(count)
        return count

    def count_cost(self, card: ModelCard, compute: Compute, request: PromptRequest) -> RowCost:
        """Return the cost of a row. Raises ModelError, and RowError if the model refuses its values."""
        params = request.params
        if not card.uses_pipeline_call:
            return RowCost(self.count_evaluations(card, params.num_inference_steps), params.slots)
        # Whether a row uses guidance matters to its cost, but not the scale.
        scale = 2.0 if params.guidance_scale > 1 else params.guidance_scale
        params = replace(params, guidance_scale=scale, guidance_rescale=0.0)
        negative = None if request.negative_prompt is None else ""
        key = f"{params.num_inference_steps} {params.guidance_scale:g} {negative!r}"
        # Whether rows can share calls may depend on the kernels of the device.
        device = {"device": compute.device_name or compute.device, "dtype": compute.dtype}
        conditions = {**_evaluation_conditions(card), **device, "model": card.fingerprint}
        if self._costs is None:
            self._costs = load_calibration(dict[str, RowCost | str], conditions, "costs") or {}
        if key not in self._costs:
            self._costs[key] = self._call(count_cost, card, compute, params, negative)
            save_calibration(conditions, self._costs, "costs")
        cost = self._costs[key]
        if isinstance(cost, str):
            raise RowError(cost)
        return cost

    def measure_plateau(
        self, card: ModelCard, compute: Compute, safety: SafetySettings, size: tuple[int, int]
    ) -> Plateau:
        """Measure the throughput plateau for a size (height, width). Raises ModelError, SettingsError, RowError."""
        return self._call(measure_plateau, card, compute, safety, size)

    def measure_rates(
        self,
        card: ModelCard,
        compute: Compute,
        safety: SafetySettings,
        image_format: ImageFormat,
        size: tuple[int, int],
    ) -> Rates:
        """Measure the rates for a size (height, width) by rendering full batches. Raises ModelError, SettingsError."""
        if self._import_seconds is None:
            self._call(import_renderer, card)
            self._import_seconds = self.seconds_waited
        rates = self._call(measure_rates, card, compute, safety, image_format, size)
        return replace(rates, start=rates.start + self._import_seconds)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is not None:  # do not wait for a result that is no longer needed
            for process in self._processes:
                process.kill()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _call(self, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """Call a function in the process. The first call starts the process."""
        started = time.perf_counter()
        try:
            if self._pool is None:  # this counts as waiting, since it starts the resource tracker
                self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_end_with_parent)
            # The first call starts the process and a thread. If that were interrupted, the pool could not be shut down.
            with deferred(START_SECONDS), main_module_hidden():
                others = set(active_children())  # a program that calls the Python API may have its own
                future = self._pool.submit(function, *args, **kwargs)
                self._processes |= set(active_children()) - others
            return future.result()
        except BrokenProcessPool as error:
            if self._pool is not None:
                self._pool.shutdown()
            raise ModelError("the process that measures the model has died: is there enough memory?") from error
        finally:
            self.seconds_waited += time.perf_counter() - started


def _evaluation_conditions(card: ModelCard) -> dict[str, Any]:
    """Return everything apart from the step count that determines how often a row evaluates the model."""
    return {
        "scheduler": [card.scheduler_name, card.scheduler_fingerprint],
        "family": card.family,
        "pipeline": card.pipeline,
        **_library_versions(),
    }


def _library_versions() -> dict[str, str]:
    return {name: version(name) for name in ("batch-infer", "torch", "diffusers", "transformers")}


def _fingerprint_configs(path: Path) -> str:
    """Return a digest of the config files of a checkpoint and its components. Raises OSError."""
    files = sorted([*path.glob("*.json"), *path.glob("*/*.json")])
    return digest([(str(file.relative_to(path)), hashlib.sha256(file.read_bytes()).hexdigest()) for file in files])


def _inspect_pipeline(path: Path) -> SamplingRules:
    skip_quantization_libraries(path)
    from batch_infer.models import inspect_pipeline

    return inspect_pipeline(path)


def _end_with_parent() -> None:
    """Ignore stop signals, which the parent handles, and end this process when the parent ends or is killed."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if (parent := parent_process()) is not None:
        Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
