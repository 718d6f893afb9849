"""Register model families with the layout of their checkpoints and the class that loads them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from batch_infer.errors import ModelError
from batch_infer.models.card import ANY_PIPELINE, ModelCard, SamplingRules
from batch_infer.records import SizeRules

if TYPE_CHECKING:
    import torch

    from batch_infer.diffusion import Solver
    from batch_infer.models.latent_diffusion import LatentDiffusion

CHECKER_COMPONENTS = frozenset({"safety_checker", "feature_extractor"})
"""The components that make up a checkpoint's safety checker."""


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: the components of its checkpoints, its implementation and its default parameters.

    `implementation` is `module.Class` in this package, or empty in OTHER_FAMILY, which has no `denoiser`.
    `pipeline_class` is the class to build in diffusers, if it is not the class in model_index.json.
    `skipped_components` are neither downloaded nor read. `pixel_options` pairs each key of model_index.json that
    affects pixels with its default. `fingerprints_class` includes the pipeline class in the fingerprint. `sample_size`
    (latent side) and `latent_channels` apply if the denoiser's config omits them. With `joint_attention` the denoiser
    attends to text and image together (Stable Diffusion 3), without cross-attention.
    """

    name: str
    implementation: str = ""
    pipeline_class: str | None = None
    denoiser: str | None = "unet"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    skipped_components: frozenset[str] = frozenset()
    pixel_options: tuple[tuple[str, Any], ...] = ()
    fingerprints_class: bool = False
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    sample_size: int | None = 64
    latent_channels: int = 4
    joint_attention: bool = False
    supports_lora: bool = False
    supports_embeddings: bool = False
    supports_long_prompts: bool = False

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)

    @property
    def required_components(self) -> set[str]:
        """Components that every checkpoint of the family has."""
        if self.denoiser is None:
            return set()
        return {self.denoiser, "vae", "scheduler", *self.text_encoders, *self.tokenizers}

    def make_rules(self, denoiser: Mapping[str, Any], vae: Mapping[str, Any], name: str) -> SamplingRules:
        """Derive the sampling rules of checkpoint `name` from two configs. Raises ModelError if they lack sizes."""
        try:
            settings = denoiser.get("configurations", denoiser)
            native = settings.get("sample_size") or self.sample_size
            sizes = _size_rules({**settings, "sample_size": native}, 2 ** (len(vae["block_out_channels"]) - 1))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            source = f"{name}: {self.denoiser}/config.json or vae/config.json"
            raise ModelError(f"{source} does not define the image size: {error}") from error
        is_embedded = denoiser.get("time_cond_proj_dim") is not None
        return SamplingRules(
            sizes,
            self.num_inference_steps,
            self.guidance_scale,
            self.guidance_rescale,
            embedded_guidance=is_embedded,
            # Embedded guidance needs no second pass, so a negative prompt and guidance rescale have no effect.
            unsupported_fields=(("negative_prompt", None), ("guidance_rescale", 0.0)) if is_embedded else (),
            supports_lora=self.supports_lora,
            supports_embeddings=self.supports_embeddings,
        )


def _size_rules(denoiser: Mapping[str, Any], factor: int) -> SizeRules:
    """Return the size rules in pixels, for `factor` pixels per latent element along a side."""
    native = denoiser["sample_size"]
    height, width = (native, native) if isinstance(native, int) else (native * 2)[:2]
    if patch := denoiser.get("patch_size"):
        # The position embeddings allow at most pos_embed_max_size patches per side.
        largest = denoiser["pos_embed_max_size"] * patch * factor
        return SizeRules(height * factor, width * factor, patch * factor, patch * factor, largest)
    # The shortest side can be halved by every down block in DeciDiffusion, and by all but the last in other UNets.
    halvings = denoiser.get("add_downsample") or denoiser["block_out_channels"][1:]
    return SizeRules(height * factor, width * factor, factor, 2 ** len(halvings) * factor)


_STABLE_DIFFUSION = Family(
    "stable_diffusion",
    "stable_diffusion.StableDiffusion",
    supports_lora=True,
    supports_embeddings=True,
    supports_long_prompts=True,
)
FAMILIES = {
    "StableDiffusionPipeline": _STABLE_DIFFUSION,
    # The class affects pixels: unlike StableDiffusionPipeline, it does not correct old scheduler settings.
    "LatentConsistencyModelPipeline": replace(
        _STABLE_DIFFUSION, num_inference_steps=4, guidance_scale=8.5, fingerprints_class=True
    ),
    "StableDiffusionXLPipeline": Family(
        "stable_diffusion_xl",
        "stable_diffusion_xl.StableDiffusionXL",
        text_encoders=("text_encoder", "text_encoder_2"),
        # The image encoder would only read image prompts, and diffusers' class has no safety checker.
        skipped_components=CHECKER_COMPONENTS | {"image_encoder"},
        pixel_options=(("force_zeros_for_empty_prompt", True),),
        guidance_scale=5.0,
        sample_size=128,
        supports_lora=True,
        supports_embeddings=True,
        supports_long_prompts=True,
    ),
    "StableDiffusion3Pipeline": Family(
        "stable_diffusion_3",
        "stable_diffusion_3.StableDiffusion3",
        denoiser="transformer",
        text_encoders=("text_encoder", "text_encoder_2"),
        skipped_components=CHECKER_COMPONENTS | {"image_encoder"},
        num_inference_steps=28,
        guidance_scale=7.0,
        sample_size=128,
        latent_channels=16,
        joint_attention=True,
        supports_lora=True,
    ),
    "DeciDiffusionPipeline": Family(
        "decidiffusion",
        "decidiffusion.DeciDiffusion",
        pipeline_class="StableDiffusionPipeline",
        denoiser="flexible_unet",
        skipped_components=frozenset({"unet"}),
        num_inference_steps=30,
        guidance_rescale=0.7,
        sample_size=None,
        supports_long_prompts=True,
    ),
}
"""Model families by pipeline class in model_index.json."""
OTHER_FAMILY = Family(
    ANY_PIPELINE, denoiser=None, text_encoders=(), skipped_components=frozenset({"watermarker", "image_encoder"})
)
"""Family of all other checkpoints, whose rows run their pipeline's own call.

Image encoders would only read image prompts.
"""


def load_latent_diffusion(
    card: ModelCard, device: torch.device, dtype: torch.dtype, *, with_checker: bool, on_host: bool = False
) -> LatentDiffusion:
    """Load a checkpoint of a model family on a device, optionally with its safety checker. Raises ModelError.

    With `on_host`, the networks stay in host memory until the model's `offload` is called.
    """
    return _implementation(card).load(card, device, dtype, with_checker=with_checker, on_host=on_host)


def load_solver(card: ModelCard) -> Solver:
    """Load the solver of a model family's checkpoint without its networks. Raises ModelError."""
    return _implementation(card).load_solver(card)


def _implementation(card: ModelCard) -> type[LatentDiffusion]:
    module, name = FAMILIES[card.pipeline].implementation.split(".")
    implementation: type[LatentDiffusion] = getattr(import_module(f"batch_infer.models.{module}"), name)
    return implementation
