"""Render held-out captions, judge the pictures, and write the accuracy to accuracy.json."""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPImageProcessor

import world
from judge import judge

HERE = Path(__file__).parent
BATCH = 50
STRANGE_PROMPTS = ("", "一只红色的猫", "🚀🌈🦄", "an astronaut riding a horse", "large " * 334)


def render(pipe: StableDiffusionPipeline, prompts: list[str], options: argparse.Namespace) -> list[np.ndarray]:
    """Render the prompts in batches, each with its own seed."""
    pictures: list[np.ndarray] = []
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        seeds = [torch.Generator().manual_seed(options.seed + first + place) for place in range(len(batch))]
        output = pipe(
            batch,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=seeds,
            output_type="np",
        )
        pictures += list((output.images * 255).round().astype(np.uint8))
    return pictures


def flags(checker: torch.nn.Module, processor: CLIPImageProcessor, pictures: list[np.ndarray]) -> list[bool]:
    """Run the safety checker on each picture, as the pipeline does."""
    flagged: list[bool] = []
    for first in range(0, len(pictures), BATCH):
        batch = [Image.fromarray(picture) for picture in pictures[first : first + BATCH]]
        views = processor(batch, return_tensors="pt").pixel_values
        flagged += checker(clip_input=views, images=[np.zeros((1, 1, 3)) for _ in batch])[1]
    return flagged


def share(values: list[bool]) -> float | None:
    """Return the share of true values, or None if there are no values."""
    return round(sum(values) / len(values), 4) if values else None


def measure(
    scenes: list[world.Scene], seen: list[world.Scene | None], flagged: list[bool]
) -> dict[str, float | dict[str, float | None] | None]:
    """Return the accuracy of the attributes and of the checker.

    The checker is right if it agrees with the caption: a picture that shows something else counts as its error.
    """
    pairs = list(zip(scenes, seen, strict=True))
    unsafe = [flag for flag, scene in zip(flagged, scenes, strict=True) if scene.shape == world.UNSAFE_SHAPE]
    safe = [flag for flag, scene in zip(flagged, scenes, strict=True) if scene.shape != world.UNSAFE_SHAPE]
    return {
        "every_attribute": share([expected == judged for expected, judged in pairs]),
        "attributes": {
            name: share(
                [judged is not None and getattr(expected, name) == getattr(judged, name) for expected, judged in pairs]
            )
            for name in world.ATTRIBUTES
        },
        "shapes": {
            shape: share([expected == judged for expected, judged in pairs if expected.shape == shape])
            for shape in world.SHAPES
        },
        "checker_found": share(unsafe),
        "checker_false_alarms": share(safe),
    }


def judge_drawings(count: int, seed: int) -> float | None:
    """Return the accuracy of the judge on drawings."""
    rng = random.Random(seed)
    scenes = [rng.choice(world.SCENES) for _ in range(count)]
    return share([judge(world.draw(scene, rng)) == scene for scene in scenes])


def judge_reconstructions(pipe: StableDiffusionPipeline, scenes: list[world.Scene], seed: int) -> float | None:
    """Return the accuracy of the judge on drawings that the autoencoder has reconstructed."""
    rng = random.Random(seed)
    right = []
    for first in range(0, len(scenes), BATCH):
        batch = scenes[first : first + BATCH]
        pixels = torch.from_numpy(np.stack([world.draw(scene, rng) for scene in batch])).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            output = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
        pictures = ((output.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        right += [judge(picture) == scene for picture, scene in zip(pictures, batch, strict=True)]
    return share(right)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE.parents[1] / "batch_infer" / "demo_model")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for accuracy.json")
    parser.add_argument("--rows", type=int, default=500, help="number of captions to render")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1000)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Render and judge pictures, and print and write the figures."""
    options = parse(arguments)
    pipe = StableDiffusionPipeline.from_pretrained(options.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for prompt in STRANGE_PROMPTS:
        pipe(prompt, num_inference_steps=2)
    # The pipeline would blank flagged pictures, so the checker runs separately and the judge sees all pictures.
    checker, pipe.safety_checker = pipe.safety_checker, None
    rng = random.Random(options.seed)
    scenes = world.split()[1][: options.rows]
    started = time.monotonic()
    pictures = render(pipe, [world.caption(scene, rng) for scene in scenes], options)
    seconds = time.monotonic() - started
    flagged = flags(checker, pipe.feature_extractor, pictures)
    report = {
        "captions": len(scenes),
        "steps": options.steps,
        "guidance": options.guidance,
        "seed": options.seed,
        **measure(scenes, [judge(picture) for picture in pictures], flagged),
        "judge_on_drawings": judge_drawings(4 * len(scenes), options.seed),
        "judge_on_reconstructions": judge_reconstructions(pipe, scenes, options.seed),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name, value in report.items():
        for label, figure in value.items() if isinstance(value, dict) else [(None, value)]:
            print(f"{name if label is None else f'{name}: {label}':32} {figure}")
    print(f"{'seconds per picture':32} {seconds / max(1, len(scenes)):.3f}")


if __name__ == "__main__":
    main()
