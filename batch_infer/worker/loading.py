"""Load a model onto its device, and make the chain that renders with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

import torch

from batch_infer.accelerator import limit_memory, out_of_memory_errors, set_float32_precision
from batch_infer.chain import BatchSizes, Chain, GatedChain, StepLevelChain
from batch_infer.models import ModelCard, load_checker, load_latent_diffusion, optimize_networks
from batch_infer.safety import ImageChecker, make_gate, make_image_checker
from batch_infer.settings import Compute, SafetySettings

if TYPE_CHECKING:
    from batch_infer.models import AnyPipeline, LatentDiffusion


def load_chain(
    card: ModelCard, compute: Compute, safety: SafetySettings, stop: Callable[[], bool] = lambda: False
) -> Chain:
    """Load a model and return its chain, with the safety checker and service if the settings use them.

    Raises ModelError, SettingsError, and torch.OutOfMemoryError if the model does not fit into the device's memory.
    """
    with_checker = safety.uses_checker(has_checker=card.has_checker)
    chain = make_chain(load_model(card, compute, with_checker=with_checker), compute, stop)
    return chain if safety.service is None else GatedChain(chain, partial(make_gate, safety.service), stop)


def load_model(card: ModelCard, compute: Compute, *, with_checker: bool) -> LatentDiffusion | AnyPipeline:
    """Load a model family's model, or any other diffusers pipeline. Raises ModelError, torch.OutOfMemoryError."""
    device, dtype = prepare_torch(compute)
    with out_of_memory_errors():
        model: LatentDiffusion | AnyPipeline
        if card.uses_pipeline_call:
            from batch_infer.models import AnyPipeline

            model = AnyPipeline.load(card, device, dtype, with_checker=with_checker, offload=compute.offload)
        else:
            on_host = compute.offload is not None
            model = load_latent_diffusion(card, device, dtype, with_checker=with_checker, on_host=on_host)
        optimize_model(model, compute)
        if compute.offload is not None and not model.uses_pipeline_call:
            cast("LatentDiffusion", model).offload(compute.offload)
    return model


def optimize_model(model: LatentDiffusion | AnyPipeline, compute: Compute) -> None:
    """Optimize the networks of a model, and compile them if the settings say so."""
    if not model.uses_pipeline_call:
        optimize_networks(model.networks, model.device, compiled=compute.compiled, threads=compute.threads)
    elif compute.compiled:
        cast("AnyPipeline", model).compile(compute.threads)


def load_image_checker(card: ModelCard, compute: Compute) -> ImageChecker:
    """Load a model's safety checker without the model. Raises ModelError, torch.OutOfMemoryError."""
    device, dtype = prepare_torch(compute)
    with out_of_memory_errors():
        checker, feature_extractor = load_checker(card, device, dtype)
    return make_image_checker(checker, feature_extractor, compute.decode_batch)


def prepare_torch(compute: Compute) -> tuple[torch.device, torch.dtype]:
    """Set torch's threads, precision and memory limit, and return the model's device and dtype."""
    device, dtype = torch.device(compute.device), getattr(torch, compute.dtype)
    torch.set_num_threads(compute.threads)
    set_float32_precision(dtype)
    limit_memory(device)
    return device, dtype


def make_chain(
    model: LatentDiffusion | AnyPipeline, compute: Compute, stop: Callable[[], bool] = lambda: False
) -> StepLevelChain:
    """Return the chain of a loaded model. The chain checks images if the model has a checker."""
    by_size = {(shape.height, shape.width): (shape.slots, shape.decode_batch) for shape in compute.by_size}
    batch_sizes = BatchSizes(compute.slots, compute.decode_batch, by_size)
    checker = None
    if model.safety_checker is not None:
        checker = make_image_checker(model.safety_checker, model.feature_extractor, batch_sizes.decode)
    # With --offload, a network that runs in another thread would take the denoiser's place on the device.
    in_background = None if compute.offload is None else False
    return StepLevelChain(model, batch_sizes, checker, stop, in_background=in_background)
