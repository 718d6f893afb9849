"""Fake models and checkers without networks. A prompt is a number that sets the colour of the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import PNDMScheduler

from batch_infer.diffusion import Context, Solver
from batch_infer.models import Conditioning, LatentDiffusion
from batch_infer.records import PromptRequest, Verdict
from tests.rendering import CPU, make_request


class Painter(LatentDiffusion):
    """A latent diffusion model without networks. The image for the prompt `nan` is not finite."""

    device = CPU
    safety_checker: Any = None
    feature_extractor: Any = None
    pipeline: Any = None
    networks: Sequence[torch.nn.Module] = ()

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.solver = Solver(PNDMScheduler(skip_prk_steps=False))
        self.decoded: list[tuple[int, ...]] = []

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height // 8, width // 8

    def condition(self, requests: Sequence[PromptRequest]) -> list[Conditioning]:
        colours = [
            {"colour": torch.full((3, 1, 1), float(request.prompt or 0), dtype=self.dtype)} for request in requests
        ]
        return [
            Conditioning((colour, colour if request.params.uses_guidance else None), 1, False)
            for colour, request in zip(colours, requests, strict=True)
        ]

    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
        return torch.tanh(sample) + context["colour"]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.decoded.append(tuple(latents.shape))
        return torch.sigmoid(latents).float().repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


class MemoryLimitedPainter(Painter):
    """A Painter on a device whose memory limits the slots and the images per decoder call."""

    def __init__(self, slots: int = 1000, decode: int = 1000) -> None:
        super().__init__()
        self.max_slots, self.max_images = slots, decode

    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
        self._check_memory(len(sample), self.max_slots)
        return super().denoise(sample, timestep, context)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self._check_memory(len(latents), self.max_images)
        return super().decode(latents)

    def _check_memory(self, size: int, limit: int) -> None:
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")


class Recorder:
    """A checker that flags nothing and records the shapes of the images in each call."""

    name = "recorder"

    def __init__(self) -> None:
        self.calls: list[list[tuple[int, ...]]] = []

    def check(self, images: Sequence[np.ndarray]) -> list[Verdict]:
        self.calls.append([image.shape for image in images])
        return [Verdict(False, self.name, {})] * len(images)


def paint(name: str = "row", colour: object = 0.5, **values: Any) -> PromptRequest:
    return make_request(name, str(colour), **{"size": (16, 16), **values})
