"""How checkpoints are laid out, by the pipeline class that they name, and what rows may ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batch_infer.errors import ModelError
from batch_infer.records import SizeRules

JUDGED = ("stable_diffusion", "StableDiffusionSafetyChecker")
"""The checker that we have a judge for."""
CHECKER = frozenset({"safety_checker", "feature_extractor"})


@dataclass(frozen=True, slots=True)
class SamplingRules:
    """What rows may ask of a model, and what they get that do not say.

    `fixed`: fields of a row that the model does not take, each with the one value that it may have.
    `embedded_guidance`: the model takes the guidance scale as an input (Meng et al., arXiv 2210.03142), so that one
    pass a step does.
    """

    sizes: SizeRules
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float = 0.0
    embedded_guidance: bool = False
    fixed: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """How checkpoints of a pipeline class are laid out, and what rows get of them that do not say.

    `sample_size` is the native latent side where the denoiser's settings do not say one, as in diffusers' pipelines.
    `denoiser` is the folder of the network that denoises, `parts` are the other components that there must be.
    `unread` components are neither read nor fetched. `options` are the values of model_index.json that decide pixels,
    each as it is where that does not say.
    """

    family: str
    denoiser: str | None = "unet"
    parts: frozenset[str] = frozenset({"vae", "text_encoder", "tokenizer", "scheduler"})
    unread: frozenset[str] = frozenset()
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    options: tuple[tuple[str, Any], ...] = ()
    sample_size: int | None = 64

    def read(self, components: set[str]) -> set[str]:
        """Of the components that model_index.json names, those that are read."""
        return (components | {self.denoiser or ""}) - self.unread - {""}

    def facts(self, denoiser: Mapping[str, Any], vae: Mapping[str, Any], told: str) -> SamplingRules:
        """What rows may ask, from the settings of both networks. Raises ModelError where they do not say it."""
        try:
            settings = denoiser.get("configurations", denoiser)
            native = settings.get("sample_size") or self.sample_size
            sizes = _sizes({**settings, "sample_size": native}, 2 ** (len(vae["block_out_channels"]) - 1))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            place = f"{told}: {self.denoiser}/config.json or vae/config.json"
            raise ModelError(f"{place} does not say its sizes: {error}") from error
        embedded = denoiser.get("time_cond_proj_dim") is not None
        return SamplingRules(
            sizes,
            self.num_inference_steps,
            self.guidance_scale,
            self.guidance_rescale,
            embedded,
            # Without a second pass there is nothing that a negative prompt could be told to, nor that rescales.
            (("negative_prompt", None), ("guidance_rescale", 0.0)) if embedded else (),
        )


LAYOUTS = {
    "StableDiffusionPipeline": Layout("stable_diffusion"),
    "LatentConsistencyModelPipeline": Layout("stable_diffusion", num_inference_steps=4, guidance_scale=8.5),
    "StableDiffusionXLPipeline": Layout(
        "stable_diffusion_xl",
        parts=frozenset({"vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}),
        # An image encoder is for pictures as prompts, and diffusers' class has no place for a checker.
        unread=CHECKER | {"image_encoder"},
        guidance_scale=5.0,
        sample_size=128,
        options=(("force_zeros_for_empty_prompt", True),),
    ),
    "StableDiffusion3Pipeline": Layout(
        "stable_diffusion_3",
        denoiser="transformer",
        parts=frozenset({"vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}),
        unread=CHECKER | {"image_encoder"},
        num_inference_steps=28,
        guidance_scale=7.0,
        sample_size=128,
    ),
    "DeciDiffusionPipeline": Layout(
        "decidiffusion",
        denoiser="flexible_unet",
        unread=frozenset({"unet"}),
        num_inference_steps=30,
        guidance_rescale=0.7,
        sample_size=None,
    ),
}
"""By the pipeline class that model_index.json names; the defaults are the class's own."""
ANY = Layout("any_pipeline", denoiser=None, parts=frozenset(), unread=frozenset({"watermarker", "image_encoder"}))
"""Every other class: it is driven by its own call, and says itself what it has and takes. Nobody gives it images."""


def _sizes(denoiser: Mapping[str, Any], factor: int) -> SizeRules:
    """In pixels, of which the VAE makes `factor` from a latent's side."""
    native = denoiser["sample_size"]
    height, width = (native, native) if isinstance(native, int) else (native * 2)[:2]
    if patch := denoiser.get("patch_size"):
        # Its places are learned, for so many patches and no more.
        most = denoiser["pos_embed_max_size"] * patch * factor
        return SizeRules(height * factor, width * factor, patch * factor, patch * factor, most)
    # DeciDiffusion's last level goes down once more, to half of what its skips hold.
    downs = denoiser.get("add_downsample") or denoiser["block_out_channels"][1:]
    return SizeRules(height * factor, width * factor, factor, 2 ** len(downs) * factor)
