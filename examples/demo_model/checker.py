"""The safety checker stage: a small vision tower that recognizes the shape that represents unsafe content."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image, ImageFilter
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor

import world
from autoencoder import to_bytes, to_tensor
from runs import Run, train

VIEW = 64
WIDTH = 96
PROJECTION = 64
THRESHOLD = 0.5
# A cosine is at most 1, so a concept with this threshold never fires.
NEVER = 2.0
# Scale of the cosines before the cross entropy: their own range is too small for confident predictions.
SHARPNESS = 12.0


def build_processor() -> CLIPImageProcessor:
    """Return the image processor, which resizes and crops any picture for the tower."""
    return CLIPImageProcessor(size={"shortest_edge": VIEW}, crop_size={"height": VIEW, "width": VIEW})


def build_checker() -> StableDiffusionSafetyChecker:
    """Return the untrained checker. Only its first concept can fire."""
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": VIEW,
        "patch_size": 8,
        "projection_dim": PROJECTION,
    }
    # The checker has no text tower, but its configuration describes one: it is as small as possible.
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    text |= {"bos_token_id": 6, "eos_token_id": 7, "projection_dim": PROJECTION}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION)
    )
    with torch.no_grad():
        concepts = torch.randn(checker.concept_embeds.shape, generator=torch.Generator().manual_seed(0))
        checker.concept_embeds.copy_(F.normalize(concepts))
        checker.concept_embeds_weights.fill_(NEVER)
        checker.concept_embeds_weights[0] = THRESHOLD
        checker.special_care_embeds_weights.fill_(NEVER)
    return checker


class Trainee(nn.Module):
    """The checker's networks, and a head that classifies all shapes as an auxiliary task."""

    concept: torch.Tensor

    def __init__(self, checker: StableDiffusionSafetyChecker) -> None:
        super().__init__()
        self.vision_model = checker.vision_model
        self.visual_projection = checker.visual_projection
        self.reader = nn.Linear(PROJECTION, len(world.SHAPES))
        self.register_buffer("concept", checker.concept_embeds[0].detach().clone())

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embeds = self.visual_projection(self.vision_model(views).pooler_output)
        return F.cosine_similarity(embeds, self.concept[None]), self.reader(embeds)


def disturb(picture: np.ndarray, rng: random.Random) -> Image.Image:
    """Add blur and noise to a picture and reshape it, like the errors of a rendering."""
    image = Image.fromarray(picture)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    if rng.random() < 0.3:
        grain = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 14), picture.shape)
        image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    if rng.random() < 0.25:
        image = _widen(image, rng)
    if rng.random() < 0.25:
        side = rng.choice((48, 96, 128, 256))
        image = image.resize((side * image.width // image.height, side))
    return image


def _widen(image: Image.Image, rng: random.Random) -> Image.Image:
    """Extend the picture to a wider or taller one with its own ground, which the processor then crops."""
    wide, tall = rng.choice(((96, 64), (64, 96)))
    sheet = Image.new("RGB", (wide, tall), image.getpixel((1, 1)))
    sheet.paste(image, ((wide - image.width) // 2, (tall - image.height) // 2))
    return sheet


def train_checker(run: Run, vae: AutoencoderKL, renders: list[tuple[np.ndarray, str]]) -> StableDiffusionSafetyChecker:
    """Train the checker on drawings, their reconstructions, and renders with their shapes."""
    checker = build_checker()
    trainee = Trainee(checker)
    processor = build_processor()
    scenes, _ = world.split()
    unsafe = [scene for scene in scenes if scene.shape == world.UNSAFE_SHAPE]
    vae = vae.eval().to(memory_format=torch.channels_last)

    def pick(rng: random.Random) -> tuple[np.ndarray, str]:
        if renders and rng.random() < 0.35:
            return rng.choice(renders)
        # A third of the pictures show the concept; of random scenes only an eighth would.
        scene = rng.choice(unsafe if rng.random() < 0.25 else scenes)
        return world.draw(scene, rng), scene.shape

    def loss_of(step: int) -> torch.Tensor:
        rng = random.Random(f"{run.seed}-{step}")
        torch.manual_seed(run.seed * 1_000_003 + step)
        pictures, shapes = map(list, zip(*(pick(rng) for _ in range(run.scale.checker_batch)), strict=True))
        reconstruction_count = len(pictures) // 6
        pictures[:reconstruction_count] = reconstruct(vae, pictures[:reconstruction_count])
        views = processor([disturb(picture, rng) for picture in pictures], return_tensors="pt").pixel_values
        cosine, logits = trainee(views)
        target = torch.tensor([float(shape == world.UNSAFE_SHAPE) for shape in shapes])
        loss = F.binary_cross_entropy_with_logits(SHARPNESS * (cosine - THRESHOLD), target)
        return loss + 0.5 * F.cross_entropy(logits, torch.tensor([world.SHAPES.index(shape) for shape in shapes]))

    average = train(run, "checker", trainee, loss_of, run.scale.checker_steps, peak=1e-3, decay=0.995)
    assert isinstance(average, Trainee)
    checker.vision_model.load_state_dict(average.vision_model.state_dict())
    checker.visual_projection.load_state_dict(average.visual_projection.state_dict())
    return checker.eval()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Encode pictures, add noise, and decode them."""
    latents = vae.encode(to_tensor(pictures)).latent_dist.mode()
    latents = latents + 0.1 * latents.std() * torch.randn_like(latents)
    return to_bytes(vae.decode(latents).sample)
