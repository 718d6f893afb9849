"""Call a loaded pipeline to find out whether its components fit together, and seeds determine all noise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from batch_infer.accelerator import is_device_error, out_of_memory_errors
from batch_infer.errors import ModelError
from batch_infer.models.untrusted import LOADING_ERRORS, describe, loading_errors
from batch_infer.stacking import find_networks, record_pipeline, replaced_method, take_first_step

log = logging.getLogger(__name__)

TRIAL_TEXT = "a red circle"
RANDOM_OPERATIONS = {
    *("randn", "randn_like", "rand", "rand_like", "randint", "randint_like", "randperm", "normal", "normal_"),
    *("uniform_", "random_", "exponential_", "bernoulli", "bernoulli_", "multinomial"),
}
REFUSALS = (ValueError, IndexError, ZeroDivisionError, AssertionError, NotImplementedError)
"""Errors that a pipeline or scheduler raises for unsupported values."""

Result = TypeVar("Result")
MakeTrialArguments = Callable[[Sequence[str], bool], dict[str, Any]]
"""Returns the arguments of a trial call for prompts, with or without guidance."""
MakeArguments = Callable[[], Mapping[str, Any]]
"""Returns the arguments of a call for one prompt, with a new generator."""


def check_pipeline(
    pipeline: Any, denoiser: Any, make_arguments: MakeArguments, replaced_scheduler: Any | None = None
) -> None:
    """Check that a pipeline's components fit together, and that the rows' generators determine all noise.

    `replaced_scheduler` is the checkpoint's scheduler if --scheduler replaced it. Raises ModelError. Also decodes one
    image to try the VAE, if the pipeline has one and `denoiser` is known.
    """
    try:
        with out_of_memory_errors():
            _refuse_unseeded_noise(pipeline, make_arguments)
    except LOADING_ERRORS as error:
        if is_device_error(error):
            raise
        refusal = _refuse_misfit(pipeline, denoiser, make_arguments)
        if refusal is not None and replaced_scheduler is not None:
            _refuse_scheduler(pipeline, make_arguments, replaced_scheduler, refusal)
    if denoiser is not None and getattr(pipeline, "vae", None) is not None:
        _try_decoder(pipeline, make_arguments)


def call_within_memory(
    call: Callable[[MakeTrialArguments], Result], native: MakeTrialArguments, small: MakeTrialArguments
) -> Result:
    """Make trial calls at the native size, or at a small size if memory is too small.

    Raises torch.OutOfMemoryError if memory is too small for the small size, too. If the rows ran alone then, their
    bytes would depend on what else uses the memory at that moment.
    """
    with suppress(torch.OutOfMemoryError):
        return call(native)
    torch.cuda.empty_cache()
    log.warning("memory is too small for trial calls at the model's own size, so they are made at a small size")
    return call(small)


@contextmanager
def kept_processors(denoiser: Any) -> Iterator[None]:
    """Restore the denoiser's attention processors, which some pipelines replace during a call."""
    processors = dict(getattr(denoiser, "attn_processors", {}))
    try:
        yield
    finally:
        if processors:
            denoiser.set_attn_processor(processors)


def _refuse_unseeded_noise(pipeline: Any, make_arguments: MakeArguments) -> None:
    """Raise ModelError if the first step draws noise from the global generator instead of the row's."""
    with _RandomnessRecorder() as recorder:
        take_first_step(pipeline, make_arguments())
    if recorder.operation:
        parts = (pipeline, getattr(pipeline, "scheduler", None))
        name = " with ".join(type(part).__name__ for part in parts if part)
        raise ModelError(
            f"{name} draws noise ({recorder.operation}) that does not depend on the row's seed, so its images could "
            "not be reproduced; try another --scheduler"
        )


class _RandomnessRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the name of the last operation that drew from the global generator."""

    operation: str | None = None

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in RANDOM_OPERATIONS and kwargs.get("generator") is None:
            self.operation = func.overloadpacket.__name__
        return func(*args, **kwargs)


def _refuse_misfit(pipeline: Any, denoiser: Any, make_arguments: MakeArguments) -> Exception | None:
    """Repeat the first step without recording. Raises ModelError for an error that the arguments do not cause.

    Returns a refusal before the first denoiser evaluation: it may concern the size, and rows may have other sizes.
    """
    evaluations: list[None] = []
    hook: Any = nullcontext()
    if denoiser is not None:
        hook = denoiser.register_forward_pre_hook(lambda *_: evaluations.append(None))
    with loading_errors(_describe(pipeline, type(pipeline).__name__)), out_of_memory_errors(), hook:
        try:
            take_first_step(pipeline, make_arguments())
        except REFUSALS as error:
            if evaluations:
                raise
            return error
    return None


def _refuse_scheduler(pipeline: Any, make_arguments: MakeArguments, replaced: Any, refusal: Exception) -> None:
    """Raise ModelError if the pipeline accepts the arguments with the scheduler that --scheduler replaced."""
    scheduler, pipeline.scheduler = pipeline.scheduler, replaced
    try:
        name = type(pipeline).__name__
        with loading_errors(_describe(pipeline, name)), out_of_memory_errors(), suppress(*REFUSALS):
            take_first_step(pipeline, make_arguments())
            raise ModelError(f"{name} does not support --scheduler {type(scheduler).__name__}: {describe(refusal)}")
    finally:
        pipeline.scheduler = scheduler


def _try_decoder(pipeline: Any, make_arguments: MakeArguments) -> None:
    """Decode one image, unless the call fails earlier. Raises ModelError if the decoder does not fit.

    The call takes about as long as one step and one decoded image. See `record_pipeline`.
    """
    decode = pipeline.vae.decode

    def try_decode(*args: Any, **kwargs: Any) -> Any:
        with loading_errors(_describe(pipeline, f"vae of {type(pipeline).__name__}")):
            return decode(*args, **kwargs)

    denoisers = [network for network in find_networks(pipeline) if network.kind == "denoise"]
    with (
        replaced_method(pipeline.vae, "decode", try_decode),
        out_of_memory_errors(),
        suppress(*LOADING_ERRORS),  # only the decoder is tried here
    ):
        record_pipeline(pipeline, denoisers, make_arguments())


def _describe(pipeline: Any, part: str) -> str:
    return f"{pipeline.config.get('_name_or_path', '')}: {part}"
