"""Make the arguments of the calls of diffusers' text-to-image pipelines, whose parameters differ."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from batch_infer.models.card import SamplingRules
from batch_infer.models.pipeline_rules import build_without_weights, find_guidance_argument, make_rules, parameters_of
from batch_infer.records import SamplingParams

DISABLED_COMPONENTS: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False, "watermarker": None}
"""Arguments of pipelines that leave out components which change images after they are made."""


def describe_call(
    path: Path, prompt: str, negative: str | None, params: SamplingParams
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return arguments that load a checkpoint's pipeline without parts that change its images, and those of its call.

    Those of the call leave out the generator and the type of the output. Raises ModelError.
    """
    pipeline = build_without_weights(path)
    rules = make_rules(pipeline)
    params = replace(params, embedded_guidance=rules.embedded_guidance)
    arguments = CallArguments(pipeline, rules).make([prompt], negative, [0], params)
    call = {
        name: value[0] if isinstance(value, list) else value
        for name, value in arguments.items()
        if name not in ("generator", "output_type")
    }
    parameters = inspect.signature(type(pipeline)).parameters
    return {name: value for name, value in DISABLED_COMPONENTS.items() if name in parameters}, call


class CallArguments:
    """Makes the arguments of a pipeline's call, in new objects because some pipelines modify them."""

    def __init__(self, pipeline: Any, rules: SamplingRules) -> None:
        self._rules = rules
        self._guidance = find_guidance_argument(pipeline)
        self._parameters = parameters_of(type(pipeline))
        # Pipelines with an image processor return tensors, which are copied to the host in the background.
        self._output_type = "pt" if hasattr(pipeline, "image_processor") else "np"

    def make(
        self, prompts: Sequence[str], negative: str | None, seeds: Sequence[int], params: SamplingParams
    ) -> dict[str, Any]:
        """Return the arguments of a call for prompts with these seeds and the same negative prompt and parameters."""
        arguments: dict[str, Any] = {
            "prompt": list(prompts),
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            "height": params.height,
            "width": params.width,
            "num_inference_steps": params.num_inference_steps,
            "output_type": self._output_type,
        }
        if self._guidance:
            arguments[self._guidance] = params.guidance_scale
        if "clean_caption" in self._parameters:
            arguments["clean_caption"] = False  # the default depends on whether beautifulsoup4 and ftfy are installed
        if "guidance_rescale" in self._parameters:
            arguments["guidance_rescale"] = params.guidance_rescale
        if negative is not None:
            arguments["negative_prompt"] = [negative] * len(prompts)
        elif self._guidance == "true_cfg_scale" and params.uses_guidance:
            arguments["negative_prompt"] = [" "] * len(prompts)  # otherwise the pipeline omits guidance
        return arguments

    def make_trial(self, prompts: Sequence[str], guided: bool, divisor: int) -> dict[str, Any]:
        """Return the arguments of a trial call with the model's defaults, for a fraction of its native side."""
        rules, sizes = self._rules, self._rules.sizes
        scale = (rules.guidance_scale if rules.guidance_scale > 1 else 2.0) if guided else 1.0
        height, width = (
            max(sizes.min_side, side // divisor // sizes.side_multiple * sizes.side_multiple)
            for side in (sizes.native_height, sizes.native_width)
        )
        params = SamplingParams(height, width, rules.num_inference_steps, scale, 0.0, rules.embedded_guidance)
        return self.make(prompts, None, range(len(prompts)), params)
