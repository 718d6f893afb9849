"""Render rows of tiny pipelines with batch-infer and with diffusers alone, and measure which calls rows share."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import numpy as np
import torch
from transformers import PreTrainedModel

from batch_infer.chain import BatchSizes, RenderedImage, StepLevelChain
from batch_infer.models import AnyPipeline, SamplingRules
from batch_infer.records import PromptRequest, SizeRules
from tests.pipelines.every import PIPELINES
from tests.rendering import CPU, make_request

SLOTS = 8
LONG_TEXT = "a small star and " * 40
"""A text that text encoders truncate to their maximum length."""


def make_pipeline(name: str, *, other_scheduler: bool = False) -> Any:
    """Build a tiny pipeline, optionally with its second scheduler."""
    tiny = PIPELINES[name]
    pipeline = tiny.build()
    if other_scheduler:
        pipeline.scheduler = getattr(diffusers, tiny.other_scheduler or "").from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_model(pipeline: Any) -> AnyPipeline:
    """Prepare a pipeline for stacked calls, with eager attention in its text encoders as in loaded pipelines."""
    tiny = PIPELINES[type(pipeline).__name__]
    for part in vars(pipeline).values():
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation("eager")
    sizes = SizeRules(*tiny.size, 8, 8)
    rules = SamplingRules(sizes, tiny.steps[0], 4.0, embedded_guidance=tiny.embeds)
    return AnyPipeline(pipeline, rules, CPU, torch.float32)


def make_row(name: str, row: str, prompt: str = "a red circle", **settings: Any) -> PromptRequest:
    """Return a request that the pipeline supports. `settings` are those of `make_request`."""
    tiny = PIPELINES[name]
    settings = {"size": tiny.size, "steps": tiny.steps[0], "guidance": 4.0 if tiny.guidance else 1.0, **settings}
    request = make_request(row, prompt, **settings)
    return replace(request, params=replace(request.params, embedded_guidance=tiny.embeds))


def rows_of(name: str) -> list[PromptRequest]:
    """Return rows with different texts, steps and seeds and, if possible, guidance and negative prompts."""
    tiny = PIPELINES[name]
    steps = [tiny.steps[index % len(tiny.steps)] for index in range(4)]
    rows = [
        make_row(name, "plain", steps=steps[0], seed=1),
        make_row(name, "long", LONG_TEXT, steps=steps[1], seed=2**63 - 1),
    ]
    if tiny.guidance:
        rows.append(make_row(name, "weak", "two blue squares beside a star", steps=steps[2], guidance=2.5, seed=3))
        rows.append(make_row(name, "unguided", "a ring", steps=steps[3], guidance=1.0, seed=4))
    else:
        rows.append(make_row(name, "other", "two blue squares beside a star", steps=steps[2], seed=3))
    if tiny.negative:
        rows.append(make_row(name, "negative", 'a "ring"', negative="green", steps=steps[1], seed=5))
    return rows


def render(model: AnyPipeline, rows: Iterable[PromptRequest], slots: int = SLOTS) -> dict[str, np.ndarray]:
    """Render rows together, and return their pixels (H, W, 3) uint8 by row id."""
    pixels = {}
    for outcome in StepLevelChain(model, BatchSizes(slots, 2), None).render(rows):
        assert isinstance(outcome, RenderedImage), outcome.error
        pixels[outcome.request.id] = outcome.pixels
    return pixels


def call_alone(pipeline: Any, request: PromptRequest) -> np.ndarray:
    """Return the image (H, W, 3) uint8 that diffusers renders for one row."""
    tiny, params = PIPELINES[type(pipeline).__name__], request.params
    arguments: dict[str, Any] = {
        "prompt": request.prompt, "height": params.height, "width": params.width,
        "num_inference_steps": params.num_inference_steps, "output_type": "np",
        "generator": torch.Generator("cpu").manual_seed(request.seed),
    }  # fmt: skip
    if tiny.guidance:
        arguments[tiny.guidance] = params.guidance_scale
    if "clean_caption" in inspect.signature(pipeline.__call__).parameters:
        arguments["clean_caption"] = False
    if request.negative_prompt is not None:
        arguments["negative_prompt"] = request.negative_prompt
    elif tiny.guidance == "true_cfg_scale" and params.uses_guidance:
        arguments["negative_prompt"] = " "  # this pipeline omits guidance without a negative prompt
    images = np.asarray(pipeline(**arguments)[0])
    pixels: np.ndarray = (images[0] * 255).round().astype(np.uint8)
    return pixels


@dataclass(frozen=True)
class Sharing:
    """Numbers of denoiser calls: of one row, and of two rows with texts of equal and of different lengths."""

    alone: int
    equal: int
    different: int

    def describe(self) -> str:
        """Return which rows share denoiser calls, in words."""
        if self.different == self.alone:
            return "all rows"
        if self.different < 2 * self.alone:
            return "all rows, in some calls"
        if self.equal < 2 * self.alone:
            return "rows with texts of equal length"
        return "none"


def measure_sharing(model: AnyPipeline) -> Sharing:
    """Count the denoiser calls that rows share."""
    name = type(model.pipeline).__name__
    row, other, long = (make_row(name, text, text) for text in ("a red circle", "a blue house", LONG_TEXT))
    counts = []
    for rows in ([row], [row, other], [row, long]):
        chain = StepLevelChain(model, BatchSizes(SLOTS, 2), None)
        assert all(isinstance(outcome, RenderedImage) for outcome in chain.render(rows))
        counts.append(chain.stages.ticks)
    return Sharing(*counts)
