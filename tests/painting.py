"""Very small diffusers pipelines: one that can be stacked completely, and variants that each have one peculiarity.

A prompt that contains `refused`, `broken` or `poison` makes its call fail before the first step, at a later step, or
inside the denoiser. The image for a prompt that contains `nan` is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from batch_infer.models import AnyPipeline
from batch_infer.models.card import SamplingRules
from batch_infer.records import PromptRequest, SizeRules
from tests.rendering import CPU, make_request

WIDTH = 16
"""Channels of texts. Kernels take 16 values at once, and their results are those for each element of a batch alone."""
MAX_LENGTH = 12
"""Number of characters of a prompt that the text encoder takes."""
RULES = SamplingRules(SizeRules(32, 32, 8, 8), 4, 5.0)


class Tokenizer:
    """Maps each character to a number."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return SimpleNamespace(input_ids=[1 + ord(character) % 31 for character in text])


class TextEncoder(torch.nn.Module):
    """Embeds token ids (B, L). It counts its calls and the texts in them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(32, WIDTH)
        self.calls: list[int] = []

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls.append(len(input_ids))
        return {"hidden": torch.tanh(self.embedding(input_ids))}


class Denoiser(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Adds the mean of a text (B, L, WIDTH) to each pixel.

    Calls with more than `memory` elements run out of memory, and so do images of more than `max_side` pixels.
    """

    memory, max_side = 1000, 1000

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Parameter(torch.randn(4, WIDTH, 1, 1))
        self.outer = torch.nn.Parameter(torch.randn(WIDTH, 4, 1, 1) / WIDTH)
        self.time = torch.nn.Parameter(torch.randn(WIDTH))
        self.calls: list[int] = []

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, text: Any, **other: Any
    ) -> tuple[torch.Tensor]:
        self.calls.append(len(hidden_states))
        if len(hidden_states) > self.memory or 8 * hidden_states.shape[-1] > self.max_side:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
        if hidden_states.isnan().any():
            raise RuntimeError("the network gets values that are not finite")
        pixels = (hidden_states[:, :, None] * self.inner).sum(1)
        context = timestep.reshape(-1, 1).float() / 1000 * self.time + self.pool(text, **other)
        hidden = torch.tanh(pixels + context[..., None, None])
        return ((hidden[:, :, None] * self.outer).sum(1),)

    def pool(self, text: Any) -> torch.Tensor:
        mean: torch.Tensor = text.mean(1)
        return mean


class Autoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Decodes latents (B, 4, H, W) to images (B, 3, 8 * H, 8 * W)."""

    memory = 1000

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self) -> None:
        super().__init__()
        self.colours = torch.nn.Parameter(torch.randn(4, 3, 1, 1))
        self.calls: list[int] = []

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        self.calls.append(len(latents))
        if len(latents) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        colours = torch.sigmoid((latents[:, :, None] * self.colours).sum(1))
        return (colours.repeat_interleave(8, 2).repeat_interleave(8, 3),)


class PaintingPipeline(DiffusionPipeline):  # type: ignore[misc]
    """With guidance, it calls its denoiser with both texts in one batch."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs: Sequence[str] = ()
    denoiser_type: Any = Denoiser
    vae_type: Any = Autoencoder
    min_side = 8
    """Shortest side in pixels that the pipeline accepts."""

    def __init__(self, transformer: Any, text_encoder: Any, vae: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder, vae=vae, scheduler=scheduler)
        self.tokenizer = Tokenizer()
        self.image_processor = VaeImageProcessor(vae_scale_factor=8)
        self.vae_scale_factor = 8

    @classmethod
    def build(cls) -> Any:
        """Return a pipeline with random weights that are always the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            networks = cls.denoiser_type(), TextEncoder(), cls.vae_type()
        make: Any = cls
        return make(*(network.eval() for network in networks), FlowMatchEulerDiscreteScheduler())

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        height: int = 32,
        width: int = 32,
        num_inference_steps: int = 4,
        guidance_scale: float = 5.0,
        negative_prompt: Any = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        if any("refused" in text for text in prompt):
            raise ValueError("such a prompt is refused")
        if min(height, width) < self.min_side:
            raise ValueError("such a size is refused")
        self._guidance_scale = guidance_scale
        texts = [self.encode(prompt)]
        if guidance_scale > 1:
            texts.insert(0, self.encode(negative_prompt or [""] * len(prompt)))
        latents = randn_tensor((len(prompt), 4, height // 8, width // 8), generator=generator)
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        for index, timestep in enumerate(self.scheduler.timesteps):
            if index == min(2, num_inference_steps - 1) and any("broken" in text for text in prompt):
                raise RuntimeError("the loop is broken")
            if index == 1 and any("poison" in text for text in prompt):
                latents = latents * torch.nan
            prediction = self.predict(latents, timestep, texts)
            latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        if any("nan" in text for text in prompt):
            latents = latents * torch.nan
        images = self.vae.decode(latents, return_dict=False)[0]
        return ImagePipelineOutput(images=images if output_type == "pt" else images.movedim(1, 3).numpy())

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        rows = [self.tokenizer(text).input_ids[:MAX_LENGTH] for text in texts]
        return torch.tensor([row + [0] * (MAX_LENGTH - len(row)) for row in rows])

    def encode(self, texts: Sequence[str]) -> Any:
        return self.text_encoder(self.tokenize(texts))["hidden"]

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, texts: list[Any]) -> torch.Tensor:
        batch = torch.cat([latents] * len(texts))
        predictions = self.denoise(batch, timestep.expand(len(batch)), self.join(texts))
        return self.guide(*predictions.chunk(len(texts)))

    def denoise(self, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> torch.Tensor:
        prediction: torch.Tensor = self.transformer(latents, timestep, text)[0]
        return prediction

    def join(self, texts: list[Any]) -> Any:
        return torch.cat(texts)

    def guide(self, first: torch.Tensor, second: torch.Tensor | None = None) -> torch.Tensor:
        return first if second is None else first + self._guidance_scale * (second - first)


def paint_row(name: str = "row", prompt: str | None = None, **values: Any) -> PromptRequest:
    """Return a request whose prompt is its name by default."""
    return make_request(name, name if prompt is None else prompt, **{"size": (32, 32), "guidance": 5.0, **values})


def load_painting(pipeline_type: Any = PaintingPipeline, rules: SamplingRules = RULES) -> AnyPipeline:
    """Return the model of a pipeline, which tries out how its calls can be stacked."""
    pipeline = pipeline_type.build()
    pipeline.set_progress_bar_config(disable=True)
    return AnyPipeline(pipeline, rules, CPU, torch.float32)


# Pipelines whose calls can all be stacked


class SequentialPipeline(PaintingPipeline):
    """With guidance, it calls its denoiser for each text."""

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, texts: list[Any]) -> torch.Tensor:
        return self.guide(*(self.denoise(latents, timestep.expand(len(latents)), text) for text in texts))


class MultiplyingDenoiser(Denoiser):
    """Has a matrix product, which autocast computes in another dtype."""

    def pool(self, text: Any) -> torch.Tensor:
        mean = super().pool(text)
        product = mean @ self.outer.flatten(1) @ self.inner.flatten(1)
        self.dtype_of_product = product.dtype
        return product.float()


class AutocastPipeline(PaintingPipeline):
    """Computes its steps in bfloat16."""

    denoiser_type = MultiplyingDenoiser

    def denoise(self, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.is_autocast_enabled("cpu")
            prediction = super().denoise(latents, timestep, text)
            assert torch.is_autocast_enabled("cpu")
            return prediction


class LayeredDenoiser(Denoiser):
    def pool(self, text: Any) -> torch.Tensor:
        mean: torch.Tensor = text.mean((0, 2))
        return mean


class LayeredPipeline(PaintingPipeline):
    """The batch axis of its text (layers, B, L, WIDTH) is the second."""

    denoiser_type = LayeredDenoiser

    def join(self, texts: list[Any]) -> Any:
        text = torch.cat(texts)
        return torch.stack([text, 2 * text, text.square()])


class ModifyingPipeline(PaintingPipeline):
    """Modifies the result of its text encoder in place."""

    def encode(self, texts: Sequence[str]) -> Any:
        return super().encode(texts).mul_(0.5)


class MaskedDenoiser(Denoiser):
    def pool(self, text: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is None:
            return super().pool(text)
        weights = mask[..., None].to(text.dtype)
        pooled: torch.Tensor = (text * weights).sum(1) / weights.sum(1)
        return pooled

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, text: Any, text_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor]:
        return super().forward(hidden_states, timestep, text, mask=text_mask)


class VaryingPipeline(PaintingPipeline):
    """Its texts are as long as the longest text of a batch, and its denoiser has no mask."""

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        rows = [self.tokenizer(text).input_ids[:MAX_LENGTH] or [0] for text in texts]
        longest = max(map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, texts: list[Any]) -> torch.Tensor:
        return self.guide(*(self.denoise(latents, timestep.expand(len(latents)), text) for text in texts))


class MaskedPipeline(VaryingPipeline):
    """Its denoiser accepts a mask, which the pipeline does not pass."""

    denoiser_type = MaskedDenoiser


class ListDenoiser(Denoiser):
    """Takes a list of texts (L, WIDTH), which it pads to the longest of the batch."""

    def pool(self, text: Any) -> torch.Tensor:
        padded = torch.nn.utils.rnn.pad_sequence(text, batch_first=True)
        lengths = torch.tensor([[len(one)] for one in text])
        pooled: torch.Tensor = padded.sum(1) / lengths
        return pooled


class ListPipeline(VaryingPipeline):
    """Passes its texts as a list."""

    denoiser_type = ListDenoiser

    def encode(self, texts: Sequence[str]) -> Any:
        return [self.text_encoder(self.tokenize([text]))["hidden"][0] for text in texts]

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, texts: list[Any]) -> torch.Tensor:
        return PaintingPipeline.predict(self, latents, timestep, texts)

    def join(self, texts: list[Any]) -> Any:
        return [text for part in texts for text in part]


class Normalizer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A component that is a network of diffusers but is never called."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(1))


class NormalizingPipeline(PaintingPipeline):
    """Has a component like StableUnCLIPPipeline's image_normalizer, whose methods other than `forward` are called."""

    def __init__(self, transformer: Any, text_encoder: Any, vae: Any, scheduler: Any, normalizer: Any = None) -> None:
        super().__init__(transformer, text_encoder, vae, scheduler)
        self.register_modules(normalizer=normalizer or Normalizer())

    def encode(self, texts: Sequence[str]) -> Any:
        return super().encode(texts) - self.normalizer.mean


class NestedPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Consists of two pipelines with a denoiser each, as Kandinsky's and Wuerstchen's combined pipelines."""

    prior_type: Any = SequentialPipeline

    def __init__(self, transformer: Any, prior_transformer: Any, text_encoder: Any, vae: Any, scheduler: Any) -> None:
        super().__init__()
        parts = {"transformer": transformer, "prior_transformer": prior_transformer, "text_encoder": text_encoder}
        self.register_modules(**parts, vae=vae, scheduler=scheduler)
        self.prior_pipe = self.prior_type(prior_transformer, text_encoder, vae, scheduler)
        self.decoder_pipe = PaintingPipeline(transformer, text_encoder, vae, scheduler)
        self.image_processor = self.decoder_pipe.image_processor

    @classmethod
    def build(cls) -> Any:
        prior, decoder = cls.prior_type.build(), PaintingPipeline.build()
        return cls(
            decoder.transformer, prior.transformer, decoder.text_encoder, decoder.vae, FlowMatchEulerDiscreteScheduler()
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        height: int = 32,
        width: int = 32,
        num_inference_steps: int = 4,
        guidance_scale: float = 5.0,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        output_type: str = "pil",
    ) -> Any:
        sizes = {"height": height, "width": width, "generator": generator}
        first = self.prior_pipe(prompt, num_inference_steps=2, guidance_scale=guidance_scale, output_type="pt", **sizes)
        suffix = [f" {int(image.mean() * 100)}" for image in first.images]
        texts = [text[:4] + end for text, end in zip(prompt, suffix, strict=True)]
        return self.decoder_pipe(
            texts, num_inference_steps=num_inference_steps, guidance_scale=1.0, output_type=output_type, **sizes
        )


# Pipelines whose calls cannot all be stacked


class ChunkingDenoiser(Denoiser):
    """Subtracts the mean of the first half of its batch, as the attention processors of perturbed attention guidance.

    Those expect the rows with and without a perturbation in the first and second half.
    """

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, text: Any) -> tuple[torch.Tensor]:  # type: ignore[override]
        (prediction,) = super().forward(hidden_states, timestep, text)
        return (prediction - prediction.chunk(2)[0].mean(),)


class ChunkingPipeline(PaintingPipeline):
    denoiser_type = ChunkingDenoiser


class Expert(torch.nn.Linear):
    """Rounds differently for 100 rows or more, for which a library of matrix products may have another kernel."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.weight[0] * (1 + 2**-20 if len(values) >= 100 else 1)


class RoutingDenoiser(Denoiser):
    """Sends some characters of the whole batch through an expert, as a mixture of experts does."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = Expert(WIDTH, WIDTH)

    def pool(self, text: Any) -> torch.Tensor:
        selected = text[..., 0] > text[..., 1]
        return super().pool(text.index_put((selected,), self.expert(text[selected])))


class RoutingPipeline(PaintingPipeline):
    denoiser_type = RoutingDenoiser


class StoringDenoiser(Denoiser):
    """Stores the mean of each element, as the attention processors of self-attention guidance store attention maps."""

    means: torch.Tensor

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, text: Any) -> tuple[torch.Tensor]:  # type: ignore[override]
        (prediction,) = super().forward(hidden_states, timestep, text)
        self.means = prediction.mean((1, 2, 3), keepdim=True)
        return (prediction,)


class StoringPipeline(PaintingPipeline):
    denoiser_type = StoringDenoiser

    def denoise(self, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> torch.Tensor:
        prediction = super().denoise(latents, timestep, text)
        shifted: torch.Tensor = prediction - self.transformer.means[: len(prediction)]
        return shifted


class BatchNormAutoencoder(Autoencoder):
    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return super().decode(latents - latents.mean(), return_dict)


class BatchNormPipeline(PaintingPipeline):
    """Its decoder does not treat the images of a batch separately."""

    vae_type = BatchNormAutoencoder


class GlobalNoisePipeline(PaintingPipeline):
    """Draws noise from the global generator."""

    def denoise(self, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> torch.Tensor:
        return super().denoise(latents + torch.randn_like(latents), timestep, text)


class PartlyStackedPipeline(NestedPipeline):
    """Only one of its two denoisers computes the rows of a batch separately."""

    prior_type = ChunkingPipeline
