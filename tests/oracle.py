"""Render single rows with diffusers' own pipeline as the reference, and compare images with it."""

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
from tests.rendering import max_difference, render

WITHOUT: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False, "add_watermarker": False}
"""Constructor arguments that omit components. Each class supports some of them."""


def load_pipeline(folder: Path, **components: Any) -> Any:
    """Load a checkpoint's pipeline, by default without its checker."""
    kind = getattr(diffusers, json.loads((folder / "model_index.json").read_text("utf-8"))["_class_name"])
    pipe = kind.from_pretrained(folder, dtype=torch.float32, **(components or _without(kind)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_scheduler(pipe: Any, text: str) -> Any:
    """Return a copy of the pipeline with another scheduler, built as in diffusers' documentation."""
    spec = SchedulerSpec.parse(text)
    scheduler = getattr(diffusers, spec.name).from_config(pipe.scheduler.config, **dict(spec.options))
    kind = type(pipe)
    other = kind(**_without(kind) | {**pipe.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    return other


def call_diffusers(pipe: Any, request: PromptRequest) -> tuple[np.ndarray, list[bool] | None]:
    """Return the image (H, W, 3) uint8 that diffusers renders for one row, and its checker's flags."""
    params = request.params
    # Some pipelines do not support these arguments.
    negative = {} if request.negative_prompt is None else {"negative_prompt": request.negative_prompt}
    rescale = {"guidance_rescale": params.guidance_rescale} if params.guidance_rescale else {}
    output = pipe(
        request.prompt,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        height=params.height,
        width=params.width,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="np",
        **negative,
        **rescale,
    )
    return (output.images[0] * 255).round().astype(np.uint8), getattr(output, "nsfw_content_detected", None)


def assert_close(image: np.ndarray, oracle: np.ndarray) -> None:
    """Allow a difference of 1 in less than 1 % of the values, because values close to a half may round differently."""
    assert image.shape == oracle.shape
    assert max_difference(image, oracle) <= 1
    assert np.mean(image != oracle) < 0.01


def assert_parity(pipe: Any, model: object, requests: tuple[PromptRequest, ...]) -> None:
    """Compare rows rendered in one batch with diffusers. All rows differ, so the comparison detects swapped rows."""
    rendered = render(model, requests, slots=6, decode=2)
    assert rendered.keys() == {request.id for request in requests}
    oracles = {request.id: call_diffusers(pipe, request)[0] for request in requests}
    for name, oracle in oracles.items():
        assert_close(rendered[name].pixels, oracle)
        others = [image for other, image in oracles.items() if other != name and image.shape == oracle.shape]
        assert all(max_difference(oracle, other) > 2 for other in others)


def _without(kind: Any) -> dict[str, Any]:
    return {name: value for name, value in WITHOUT.items() if name in inspect.signature(kind).parameters}
