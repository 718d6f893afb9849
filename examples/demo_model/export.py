"""The last stage: write the trained parts in half precision and in the layout of Stable Diffusion 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

import tokens
from checker import build_processor
from diffusion import Denoiser, build_scheduler

CARD = Path(__file__).parent / "model_card"


def build_pipeline(
    vae: AutoencoderKL, denoiser: Denoiser, checker: StableDiffusionSafetyChecker | None
) -> StableDiffusionPipeline:
    """Return a pipeline of the trained parts."""
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=denoiser.text_encoder.eval(),
        tokenizer=tokens.build(),
        unet=denoiser.unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=checker,
        feature_extractor=build_processor(),
        requires_safety_checker=checker is not None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def amend(path: Path, **values: object) -> None:
    """Set values in a JSON file."""
    known = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(known | values, indent=2) + "\n", encoding="utf-8")


def export(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write the model folder under another name and then replace the old one."""
    fresh = folder.with_name(folder.name + ".fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    for part in (pipe.vae, pipe.unet, pipe.text_encoder, pipe.safety_checker):
        part.half()
    pipe.save_pretrained(fresh)
    for weights in fresh.rglob("*.safetensors"):
        weights.chmod(0o644)
    tokens.save(fresh / "tokenizer")
    # Without torchvision the processor has another name; this name works with and without it.
    amend(fresh / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    processor = fresh / "feature_extractor" / "preprocessor_config.json"
    amend(processor, image_processor_type="CLIPImageProcessor", feature_extractor_type="CLIPFeatureExtractor")
    # Schedulers of the PNDM family read this when they are built from the same configuration.
    amend(fresh / "scheduler" / "scheduler_config.json", skip_prk_steps=True)
    for page in sorted(CARD.glob("*")):
        shutil.copy(page, fresh / page.name)
    stale = folder.with_name(folder.name + ".stale")
    shutil.rmtree(stale, ignore_errors=True)
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)
