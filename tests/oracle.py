"""Compare images with an oracle: diffusers' own pipeline, which renders one row per call."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from batch_infer.records import PromptRequest
from batch_infer.settings import SchedulerSpec
from tests.rendering import furthest, render

DISABLED: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False, "add_watermarker": False}
"""Arguments that leave out components, for pipeline classes with these components."""


def load_pipeline(folder: Path, **components: Any) -> Any:
    """Load a checkpoint's pipeline, by default without its checker."""
    pipeline_class = getattr(diffusers, json.loads((folder / "model_index.json").read_text("utf-8"))["_class_name"])
    components = components or _disable_components(pipeline_class)
    pipe = pipeline_class.from_pretrained(folder, dtype=torch.float32, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_scheduler(pipe: Any, text: str) -> Any:
    """Return the pipeline with another scheduler, created as diffusers' documentation advises."""
    spec = SchedulerSpec.parse(text)
    scheduler = getattr(diffusers, spec.name).from_config(pipe.scheduler.config, **dict(spec.options))
    pipeline_class = type(pipe)
    other = pipeline_class(**_disable_components(pipeline_class) | {**pipe.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    return other


def render_alone(pipe: Any, request: PromptRequest) -> tuple[np.ndarray, list[bool] | None]:
    """Return the image (H, W, 3) uint8 that diffusers renders for one row, and its checker's flags."""
    params = request.params
    output = pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        guidance_rescale=params.guidance_rescale,
        height=params.height,
        width=params.width,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="np",
    )
    return (output.images[0] * 255).round().astype(np.uint8), getattr(output, "nsfw_content_detected", None)


def assert_close(image: np.ndarray, oracle: np.ndarray) -> None:
    """Allow rare differences of 1 of 255: only values close to a half can be rounded differently."""
    assert image.shape == oracle.shape
    assert furthest(image, oracle) <= 1
    assert np.mean(image != oracle) < 0.01


def assert_parity(pipe: Any, model: object, requests: tuple[PromptRequest, ...]) -> None:
    """Compare rows of one batch with diffusers. All rows differ, so that swapped rows would be noticed."""
    rendered = render(model, requests, slots=6, decode=2)
    assert rendered.keys() == {request.id for request in requests}
    oracles = {request.id: render_alone(pipe, request)[0] for request in requests}
    for name, oracle in oracles.items():
        assert_close(rendered[name].pixels, oracle)
        others = [image for other, image in oracles.items() if other != name and image.shape == oracle.shape]
        assert all(furthest(oracle, other) > 2 for other in others)


def _disable_components(pipeline_class: Any) -> dict[str, Any]:
    return {name: value for name, value in DISABLED.items() if name in inspect.signature(pipeline_class).parameters}
