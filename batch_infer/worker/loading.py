"""Loading: a model on its device, and the chain that renders with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast, overload

import torch

from batch_infer.accelerator import limit_memory, out_of_memory_errors, set_float32_precision
from batch_infer.chain import ChainShape, GatedChain, Grace, PipelineCallChain, StepLevelChain
from batch_infer.models import ModelCard, load_checker, load_latent_diffusion, optimize_networks
from batch_infer.safety import ImageChecker, gate_of
from batch_infer.settings import Compute, SafetySettings

if TYPE_CHECKING:
    from batch_infer.models import AnyPipeline, LatentDiffusion


def load_chain(
    card: ModelCard, compute: Compute, safety: SafetySettings, stop: Callable[[], bool] = lambda: False
) -> StepLevelChain | PipelineCallChain | GatedChain:
    """A model on its device, with its judge and its gate where there are to be. Raises ModelError, SettingsError."""
    with_checker = safety.asks_checker(has_checker=card.has_checker)
    chain = make_chain(load_any_model(card, compute, with_checker=with_checker), compute, stop)
    grace = Grace(stop)
    gate = gate_of(safety.service, grace)
    return chain if gate is None else GatedChain(chain, gate, stop, grace)


def load_any_model(card: ModelCard, compute: Compute, *, with_checker: bool) -> LatentDiffusion | AnyPipeline:
    """As `load_model`, and also what is driven by diffusers' own pipeline."""
    if not card.uses_pipeline_call:
        return load_model(card, compute, with_checker=with_checker)
    device, dtype = prepare_torch(compute)
    from batch_infer.models import AnyPipeline

    with out_of_memory_errors():
        return AnyPipeline.load(card, device, dtype, with_checker=with_checker)


def load_model(card: ModelCard, compute: Compute, *, with_checker: bool) -> LatentDiffusion:
    """A model on its device, and its checker where images are to be judged. Raises ModelError."""
    device, dtype = prepare_torch(compute)
    with out_of_memory_errors():
        model = load_latent_diffusion(card, device, dtype, with_checker=with_checker)
        optimize_networks(model.networks, model.device, compiled=compute.compiled, threads=compute.threads)
    return model


def prepare_torch(compute: Compute) -> tuple[torch.device, torch.dtype]:
    """Set up torch for this process, and return the device and dtype of the model."""
    device, dtype = torch.device(compute.device), getattr(torch, compute.dtype)
    torch.set_num_threads(compute.threads)
    set_float32_precision(dtype)
    limit_memory(device)
    return device, dtype


@overload
def make_chain(
    model: LatentDiffusion, compute: Compute, stop: Callable[[], bool] = lambda: False
) -> StepLevelChain: ...
@overload
def make_chain(model: AnyPipeline, compute: Compute, stop: Callable[[], bool] = lambda: False) -> PipelineCallChain: ...
def make_chain(
    model: LatentDiffusion | AnyPipeline, compute: Compute, stop: Callable[[], bool] = lambda: False
) -> StepLevelChain | PipelineCallChain:
    """A chain of a model that is loaded; images are judged where its checker is."""
    own = {(shape.height, shape.width): (shape.slots, shape.decode_batch) for shape in compute.by_size}
    shape = ChainShape(compute.slots, compute.decode_batch, own)
    judge = None
    if model.safety_checker is not None:
        judge = _judge(model.safety_checker, model.feature_extractor, shape.decode)
    # Not isinstance: importing AnyPipeline is slow, and most runs do not need it.
    if getattr(model, "uses_pipeline_call", False):
        return PipelineCallChain(cast("AnyPipeline", model), shape, judge, stop)
    return StepLevelChain(cast("LatentDiffusion", model), shape, judge, stop)


def load_image_checker(card: ModelCard, compute: Compute) -> ImageChecker:
    """The checker of a model, without the model; it judges as it does beside it. Raises ModelError."""
    device, dtype = prepare_torch(compute)
    with out_of_memory_errors():
        found = load_checker(card, device, dtype)
    return _judge(*found, compute.decode_batch)


def _judge(checker: Any, feature_extractor: Any, batch: int) -> ImageChecker:
    from batch_infer.safety import StableDiffusionChecker

    return StableDiffusionChecker(checker, feature_extractor, batch)
