"""Probe models of a family, whose diffusers pipeline is built on the same networks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from batch_infer.bench.probe import FullBatch, make_generator, to_pixels
from batch_infer.models import decode_flops, denoise_flops
from batch_infer.records import PromptRequest

if TYPE_CHECKING:
    from batch_infer.models import LatentDiffusion


class FamilyProbe:
    """Probes a model that is rendered with this package's own denoising loop."""

    can_group = True

    def __init__(self, model: LatentDiffusion) -> None:
        self._model = model
        self.pipeline = _build_pipeline(model)
        self.denoiser: torch.nn.Module = model.networks[0]
        self.scheduler_name = model.solver.name

    def count_evaluations(self, request: PromptRequest) -> int:
        table = self._model.solver.table(request.params.num_inference_steps)
        return request.params.slots * table.evaluations

    def count_flops(self, request: PromptRequest) -> tuple[int, int]:
        shape = self._model.latent_shape(request.params.height, request.params.width)
        return denoise_flops(self._model, shape), decode_flops(self._model, shape)

    @torch.inference_mode()
    def fill_batch(self, request: PromptRequest, slots: int) -> FullBatch:
        """Return a call whose batch elements all have the row's conditioning, and noise as latents."""
        model, params = self._model, request.params
        (conditioning,) = model.condition([request])
        context = {name: part.expand(slots, *part.shape).contiguous() for name, part in conditioning.context[0].items()}
        shape = model.latent_shape(params.height, params.width)
        sample = torch.randn(slots, *shape, device=model.device).to(model.dtype)
        timestep = torch.full((slots,), 500.0, device=model.device)
        return FullBatch(slots, lambda: model.denoise(sample, timestep, context))

    def call_pipeline(self, requests: Sequence[PromptRequest]) -> np.ndarray:
        params = requests[0].params
        optional = {"guidance_rescale": params.guidance_rescale} if params.guidance_rescale else {}
        images = self.pipeline(
            [request.prompt for request in requests],
            height=params.height,
            width=params.width,
            num_inference_steps=params.num_inference_steps,
            guidance_scale=params.guidance_scale,
            generator=[make_generator(request) for request in requests],
            output_type="pt",
            **optional,
        ).images
        return to_pixels(images)


def _build_pipeline(model: LatentDiffusion) -> Any:
    original = model.pipeline
    parts = dict(original.components)
    parts |= {"scheduler": copy.deepcopy(original.scheduler), "safety_checker": None, "feature_extractor": None}
    if "unet" in parts and parts["unet"] is None:
        parts["unet"] = UNetAdapter(model.networks[0])
    names = inspect.signature(type(original)).parameters
    values = {"requires_safety_checker": False, **original.config, **parts}
    pipeline = type(original)(**{name: value for name, value in values.items() if name in names})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class UNetAdapter(torch.nn.Module):
    """Wraps a UNet of a class that diffusers lacks, and adds the attributes that the diffusers pipeline reads."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet
        config: Any = unet.config
        channels, size = config.in_channels, config.sample_size
        self.config = SimpleNamespace(in_channels=channels, sample_size=size, time_cond_proj_dim=None)
        weight = next(unet.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: object
    ) -> Any:
        return self.unet(sample, timestep.expand(len(sample)), encoder_hidden_states)
