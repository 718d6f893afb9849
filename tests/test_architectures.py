"""Test that pipelines of released architectures have the published sizes, and that small ones make images."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from batch_infer.models.architectures import PIPELINES, build_pipeline
from batch_infer.models.architectures.text import make_tokenizer

PARAMETERS: dict[str, dict[str, float]] = {
    "flux-schnell": {"transformer": 11.891e9, "text_encoder": 123.1e6, "text_encoder_2": 4.762e9, "vae": 83.8e6},
    "flux2-klein": {"transformer": 3.876e9, "text_encoder": 4.022e9, "vae": 84.05e6},
    "qwen-image": {"transformer": 20.430e9, "text_encoder": 8.292e9, "vae": 126.9e6},
    "z-image": {"transformer": 6.155e9, "text_encoder": 4.022e9, "vae": 83.8e6},
    "sana": {"transformer": 1.6045e9, "text_encoder": 2.614e9, "vae": 312.3e6},
}
"""Parameters of each network.

Published: FLUX.1 11.9e9, FLUX.2-klein-4B 3.88e9, Qwen-Image 20.43e9, Z-Image 6.15e9, SANA 1604.5e6, T5-XXL's encoder
4.76e9, Qwen3-4B 4.02e9, Qwen2.5-VL-7B 8.29e9, Gemma-2-2B 2.61e9, DC-AE 312e6.
"""
PROMPT = "a small red circle on fresh snow"
Shape = tuple[int, ...]
INPUTS: dict[str, dict[str, Shape]] = {
    "flux-schnell": {"prompt_embeds": (1, 512, 4096), "pooled_prompt_embeds": (1, 768)},
    "flux2-klein": {"prompt_embeds": (1, 512, 7680)},
    "qwen-image": {"prompt_embeds": (1, 12, 3584)},
    "z-image": {"prompt_embeds": (15, 2560)},
    "sana": {"prompt_embeds": (1, 300, 2304), "prompt_attention_mask": (1, 300)},
}
"""Shapes of PROMPT's embeddings, as arguments of the pipeline."""
DENOISER_INPUT: dict[str, Shape] = {
    "flux-schnell": (1, 4096, 64),
    "flux2-klein": (1, 4096, 128),
    "qwen-image": (1, 4096, 64),
    "z-image": (16, 1, 128, 128),
    "sana": (1, 32, 32, 32),
}
"""Shape of the denoiser's latents for 1024x1024 pixels. Z-Image gets a list of them, one per image."""


class Recorded(BaseException):
    """Ends a pipeline's call after its first denoiser call."""


def record_call(pipeline: Any, **arguments: Any) -> tuple[list[Shape], list[Shape]]:
    """Call a pipeline until its denoiser returns, and return the shapes of the denoiser's inputs and outputs."""
    recorded: list[list[Shape]] = []
    forward = pipeline.transformer.forward

    @functools.wraps(forward)
    def record(*args: Any, **kwargs: Any) -> None:
        recorded.extend([shapes_in((args, kwargs)), shapes_in(forward(*args, **kwargs))])
        raise Recorded

    pipeline.transformer.forward = record
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(Recorded), torch.no_grad():
        pipeline(height=1024, width=1024, num_inference_steps=2, generator=generator, output_type="latent", **arguments)
    return recorded[0], recorded[1]


def shapes_in(value: Any) -> list[Shape]:
    return [tuple(leaf.shape) for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", PIPELINES)
def test_networks_have_the_published_sizes(name: str) -> None:
    pipeline = build_pipeline(name, torch.device("meta"), torch.bfloat16)
    for component, count in PARAMETERS[name].items():
        network = getattr(pipeline, component)
        assert sum(weight.numel() for weight in network.parameters()) == pytest.approx(count, rel=5e-4)
        assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
        assert {weight.device.type for weight in network.parameters()} == {"meta"}
        assert not any(module.training for module in network.modules())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", PIPELINES)
def test_the_denoiser_accepts_the_inputs_of_one_row_at_1024_pixels(name: str) -> None:
    pipeline = build_pipeline(name, torch.device("meta"), torch.bfloat16)
    embeddings: dict[str, Any] = {
        argument: torch.empty(shape, device="meta", dtype=torch.bfloat16) for argument, shape in INPUTS[name].items()
    }
    if name == "z-image":
        embeddings["prompt_embeds"] = [embeddings["prompt_embeds"]]
    scale = {"true_cfg_scale" if name == "qwen-image" else "guidance_scale": 0.0}  # none
    inputs, outputs = record_call(pipeline, **embeddings, **scale)
    assert inputs[0] == outputs[0] == DENOISER_INPUT[name]
    assert INPUTS[name]["prompt_embeds"] in inputs


@pytest.mark.parametrize("name", PIPELINES)
def test_texts_and_latents_of_small_pipelines_have_the_same_lengths(name: str) -> None:
    """Only the widths are smaller."""
    pipeline = build_pipeline(name, torch.device("cpu"), torch.float32, small=True)
    scale = {"true_cfg_scale" if name == "qwen-image" else "guidance_scale": 0.0}  # none
    inputs, _ = record_call(pipeline, prompt=PROMPT, **scale)
    assert INPUTS[name]["prompt_embeds"][:-1] in [shape[:-1] for shape in inputs]
    image, latents = inputs[0], DENOISER_INPUT[name]
    assert image[0] in (latents[0], 16)  # 16 channels instead of 32 in the small SANA
    assert image[-2] == (latents[-2] if name != "sana" else 16)  # the small SANA renders 512 pixels and enlarges them


@pytest.mark.parametrize("name", PIPELINES)
def test_small_pipelines_make_reproducible_images_that_depend_on_the_prompt(name: str) -> None:
    images = []
    for prompt in (PROMPT, PROMPT, "a large blue square"):
        pipeline = build_pipeline(name, torch.device("cpu"), torch.float32, small=True)
        generator = torch.Generator().manual_seed(5)
        call = pipeline(
            prompt=prompt, height=64, width=64, num_inference_steps=2, generator=generator, output_type="pt"
        )
        images.append(call.images)
    assert images[0].shape == (1, 3, 64, 64)
    assert images[0].std() > 0.02
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_words_are_one_token_each() -> None:
    tokenizer = make_tokenizer("$A </s>")
    assert len(tokenizer("a small red circle on fresh snow").input_ids) == 8
    assert tokenizer.decode(tokenizer("unknown Größe").input_ids, skip_special_tokens=True) == "unknown Größe"


def test_the_template_of_qwen_image_has_as_many_tokens_as_the_pipeline_removes() -> None:
    pipeline = build_pipeline("qwen-image", torch.device("meta"), torch.float32)
    template = pipeline.prompt_template_encode.split("{}")[0]
    assert len(pipeline.tokenizer(template).input_ids) == pipeline.prompt_template_encode_start_idx == 34
