"""Define what all training stages share: sizes, learning rate, averaged weights and checkpoints."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Scale:
    """Steps and batch sizes of each stage."""

    vae_steps: int
    vae_batch: int
    decoder_steps: int
    latents: int
    unet_steps: int
    unet_batch: int
    checker_steps: int
    checker_batch: int
    checker_renders: int


FULL = Scale(5200, 8, 2400, 30_000, 3200, 64, 2400, 48, 384)
SMOKE = Scale(6, 4, 6, 64, 6, 8, 6, 8, 8)


@dataclass
class Run:
    """Folder and options of a training run."""

    work: Path
    seed: int
    scale: Scale
    resume: bool

    def checkpoint(self, stage: str) -> Path:
        return self.work / f"{stage}.pt"


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: linear warm-up, then cosine decay to 0."""
    warm = min(100, max(1, steps // 10))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Average:
    """Moving average of a module's weights, which is exported."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        # The decay rises with the steps, so that the random initial weights have no lasting effect.
        decay = min(self.decay, (1 + step) / (10 + step))
        for mine, theirs in zip(self.module.parameters(), module.parameters(), strict=True):
            mine.lerp_(theirs, 1 - decay)


def train(
    run: Run,
    stage: str,
    module: nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    steps: int,
    peak: float,
    decay: float,
) -> nn.Module:
    """Train a module, or continue from its checkpoint, and return its averaged weights."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    average = Average(module, decay)
    first = 0
    path = run.checkpoint(stage)
    if run.resume and path.exists():
        saved = torch.load(path, weights_only=True)
        module.load_state_dict(saved["module"])
        average.module.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    started, mean_loss = time.monotonic(), 0.0
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average.update(module, step)
        mean_loss = loss.item() if mean_loss == 0 else 0.98 * mean_loss + 0.02 * loss.item()
        steps_done = step + 1
        if steps_done % 50 == 0 or steps_done == steps:
            seconds = (time.monotonic() - started) / (steps_done - first)
            print(f"{stage}: step {steps_done}/{steps}, loss {mean_loss:.4f}, {seconds:.3f} s per step", flush=True)
        if steps_done % 250 == 0 or steps_done == steps:
            save(path, module, average.module, optimizer, steps_done)
    return average.module


def save(path: Path, module: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write a checkpoint atomically."""
    state = {"module": module.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
    partial = path.with_suffix(".partial")
    torch.save({**state, "step": step}, partial)
    partial.replace(path)
