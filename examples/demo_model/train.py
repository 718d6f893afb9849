"""Train the demo model from scratch: autoencoder, denoiser, safety checker, export."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

import world
from autoencoder import train_autoencoder, train_decoder
from checker import train_checker
from diffusion import Denoiser, train_denoiser
from export import build_pipeline, export
from runs import FULL, SMOKE, Run

STAGES = ("vae", "decoder", "unet", "checker", "export")


def make_renders(run: Run, vae: AutoencoderKL, denoiser: Denoiser) -> list[tuple[np.ndarray, str]]:
    """Render captions of training scenes; return each picture with the shape of its caption."""
    pipe = build_pipeline(vae, denoiser, None)
    rng = random.Random(f"{run.seed}-renders")
    allowed, _ = world.split()
    unsafe = [scene for scene in allowed if scene.shape == world.UNSAFE_SHAPE]
    count = run.scale.checker_renders
    scenes = rng.sample(unsafe, count // 4) + rng.sample(allowed, count - count // 4)
    renders = []
    for first in range(0, count, 32):
        batch = scenes[first : first + 32]
        output = pipe(
            [world.caption(scene, rng) for scene in batch],
            num_inference_steps=10,
            guidance_scale=rng.choice((2.0, 5.0, 7.5)),
            generator=torch.Generator().manual_seed(run.seed + first),
            output_type="np",
        )
        pictures = (output.images * 255).round().astype(np.uint8)
        renders += [(picture, scene.shape) for picture, scene in zip(pictures, batch, strict=True)]
    return renders


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--work", type=Path, default=Path("demo-model-training"), help="folder for checkpoints")
    parser.add_argument("--stage", choices=STAGES, default=STAGES[-1], help="last stage to run (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in the work folder")
    parser.add_argument("--smoke", action="store_true", help="a few steps per stage, as a test")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the stages in order. With --resume, finished ones only load their checkpoints."""
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    run = Run(options.work, options.seed, SMOKE if options.smoke else FULL, options.resume)
    last = STAGES.index(options.stage)
    torch.manual_seed(options.seed)
    vae = train_autoencoder(run)
    if last >= STAGES.index("decoder"):
        vae = train_decoder(run, vae)
    if last >= STAGES.index("unet"):
        denoiser = train_denoiser(run, vae)
    if last >= STAGES.index("checker"):
        checker = train_checker(run, vae, make_renders(run, vae, denoiser))
    if last < STAGES.index("export"):
        return
    export(build_pipeline(vae, denoiser, checker), options.out)
    print(f"wrote {options.out}", flush=True)


if __name__ == "__main__":
    main()
