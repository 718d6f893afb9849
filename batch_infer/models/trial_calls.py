"""Call a loaded pipeline to find out whether rows can share calls, seeds determine all noise and components fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batch_infer.accelerator import is_device_error, out_of_memory_errors
from batch_infer.errors import ModelError
from batch_infer.models.untrusted import LOADING_ERRORS, loading_errors

TEXTS = ("a", "a red circle beside two blue squares")
"""Two texts of different lengths, shorter than the limits of common text encoders."""
RANDOM_OPERATIONS = {
    *("randn", "randn_like", "rand", "rand_like", "randint", "randint_like", "randperm", "normal", "normal_"),
    *("uniform_", "random_", "exponential_", "bernoulli", "bernoulli_", "multinomial"),
}
REFUSALS = (ValueError, IndexError, ZeroDivisionError, AssertionError, NotImplementedError)
"""Errors that a pipeline or scheduler raises for unsupported values."""

Arguments = Mapping[str, Any]
Operation = tuple[str, tuple[tuple[int, ...], ...]]
"""A torch operation's name and the shapes of its input and output tensors."""


def can_share_calls(pipeline: Any, denoiser: Any, path: Path, arguments: Arguments) -> bool:
    """Return whether rows can share a call without depending on each other's text lengths.

    Also decodes one image to try the VAE, if the pipeline has one and `denoiser` is known. Raises ModelError if the
    components do not fit together, naming the checkpoint `path`, or if the pipeline draws noise from the global
    generator.
    """
    processors = dict(getattr(denoiser, "attn_processors", {}))
    try:
        try:
            with out_of_memory_errors():
                has_uniform_shapes = has_one_shape(pipeline, arguments)
        except LOADING_ERRORS as error:
            if is_device_error(error):
                raise
            _refuse_misfit(pipeline, denoiser, path, arguments)
            has_uniform_shapes = False
        if denoiser is not None and getattr(pipeline, "vae", None) is not None:
            _try_decoder(pipeline, denoiser, path, arguments)
    finally:
        if processors:  # some pipelines replace them during a call
            denoiser.set_attn_processor(processors)
    return has_uniform_shapes


def has_one_shape(pipeline: Any, arguments: Arguments) -> bool:
    """Return whether calls for texts of different lengths perform the same operations on the same shapes.

    Operations with floating-point results are compared, until the end of the first step. Raises ModelError if an
    operation draws noise from the global generator instead of a row's generator.
    """
    recordings: list[list[Operation]] = []
    for text in TEXTS:
        with _OperationRecorder() as recorder:
            _take_first_step(pipeline, {**arguments, "prompt": [text]})
        if recorder.unseeded_operation:
            parts = (pipeline, getattr(pipeline, "scheduler", None))
            name = " with ".join(type(part).__name__ for part in parts if part)
            raise ModelError(
                f"{name} draws noise ({recorder.unseeded_operation}) that does not depend on the row's seed, so its "
                "images could not be reproduced; try another --scheduler"
            )
        recordings.append(recorder.operations)
    return recordings[0] == recordings[1]


class _OperationRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation with a floating-point result, and the shapes of its inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.unseeded_operation: str | None = None
        """Name of the last operation that drew from the global generator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.overloadpacket.__name__ in RANDOM_OPERATIONS and kwargs.get("generator") is None:
            self.unseeded_operation = func.overloadpacket.__name__
        # Skip operations with integer results, such as token ids, because their number depends on the text.
        if any(leaf.is_floating_point() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)):
            self.operations.append((str(func), _shapes((args, kwargs, output))))
        return output


def _shapes(values: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


class _FirstStepDone(BaseException):
    """Ends a call after its first step. Pipelines do not catch a BaseException."""


def _take_first_step(pipeline: Any, arguments: Arguments) -> None:
    """Call a pipeline until the end of its scheduler's first step, or completely if it has no scheduler."""
    scheduler: Any = getattr(pipeline, "scheduler", None)
    if not hasattr(scheduler, "step"):
        _call(pipeline, arguments)
        return
    step = scheduler.step

    def step_once(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        raise _FirstStepDone

    with suppress(_FirstStepDone), _replaced(scheduler, "step", step_once):
        _call(pipeline, arguments)


def _call(pipeline: Any, arguments: Arguments) -> None:
    generator = [torch.Generator("cpu").manual_seed(0)]
    pipeline(**{"prompt": [TEXTS[0]], **arguments}, generator=generator, output_type="np")


def _refuse_misfit(pipeline: Any, denoiser: Any, path: Path, arguments: Arguments) -> None:
    """Repeat the first step without recording. Raises ModelError for an error that the arguments do not cause.

    Ignores refusals before the first denoiser evaluation: they may concern the size, and rows may have other sizes.
    """
    evaluations: list[None] = []
    hook: Any = nullcontext()
    if denoiser is not None:
        hook = denoiser.register_forward_pre_hook(lambda *_: evaluations.append(None))
    with loading_errors(f"{path}: {type(pipeline).__name__}"), out_of_memory_errors(), hook:
        try:
            _take_first_step(pipeline, arguments)
        except REFUSALS:
            if evaluations:
                raise


def _try_decoder(pipeline: Any, denoiser: torch.nn.Module, path: Path, arguments: Arguments) -> None:
    """Decode one image, unless the call fails earlier. Raises ModelError if the decoder does not fit.

    The denoiser runs once per input shape and its output is reused, so the call takes about as long as one step and one
    decoded image.
    """
    decode, evaluate = pipeline.vae.decode, denoiser.forward
    outputs: dict[object, Any] = {}

    def try_decode(*args: Any, **kwargs: Any) -> Any:
        with loading_errors(f"{path}: vae of {type(pipeline).__name__}"):
            return decode(*args, **kwargs)

    def replay(*args: Any, **kwargs: Any) -> Any:
        key = _shapes((args, kwargs))
        if key not in outputs:
            outputs[key] = evaluate(*args, **kwargs)
        return outputs[key]

    with (
        _replaced(pipeline.vae, "decode", try_decode),
        _replaced(denoiser, "forward", replay),
        out_of_memory_errors(),
        suppress(*LOADING_ERRORS),  # only the decoder is tried here
    ):
        _call(pipeline, arguments)


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Temporarily replace a method of an object by a function.

    The function gets the method's signature, because pipelines inspect it. An object may have its own method instead of
    its class's, such as the `forward` of a network with accelerate's hooks.
    """
    own = vars(owner).get(name)
    setattr(owner, name, functools.wraps(getattr(owner, name))(function))
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)
