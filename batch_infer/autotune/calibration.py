"""Load a model, measure its speed and count its evaluations. Importing this module does not import torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, cast

from batch_infer.autotune.cache import Plateau, Rates
from batch_infer.autotune.devices import explain_out_of_memory
from batch_infer.errors import RowError
from batch_infer.models import ModelCard, load_solver, skip_quantization_libraries
from batch_infer.records import PromptRequest, RowCost, SamplingParams, Source, utc_now
from batch_infer.settings import Compute, ImageFormat, SafetySettings

if TYPE_CHECKING:
    import numpy as np

    from batch_infer.chain import StepLevelChain
    from batch_infer.models import AnyPipeline, LatentDiffusion

FEW_STEPS = (1, 2, 4, 10, 20)
"""Step counts to try for the short rendering, and in reverse order for the plateau, as a scheduler may refuse some."""
LONG_SECONDS = 1.0
"""Approximate number of seconds for the additional steps, if the short rendering has one step."""
MAX_MORE_STEPS = 25
"""Maximum number of additional steps of the long rendering, unless the scheduler accepts only larger numbers."""
REPEATS = 2
"""Number of timings of each rendering. The shortest counts, since other work on the machine can only prolong them."""

_load_solver = cache(load_solver)


def import_renderer(card: ModelCard) -> None:
    """Import the libraries that a run of this model also imports, so that the probe can time the import."""
    skip_quantization_libraries(card.path, card.quantize)
    from batch_infer.worker import load_model  # noqa: F401


def count_cost(card: ModelCard, compute: Compute, params: SamplingParams, negative_prompt: str | None) -> RowCost | str:
    """Return the cost of a row of a pipeline without a family, or why the pipeline refuses its values.

    Raises ModelError, SettingsError.
    """
    with explain_out_of_memory(card, compute):
        model, _ = _load_model(card, replace(compute, compiled=False))
        try:
            return cast("AnyPipeline", model).count_cost(params, negative_prompt)
        except RowError as error:
            return str(error)


def count_evaluations(card: ModelCard, steps: int) -> int | str:
    """Return how often a row with `steps` steps evaluates the model, or why the scheduler refuses that step count.

    The reason is returned instead of raised, since unpickling the error could import torch in the parent process.
    """
    try:
        return _load_solver(card).table(steps).evaluations
    except RowError as error:
        return str(error)


def measure_plateau(card: ModelCard, compute: Compute, safety: SafetySettings, size: tuple[int, int]) -> Plateau:
    """Return the throughput plateau for a size (height, width) in pixels. Raises ModelError, SettingsError."""
    from torch import OutOfMemoryError

    from batch_infer.autotune.plateau import find_plateau

    with explain_out_of_memory(card, compute):
        # Do not compile: it would hardly change the plateau, but take a minute for each batch size.
        model, _ = _load_model(card, replace(compute, compiled=False), safety)
    params = _make_params(card, size, _first_accepted(card, model, _few_steps(card, FEW_STEPS[::-1])))
    try:
        return find_plateau(model, params)
    except (OutOfMemoryError, RowError):
        # Any sizes will do: not even the smallest batch fits, or the pipeline refuses the size. The run reports it.
        return Plateau(2, 1, utc_now())


def measure_rates(
    card: ModelCard, compute: Compute, safety: SafetySettings, image_format: ImageFormat, size: tuple[int, int]
) -> Rates:
    """Time the rendering of full batches of a size (height, width) in pixels, with few and with many steps.

    The difference is the cost of the additional steps. Raises ModelError, SettingsError.
    """
    from batch_infer.worker import make_chain

    with explain_out_of_memory(card, compute):
        model, start = _load_model(card, compute, safety)
        chain = make_chain(model, compute)
        few_steps = _first_accepted(card, model, _few_steps(card, FEW_STEPS))
        _render(chain, card, size, few_steps)  # warm up, since the first call with a shape takes longer
        short = min(_render(chain, card, size, few_steps)[0] for _ in range(REPEATS))
        more_steps = max(2, min(MAX_MORE_STEPS, round(LONG_SECONDS / short)))
        many_steps = _first_accepted(card, model, _more_steps(card, few_steps, more_steps))
        long, images = min((_render(chain, card, size, many_steps) for _ in range(REPEATS)), key=lambda pair: pair[0])
    few, many = (_count_ticks(card, model, steps) for steps in (few_steps, many_steps))
    # If a pipeline accepts only one step count, all of its time counts as that of denoising.
    tick = max(0.0, long - short) / (many - few) if many > few else short / max(1, few)
    image = max(0.0, short - tick * few) / max(1, len(images))
    encode_seconds, image_bytes = _encode(images, image_format)
    if compute.device == "cpu":  # rendering and encoding share the cores
        image += encode_seconds / compute.threads
    # If the chain had to halve the slots to fit into memory, a run needs several calls to evaluate as many elements.
    tick *= compute.shape_of(*size).slots / chain.batch_sizes.for_size(size)[0]
    return Rates(start, tick, image, image_bytes, utc_now())


def _count_ticks(card: ModelCard, model: LatentDiffusion | AnyPipeline, steps: int) -> int:
    """Return the number of denoiser calls for rows that fill all slots. Raises RowError for a refused step count."""
    if card.uses_pipeline_call:
        params = _make_params(card, (card.sizes.native_height, card.sizes.native_width), steps)
        return cast("AnyPipeline", model).count_cost(params, None).evaluations
    evaluations = count_evaluations(card, steps)
    if isinstance(evaluations, str):
        raise RowError(evaluations)
    return evaluations


def _load_model(
    card: ModelCard, compute: Compute, safety: SafetySettings | None = None
) -> tuple[LatentDiffusion | AnyPipeline, float]:
    """Return a model, and the number of seconds that it took to load. Without `safety`, it has no checker."""
    with_checker = safety is not None and safety.uses_checker(has_checker=card.has_checker)
    return _load_once(card, replace(compute, slots=0, decode_batch=0, by_size=()), with_checker)


@cache
def _load_once(card: ModelCard, compute: Compute, with_checker: bool) -> tuple[LatentDiffusion | AnyPipeline, float]:
    started = time.perf_counter()
    import_renderer(card)
    from batch_infer.worker import load_model

    return load_model(card, compute, with_checker=with_checker), time.perf_counter() - started


def _first_accepted(card: ModelCard, model: LatentDiffusion | AnyPipeline, step_counts: Iterable[int]) -> int:
    """Return the first step count that the model accepts, or its default if it accepts none of them."""
    for steps in step_counts:
        with suppress(RowError):
            _count_ticks(card, model, steps)
            return steps
    return card.num_inference_steps


def _few_steps(card: ModelCard, step_counts: Sequence[int]) -> Sequence[int]:
    """Return step counts to try, beginning for a pipeline without a family with 4: many give no image with fewer."""
    return [min(4, card.num_inference_steps), *step_counts] if card.uses_pipeline_call else step_counts


def _more_steps(card: ModelCard, few: int, more: int) -> Iterable[int]:
    """Return step counts to try for the long rendering. A family's scheduler accepts some count above any other."""
    return [few + more, 2 * few] if card.uses_pipeline_call else range(few + more, 1001)


def _make_params(card: ModelCard, size: tuple[int, int], steps: int) -> SamplingParams:
    guidance_scale = card.guidance_scale if card.uses_pipeline_call else 7.5
    return SamplingParams(*size, steps, guidance_scale, 0.0, card.embedded_guidance)


def _render(
    chain: StepLevelChain, card: ModelCard, size: tuple[int, int], steps: int
) -> tuple[float, list[np.ndarray]]:
    """Render as many rows as fill all slots. Return the elapsed seconds and the images."""
    params = _make_params(card, size, steps)
    rows = range(chain.model.count_rows(chain.batch_sizes.for_size(size)[0], params))
    requests = [PromptRequest(str(i), 0, f"number {i}", None, i, params, Source("", i), "") for i in rows]
    started = time.perf_counter()
    images = [getattr(outcome, "pixels", None) for outcome in chain.render(requests)]
    return time.perf_counter() - started, [pixels for pixels in images if pixels is not None]


def _encode(images: list[np.ndarray], image_format: ImageFormat) -> tuple[float, float]:
    """Encode images in memory. Return the mean seconds per image and the mean file size in bytes."""
    from batch_infer.images import encode

    if not images:  # no row has an image; a run reports the reason for each row
        return 0.0, 0.0
    started = time.perf_counter()
    sizes = [len(encode(pixels, image_format, "")) for pixels in images]
    return (time.perf_counter() - started) / len(images), sum(sizes) / len(images)
