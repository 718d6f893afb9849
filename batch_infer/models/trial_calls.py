"""Trial calls of a pipeline at load: can rows share a call, do seeds decide all noise, do the components fit."""

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
"""Errors of a pipeline or its scheduler for values that it does not support."""

Arguments = Mapping[str, Any]
Operation = tuple[str, tuple[tuple[int, ...], ...]]
"""A torch operation and the shapes of its input and output tensors."""


def can_share_calls(pipeline: Any, denoiser: torch.nn.Module | None, path: Path, arguments: Arguments) -> bool:
    """Return whether rows can share a call without depending on each other's text lengths.

    Also decodes one image. Raises ModelError, naming the checkpoint `path`, where the components do not fit together,
    and where noise is drawn that no row's generator gives.
    """
    with _restored_processors(denoiser):
        try:
            with out_of_memory_errors():
                uniform = has_one_shape(pipeline, arguments)
        except LOADING_ERRORS as error:
            if isinstance(error, torch.OutOfMemoryError) or is_device_fault(error):
                raise
            _refuse_misfit(pipeline, denoiser, path, arguments)
            uniform = False
        if denoiser is not None and getattr(pipeline, "vae", None) is not None:
            _try_decoder(pipeline, denoiser, path, arguments)
    return uniform


def has_one_shape(pipeline: Any, arguments: Arguments) -> bool:
    """Return whether calls do the same operations on the same shapes for texts of different lengths.

    Operations are recorded up to the end of the first step. Raises ModelError where one draws noise that no row's
    generator gives.
    """
    short, longer = (_record(pipeline, {**arguments, "prompt": [text]}) for text in TEXTS)
    return short == longer


def _record(pipeline: Any, arguments: Arguments) -> list[Operation]:
    recorder = _OperationRecorder()
    with recorder:
        _take_first_step(pipeline, arguments)
    if recorder.drawn:
        parts = (pipeline, getattr(pipeline, "scheduler", None))
        name = " with ".join(type(part).__name__ for part in parts if part)
        raise ModelError(
            f"{name} draws noise ({recorder.drawn}) that no row's seed decides, so that no image could be made again; "
            "try another --scheduler"
        )
    return recorder.operations


class _OperationRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation on floating-point results, with the shapes of its inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.drawn: str | None = None
        """An operation that drew from the global generator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.overloadpacket.__name__ in RANDOM_OPERATIONS and kwargs.get("generator") is None:
            self.drawn = func.overloadpacket.__name__
        # Operations on integers only count: tokens, whose number is the length of the text, and positions.
        if any(leaf.is_floating_point() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)):
            self.operations.append((str(func), _shapes((args, kwargs, output))))
        return output


def _shapes(values: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


class _FirstStepDone(BaseException):
    """Ends a call after its first step; no pipeline catches it."""


def _take_first_step(pipeline: Any, arguments: Arguments) -> None:
    """Call a pipeline up to the end of its scheduler's first step, or completely where it has no scheduler."""
    scheduler: Any = getattr(pipeline, "scheduler", None)
    if not hasattr(scheduler, "step"):
        _call(pipeline, arguments)
        return
    step = scheduler.step

    @functools.wraps(step)  # pipelines inspect its signature
    def last(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        raise _FirstStepDone

    scheduler.step = last
    try:
        with suppress(_FirstStepDone):
            _call(pipeline, arguments)
    finally:
        del scheduler.step


def _call(pipeline: Any, arguments: Arguments) -> None:
    generator = [torch.Generator("cpu").manual_seed(0)]
    pipeline(**{"prompt": [TEXTS[0]], **arguments}, generator=generator, output_type="np")


def _refuse_misfit(pipeline: Any, denoiser: torch.nn.Module | None, path: Path, arguments: Arguments) -> None:
    """Take a step without recording. Raises ModelError for an error that is not about these arguments.

    Before its first denoiser evaluation a pipeline may refuse the size, and rows may have another.
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
    """Decode one image. Raises ModelError for a decoder that does not fit.

    After the first denoiser evaluation for each shape of its inputs, others return its output: the call costs about one
    step and one decoded image.
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
        with out_of_memory_errors(), suppress(*LOADING_ERRORS):  # other errors are `_refuse_misfit`'s
            _call(pipeline, arguments)
    finally:
        del pipeline.vae.decode, denoiser.forward


@contextmanager
def _restored_processors(denoiser: Any) -> Iterator[None]:
    """Restore the denoiser's attention processors, which some pipelines replace during their call."""
    processors = dict(getattr(denoiser, "attn_processors", {}))
    try:
        yield
    finally:
        if processors:
            denoiser.set_attn_processor(processors)
