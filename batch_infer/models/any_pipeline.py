"""Any text-to-image pipeline of diffusers, driven by its own call."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin

from batch_infer.accelerator import is_device_fault, out_of_memory_errors
from batch_infer.errors import RowBroken, RowError, first_line
from batch_infer.models.card import ModelCard
from batch_infer.models.family import Conditioning
from batch_infer.models.first_step import has_one_shape, make_cheap_image, take_first_step
from batch_infer.models.loading import load_checker, load_network, load_pipeline
from batch_infer.models.pipelines import (
    denoiser_of,
    denoiser_settings,
    guidance_argument,
    left_out,
    network_classes,
    parameters_of,
    pipeline_class,
)
from batch_infer.models.untrusted import LOADING_ERRORS, LoadingErrors
from batch_infer.records import PromptRequest

REFUSALS = (ValueError, IndexError, ZeroDivisionError, AssertionError, NotImplementedError)
"""What a pipeline or its scheduler raises for values that it does not take."""


class AnyPipeline:
    """A loaded pipeline that makes images of rows which share all but their texts and seeds.

    Text encoders compute their attention plainly: the faster kernels leave a mask out where no row of the batch needs
    it, and a row would depend on its neighbours by that.
    """

    uses_pipeline_call = True

    def __init__(self, pipeline: Any, card: ModelCard, device: torch.device, dtype: torch.dtype) -> None:
        self.pipeline, self.device, self.dtype = pipeline, device, dtype
        self.safety_checker: Any | None = None
        self.feature_extractor: Any | None = None
        self.denoiser: torch.nn.Module | None = denoiser_of(pipeline)
        self.networks: Sequence[torch.nn.Module] = ()
        """None is called at a fixed shape for certain, so none is to be compiled."""
        kind = type(pipeline)
        self._guidance = guidance_argument(kind, denoiser_settings(pipeline))
        self._rescales, self._cleans = (name in parameters_of(kind) for name in ("guidance_rescale", "clean_caption"))
        arguments = {
            "height": card.sizes.native_height,
            "width": card.sizes.native_width,
            "num_inference_steps": card.num_inference_steps,
        }
        with self._kept_processors():
            self.one_row_per_call = not self._has_one_shape(card, arguments)
            """Whether rows cannot share a call: one's result would depend on how long the others' texts are."""
            self._try_decoder(card, arguments)

    @classmethod
    def load(cls, card: ModelCard, device: torch.device, dtype: torch.dtype, *, with_checker: bool) -> AnyPipeline:
        """Load from a folder, safetensors only. Raises ModelError."""
        kind = pipeline_class(card.path)
        networks = {name: _load(network, card, name, dtype) for name, network in network_classes(card.path).items()}
        pipeline = load_pipeline(kind, card, {**networks, **left_out(kind, card.path)})
        pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        if hasattr(getattr(pipeline, "vae", None), "enable_slicing"):
            pipeline.vae.enable_slicing()  # images are decoded one by one: as when alone, and in little memory
        model = cls(pipeline, card, device, dtype)
        if with_checker:
            model.safety_checker, model.feature_extractor = load_checker(card, device, dtype)
        return model

    def render(self, requests: Sequence[PromptRequest], batch: int) -> torch.Tensor:
        """Images (R, 3, H, W) float32 on the CPU, 0 black and 1 white, of rows that are alike, at most `batch`.

        One call of the pipeline makes them at the full batch, padded with the last row; or one call each.

        Raises RowError where the pipeline does not take a row.
        """
        if self.one_row_per_call:
            return torch.cat([self._call([request]) for request in requests])
        padding = [requests[-1]] * (batch - len(requests))
        return self._call([*requests, *padding])[: len(requests)]

    def count_tokens(self, request: PromptRequest) -> Conditioning:
        """A prompt's tokens, as the pipeline's first tokenizer counts them; how many are read, only its call knows."""
        tokenizer = getattr(self.pipeline, "tokenizer", None)
        if not callable(tokenizer):
            return Conditioning(({}, None), None, None)
        return Conditioning(({}, None), len(tokenizer(request.prompt, add_special_tokens=False).input_ids), None)

    def _call(self, requests: Sequence[PromptRequest]) -> torch.Tensor:
        params = requests[0].params
        with self._told():
            images = self.pipeline(**self._arguments(requests)).images
        # Not what it was asked for, where a pipeline rounds sizes without a word.
        if np.shape(images) != (len(requests), params.height, params.width, 3):
            height, width = np.shape(images)[1:3] if np.ndim(images) == 4 else (0, 0)
            raise RowError(
                f"{self._name} makes images of {width}x{height} pixels where {params.width}x{params.height} are asked "
                "for; try multiples of 32"
            )
        return torch.from_numpy(np.asarray(images, dtype=np.float32)).permute(0, 3, 1, 2)

    def _arguments(self, requests: Sequence[PromptRequest]) -> dict[str, Any]:
        """The pipeline's call for rows that are alike; lists of our own, since some pipelines write into them."""
        first = requests[0]
        params = first.params
        found: dict[str, Any] = {
            "prompt": [request.prompt for request in requests],
            "generator": [torch.Generator("cpu").manual_seed(request.seed) for request in requests],
            "height": params.height,
            "width": params.width,
            "num_inference_steps": params.num_inference_steps,
            "output_type": "np",
        }
        if self._guidance:
            found[self._guidance] = params.guidance_scale
        if self._cleans:
            found["clean_caption"] = False  # else it would hang on whether beautifulsoup4 and ftfy are installed
        if self._rescales:
            found["guidance_rescale"] = params.guidance_rescale
        if first.negative_prompt is not None:
            found["negative_prompt"] = [request.negative_prompt for request in requests]
        elif self._guidance == "true_cfg_scale" and params.uses_guidance:
            found["negative_prompt"] = [" "] * len(requests)  # without one, it would leave the guidance out
        return found

    @property
    def _name(self) -> str:
        return type(self.pipeline).__name__

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Re-raise what the pipeline refuses as RowError, other errors as RowBroken, and device faults as they are."""
        try:
            with out_of_memory_errors():
                yield
        except (*REFUSALS, RuntimeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or is_device_fault(error):
                raise
            if isinstance(error, REFUSALS):
                raise RowError(f"{self._name} does not take this row: {first_line(error)}") from error
            raise RowBroken(f"{self._name} broke off: {first_line(error)}") from error

    def _refuse_unfit(self, card: ModelCard, arguments: dict[str, Any]) -> None:
        """Take a step without watching. Raises ModelError for an error that is not about these arguments.

        What a pipeline refuses before it calls its denoiser may be the size, which rows may have otherwise.
        """
        calls: list[None] = []
        hook = self.denoiser and self.denoiser.register_forward_pre_hook(lambda *_: calls.append(None))
        with LoadingErrors(f"{card.path}: {self._name}"), out_of_memory_errors():
            try:
                take_first_step(self.pipeline, arguments)
            except REFUSALS:
                if calls:
                    raise
            finally:
                if hook:
                    hook.remove()

    def _has_one_shape(self, card: ModelCard, arguments: dict[str, Any]) -> bool:
        """As this checkpoint is by itself; no, where it cannot be watched.

        Raises ModelError where its parts do not go together: where it takes no text at all.
        """
        try:
            with out_of_memory_errors():
                return has_one_shape(self.pipeline, arguments)
        except LOADING_ERRORS as error:
            if isinstance(error, torch.OutOfMemoryError) or is_device_fault(error):
                raise
            self._refuse_unfit(card, arguments)
            return False

    def _try_decoder(self, card: ModelCard, arguments: dict[str, Any]) -> None:
        """Decode one image, so that a decoder which does not fit is found here. Raises ModelError."""
        vae: Any = getattr(self.pipeline, "vae", None)
        if vae is None or self.denoiser is None:
            return
        decode = vae.decode

        @functools.wraps(decode)
        def tried(*args: Any, **kwargs: Any) -> Any:
            with LoadingErrors(f"{card.path}: vae of {self._name}"):
                return decode(*args, **kwargs)

        vae.decode = tried
        try:
            with out_of_memory_errors(), suppress(*LOADING_ERRORS):  # of what comes before, `_has_one_shape` decides
                make_cheap_image(self.pipeline, self.denoiser, arguments)
        finally:
            del vae.decode

    @contextmanager
    def _kept_processors(self) -> Iterator[None]:
        """Put the denoiser's attention processors back: some pipelines exchange them for the time of their call."""
        denoiser: Any = self.denoiser
        processors = dict(getattr(denoiser, "attn_processors", {}))
        try:
            yield
        finally:
            if processors:
                denoiser.set_attn_processor(processors)


def _load(kind: Any, card: ModelCard, name: str, dtype: torch.dtype) -> Any:
    """A network in this dtype, but for the parts that it wants in float32 (T5 overflows otherwise)."""
    if issubclass(kind, ModelMixin):
        return load_network(kind, card, name, torch_dtype=dtype)
    return load_network(kind, card, name, dtype=dtype, attn_implementation="eager", trust_remote_code=False)
