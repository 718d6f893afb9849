"""Render batches of rows by calling a diffusers text-to-image pipeline that has no model family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin

from batch_infer.accelerator import is_device_fault, out_of_memory_errors
from batch_infer.errors import FailedRowError, RowError, first_line
from batch_infer.models.card import ModelCard
from batch_infer.models.latent_diffusion import Conditioning
from batch_infer.models.loading import load_checker, load_network, load_pipeline
from batch_infer.models.pipelines import (
    absent_components,
    denoiser_config,
    find_denoiser,
    guidance_argument,
    network_classes,
    parameters_of,
    pipeline_class,
)
from batch_infer.models.trial_calls import REFUSALS, can_share_calls
from batch_infer.records import PromptRequest


class AnyPipeline:
    """A loaded pipeline. The rows of one call differ only in their texts and seeds.

    The text encoders use eager attention: faster kernels omit the mask if no row of the batch needs it, so that a row
    would depend on its neighbours.
    """

    uses_pipeline_call = True

    def __init__(self, pipeline: Any, card: ModelCard, device: torch.device, dtype: torch.dtype) -> None:
        self.pipeline, self.device, self.dtype = pipeline, device, dtype
        self.safety_checker: Any | None = None
        self.feature_extractor: Any | None = None
        self.denoiser: torch.nn.Module | None = find_denoiser(pipeline)
        self.networks: Sequence[torch.nn.Module] = ()
        """Networks that can be compiled: none, because no network certainly has a fixed shape."""
        pipeline_type = type(pipeline)
        self._guidance = guidance_argument(pipeline_type, denoiser_config(pipeline))
        self._parameters = parameters_of(pipeline_type)
        arguments = {
            "height": card.sizes.native_height,
            "width": card.sizes.native_width,
            "num_inference_steps": card.num_inference_steps,
        }
        self.needs_separate_calls: bool = not can_share_calls(pipeline, self.denoiser, card.path, arguments)
        """Whether a row in a shared call would depend on the text lengths of other rows."""

    @classmethod
    def load(cls, card: ModelCard, device: torch.device, dtype: torch.dtype, *, with_checker: bool) -> AnyPipeline:
        """Load a checkpoint and optionally its safety checker. Raises ModelError."""
        pipeline_type = pipeline_class(card.path)
        networks = {name: _load(network, card, name, dtype) for name, network in network_classes(card.path).items()}
        pipeline = load_pipeline(pipeline_type, card, {**networks, **absent_components(pipeline_type, card.path)})
        pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        if hasattr(getattr(pipeline, "vae", None), "enable_slicing"):
            pipeline.vae.enable_slicing()  # decodes one image at a time: same bytes as for a single row, less memory
        model = cls(pipeline, card, device, dtype)
        if with_checker:
            model.safety_checker, model.feature_extractor = load_checker(card, device, dtype)
        return model

    def render(self, requests: Sequence[PromptRequest], batch: int) -> torch.Tensor:
        """Render at most `batch` rows to float32 images (R, 3, H, W) on the CPU: 0 is black and 1 is white.

        The rows share one call, padded to `batch` with copies of the last row, or get separate calls. Raises RowError
        if the pipeline does not support a row.
        """
        if self.needs_separate_calls:
            return torch.cat([self._call([request]) for request in requests])
        padding = [requests[-1]] * (batch - len(requests))
        return self._call([*requests, *padding])[: len(requests)]

    def count_tokens(self, request: PromptRequest) -> Conditioning:
        """Count a prompt's tokens with the first tokenizer. Whether the prompt is truncated is unknown."""
        tokenizer = getattr(self.pipeline, "tokenizer", None)
        if not callable(tokenizer):
            return Conditioning(({}, None), None, None)
        return Conditioning(({}, None), len(tokenizer(request.prompt, add_special_tokens=False).input_ids), None)

    def _call(self, requests: Sequence[PromptRequest]) -> torch.Tensor:
        params = requests[0].params
        with self._row_errors():
            images = self.pipeline(**self._make_arguments(requests)).images
        # Some pipelines silently round sizes.
        if np.shape(images) != (len(requests), params.height, params.width, 3):
            height, width = np.shape(images)[1:3] if np.ndim(images) == 4 else (0, 0)
            raise RowError(
                f"{self._name} makes images of {width}x{height} pixels instead of {params.width}x{params.height}; try "
                "multiples of 32"
            )
        return torch.from_numpy(np.asarray(images, dtype=np.float32)).permute(0, 3, 1, 2)

    def _make_arguments(self, requests: Sequence[PromptRequest]) -> dict[str, Any]:
        """Return the arguments of a call shared by rows. The lists are new, because some pipelines modify them."""
        first = requests[0]
        params = first.params
        arguments: dict[str, Any] = {
            "prompt": [request.prompt for request in requests],
            "generator": [torch.Generator("cpu").manual_seed(request.seed) for request in requests],
            "height": params.height,
            "width": params.width,
            "num_inference_steps": params.num_inference_steps,
            "output_type": "np",
        }
        if self._guidance:
            arguments[self._guidance] = params.guidance_scale
        if "clean_caption" in self._parameters:
            arguments["clean_caption"] = False  # the default depends on whether beautifulsoup4 and ftfy are installed
        if "guidance_rescale" in self._parameters:
            arguments["guidance_rescale"] = params.guidance_rescale
        if first.negative_prompt is not None:
            arguments["negative_prompt"] = [request.negative_prompt for request in requests]
        elif self._guidance == "true_cfg_scale" and params.uses_guidance:
            arguments["negative_prompt"] = [" "] * len(requests)  # without it the pipeline omits guidance
        return arguments

    @property
    def _name(self) -> str:
        return type(self.pipeline).__name__

    @contextmanager
    def _row_errors(self) -> Iterator[None]:
        """Raise RowError if the pipeline refuses a row, and FailedRowError for other errors except device errors."""
        try:
            with out_of_memory_errors():
                yield
        except (*REFUSALS, RuntimeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or is_device_fault(error):
                raise
            if isinstance(error, REFUSALS):
                raise RowError(f"{self._name} does not support this row: {first_line(error)}") from error
            raise FailedRowError(f"{self._name} failed: {first_line(error)}") from error


def _load(network_type: Any, card: ModelCard, name: str, dtype: torch.dtype) -> Any:
    """Load a network in a dtype, except for layers that it keeps in float32: T5 would overflow."""
    if issubclass(network_type, ModelMixin):
        return load_network(network_type, card, name, torch_dtype=dtype)
    return load_network(network_type, card, name, dtype=dtype, attn_implementation="eager", trust_remote_code=False)
