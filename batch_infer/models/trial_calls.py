"""Call a pipeline after loading to check that rows can share calls, seeds decide all noise and components fit."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batch_infer.accelerator import is_device_fault, out_of_memory_errors
from batch_infer.errors import ModelError
from batch_infer.models.untrusted import LOADING_ERRORS, LoadingErrors

TEXTS = ("a", "a red circle beside two blue squares")
"""Two texts of different lengths, short enough for every model."""
RANDOM_OPERATIONS = {
    *("randn", "randn_like", "rand", "rand_like", "randint", "randint_like", "randperm", "normal", "normal_"),
    *("uniform_", "random_", "exponential_", "bernoulli", "bernoulli_", "multinomial"),
}
REFUSALS = (ValueError, IndexError, ZeroDivisionError, AssertionError, NotImplementedError)
"""Errors that a pipeline or scheduler raises for unsupported values."""

Arguments = Mapping[str, Any]
Operation = tuple[str, tuple[tuple[int, ...], ...]]
"""Name of a torch operation, and shapes of its input and output tensors."""


def can_share_calls(pipeline: Any, denoiser: torch.nn.Module | None, path: Path, arguments: Arguments) -> bool:
    """Return whether rows can share a call without depending on each other's text lengths.

    Also decodes one image. Raises ModelError, naming the checkpoint `path`, if the components do not fit together, and
    if the pipeline draws noise from the global generator.
    """
    with _restored_processors(denoiser):
        try:
            with out_of_memory_errors():
                has_uniform_shapes = has_one_shape(pipeline, arguments)
        except LOADING_ERRORS as error:
            if isinstance(error, torch.OutOfMemoryError) or is_device_fault(error):
                raise
            _refuse_misfit(pipeline, denoiser, path, arguments)
            has_uniform_shapes = False
        if denoiser is not None and getattr(pipeline, "vae", None) is not None:
            _try_decoder(pipeline, denoiser, path, arguments)
    return has_uniform_shapes


def has_one_shape(pipeline: Any, arguments: Arguments) -> bool:
    """Return whether calls for texts of different lengths perform the same operations on the same shapes.

    Operations are recorded until the end of the first step. Raises ModelError if one draws noise from the global
    generator instead of a row's generator.
    """
    short, long = (_record(pipeline, {**arguments, "prompt": [text]}) for text in TEXTS)
    return short == long


def _record(pipeline: Any, arguments: Arguments) -> list[Operation]:
    recorder = _OperationRecorder()
    with recorder:
        _take_first_step(pipeline, arguments)
    if recorder.unseeded_operation:
        parts = (pipeline, getattr(pipeline, "scheduler", None))
        name = " with ".join(type(part).__name__ for part in parts if part)
        raise ModelError(
            f"{name} draws noise ({recorder.unseeded_operation}) that no row's seed decides, so that no image could be "
            "made again; try another --scheduler"
        )
    return recorder.operations


class _OperationRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation with a floating-point result, and the shapes of its inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.unseeded_operation: str | None = None
        """The last operation that drew from the global generator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.overloadpacket.__name__ in RANDOM_OPERATIONS and kwargs.get("generator") is None:
            self.unseeded_operation = func.overloadpacket.__name__
        # Skips operations on integers: these are tokens, whose number depends on the text length, and positions.
        if any(leaf.is_floating_point() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)):
            self.operations.append((str(func), _shapes((args, kwargs, output))))
        return output


def _shapes(values: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


class _FirstStepDone(BaseException):
    """Ends a call after its first step. As a BaseException it is not caught by pipelines."""


def _take_first_step(pipeline: Any, arguments: Arguments) -> None:
    """Call a pipeline until the end of its scheduler's first step, or completely if it has no scheduler."""
    scheduler: Any = getattr(pipeline, "scheduler", None)
    if not hasattr(scheduler, "step"):
        _call(pipeline, arguments)
        return
    step = scheduler.step

    @functools.wraps(step)  # pipelines inspect its signature
    def step_once(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        raise _FirstStepDone

    scheduler.step = step_once
    try:
        with suppress(_FirstStepDone):
            _call(pipeline, arguments)
    finally:
        del scheduler.step


def _call(pipeline: Any, arguments: Arguments) -> None:
    generator = [torch.Generator("cpu").manual_seed(0)]
    pipeline(**{"prompt": [TEXTS[0]], **arguments}, generator=generator, output_type="np")


def _refuse_misfit(pipeline: Any, denoiser: torch.nn.Module | None, path: Path, arguments: Arguments) -> None:
    """Repeat the first step without recording. Raises ModelError for an error that the arguments do not cause.

    Refusals before the first denoiser evaluation are ignored: they may concern the size, and rows may have other sizes.
    """
    evaluations: list[None] = []
    hook = denoiser and denoiser.register_forward_pre_hook(lambda *_: evaluations.append(None))
    with LoadingErrors(f"{path}: {type(pipeline).__name__}"), out_of_memory_errors():
        try:
            _take_first_step(pipeline, arguments)
        except REFUSALS:
            if evaluations:
                raise
        finally:
            if hook:
                hook.remove()


def _try_decoder(pipeline: Any, denoiser: torch.nn.Module, path: Path, arguments: Arguments) -> None:
    """Decode one image. Raises ModelError if the decoder does not fit.

    The denoiser runs once per input shape and its output is reused, so that the call costs about one step and one
    decoded image.
    """
    decode, evaluate = pipeline.vae.decode, denoiser.forward
    outputs: dict[object, Any] = {}

    @functools.wraps(decode)
    def try_decode(*args: Any, **kwargs: Any) -> Any:
        with LoadingErrors(f"{path}: vae of {type(pipeline).__name__}"):
            return decode(*args, **kwargs)

    @functools.wraps(evaluate)  # pipelines inspect its signature
    def replay(*args: Any, **kwargs: Any) -> Any:
        key = _shapes((args, kwargs))
        if key not in outputs:
            outputs[key] = evaluate(*args, **kwargs)
        return outputs[key]

    pipeline.vae.decode, denoiser.forward = try_decode, replay
    try:
        with out_of_memory_errors(), suppress(*LOADING_ERRORS):  # `_refuse_misfit` raises other errors
            _call(pipeline, arguments)
    finally:
        del pipeline.vae.decode, denoiser.forward


@contextmanager
def _restored_processors(denoiser: Any) -> Iterator[None]:
    """Restore the denoiser's attention processors, which some pipelines replace during a call."""
    processors = dict(getattr(denoiser, "attn_processors", {}))
    try:
        yield
    finally:
        if processors:
            denoiser.set_attn_processor(processors)
