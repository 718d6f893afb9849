"""Write scripts that make one image with plain diffusers, without importing this package or torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_infer.errors import ModelError
from batch_infer.models.card import ANY_PIPELINE
from batch_infer.models.checkpoint import locate_checkpoint
from batch_infer.models.families import FAMILIES
from batch_infer.models.textual_inversion import Embedding, read_embeddings
from batch_infer.models.untrusted import read_object
from batch_infer.records import SamplingParams
from batch_infer.settings import LoraSpec, ModelSettings

WITHOUT: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"safety_checker": None, "requires_safety_checker": False},
    "LatentConsistencyModelPipeline": {"safety_checker": None, "requires_safety_checker": False},
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}
"""Arguments that leave out components which change images after they are made, for the pipelines of model families."""


@dataclass(frozen=True, slots=True)
class PlainImage:
    """What determines an image. `model` names a local checkpoint by its absolute path, or one of the Hub.

    `family` is that of ModelCard. `device` and `dtype` are those of the run. `loras` are those of --lora and the row's
    own. `file` is the name of the file to save the image in.
    """

    model: ModelSettings
    family: str
    device: str
    dtype: str
    loras: tuple[LoraSpec, ...]
    prompt: str
    negative_prompt: str | None
    seed: int
    params: SamplingParams
    file: str


@dataclass(frozen=True, slots=True)
class _Pipeline:
    """A pipeline class, the arguments that leave out components, those of its call, and how to read its image."""

    name: str
    without: Mapping[str, Any]
    arguments: Mapping[str, Any]
    image: str = ".images[0]"


def write_script(image: PlainImage) -> str:
    """Return the script. Raises ModelError if plain diffusers cannot make the image, or a file is missing."""
    folder, repository = locate_checkpoint(image.model)
    source = repository or str(folder)
    name = read_object(folder / "model_index.json", source)["_class_name"]
    _refuse(image, name)
    pipeline = _inspect(image, folder, name)
    embeddings = read_embeddings(image.model.embeddings)
    scheduler = image.model.scheduler
    imports = [pipeline.name, *([scheduler.name] if scheduler else [])]
    lines = ["import torch", f"from diffusers import {', '.join(imports)}"]
    lines += ["from safetensors.torch import load_file"] * bool(embeddings) + [""]
    if image.device == "cuda" and image.dtype == "float32":
        lines.append("torch.backends.cudnn.allow_tf32 = False")
    lines += _load_lines(image, pipeline, source)
    if scheduler is not None:
        options = "".join(f", {key}={value!r}" for key, value in scheduler.options)
        lines.append(f"pipe.scheduler = {scheduler.name}.from_config(pipe.scheduler.config{options})")
    lines += [*_embedding_lines(embeddings), *_lora_lines(image.loras)]
    if image.device != "cpu":
        lines.append(f"pipe.to({image.device!r})")
    lines += [*_noise_lines(image), *_call_lines(image, pipeline)]
    return "\n".join(lines) + "\n"


def _refuse(image: PlainImage, name: str) -> None:
    """Raise ModelError if plain diffusers cannot make the image."""
    reason = None
    if name in FAMILIES and FAMILIES[name].pipeline_class is not None:
        reason = f"diffusers has no {name}, whose networks batch-infer loads itself"
    elif image.model.long_prompts:
        reason = "its prompt was read with --long-prompts, which diffusers does not have"
    elif image.model.quantize:
        reason = f"its weights were quantized by --quantize {image.model.quantize}, which needs more than a few lines"
    elif name == "StableDiffusion3Pipeline" and image.params.guidance_rescale and image.family != ANY_PIPELINE:
        reason = f"{name} of diffusers does not support guidance_rescale"
    if reason:
        raise ModelError(f"plain diffusers cannot make this image: {reason}")


def _inspect(image: PlainImage, folder: Path, name: str) -> _Pipeline:
    params = image.params
    if image.family == ANY_PIPELINE:
        from batch_infer.models.pipeline_arguments import describe_call  # imports torch

        without, call = describe_call(folder, image.prompt, image.negative_prompt, params)
        return _Pipeline(name, without, call, ".image[0]" if name.startswith("Kandinsky5") else ".images[0]")
    arguments: dict[str, Any] = {"prompt": image.prompt}
    if image.negative_prompt is not None:
        arguments["negative_prompt"] = image.negative_prompt
    rescale = {"guidance_rescale": params.guidance_rescale} if params.guidance_rescale else {}
    names = ("height", "width", "num_inference_steps", "guidance_scale")
    numbers = {name: getattr(params, name) for name in names}
    return _Pipeline(name, WITHOUT.get(name, {}), {**arguments, **numbers, **rescale})


def _load_lines(image: PlainImage, pipeline: _Pipeline, source: str) -> Iterator[str]:
    options = {"revision": image.model.revision, "variant": image.model.variant}
    yield f"pipe = {pipeline.name}.from_pretrained("
    yield f"    {source!r},"
    yield from (f"    {key}={value!r}," for key, value in options.items() if value is not None)
    yield f"    dtype=torch.{image.dtype},"
    yield "    use_safetensors=True,"
    yield from (f"    {key}={value!r}," for key, value in pipeline.without.items())
    yield ")"


def _embedding_lines(embeddings: Sequence[Embedding]) -> Iterator[str]:
    for embedding in embeddings:
        yield f"embedding = load_file({str(embedding.path)!r})"
        for encoder, tensor in embedding.tensors:
            vectors = f"embedding[{tensor!r}].reshape({embedding.vectors}, -1)"
            parts = f"text_encoder=pipe.{encoder}, tokenizer=pipe.{encoder.replace('text_encoder', 'tokenizer')}"
            yield f"pipe.load_textual_inversion({{{embedding.token!r}: {vectors}}}, token={embedding.token!r}, {parts})"


def _lora_lines(loras: Sequence[LoraSpec]) -> Iterator[str]:
    for number, lora in enumerate(loras):
        path = Path(lora.file)
        name = f"lora_{number}"
        yield f"pipe.load_lora_weights({str(path.parent)!r}, weight_name={path.name!r}, adapter_name={name!r})"
        yield f"pipe.set_adapters({name!r}, {lora.weight!r})"
        yield "pipe.fuse_lora()"
        yield "pipe.unload_lora_weights()"


def _noise_lines(image: PlainImage) -> Iterator[str]:
    yield f"generator = torch.Generator('cpu').manual_seed({image.seed})"
    if image.dtype == "float32" or image.family == ANY_PIPELINE:
        return
    denoiser = next(family for family in FAMILIES.values() if family.name == image.family).denoiser
    yield f"# The run drew noise in float32. diffusers draws other noise in {image.dtype}, so pass the initial noise."
    yield (
        f"shape = (1, pipe.{denoiser}.config.in_channels, {image.params.height} // pipe.vae_scale_factor, "
        f"{image.params.width} // pipe.vae_scale_factor)"
    )
    yield f"latents = torch.randn(shape, generator=generator).to(pipe.device, torch.{image.dtype})"


def _call_lines(image: PlainImage, pipeline: _Pipeline) -> Iterator[str]:
    yield "image = pipe("
    yield from (f"    {name}={value!r}," for name, value in pipeline.arguments.items())
    if image.dtype != "float32" and image.family != ANY_PIPELINE:
        yield "    latents=latents,"
    yield "    generator=generator,"
    yield f"){pipeline.image}"
    yield f"image.save({image.file!r})"
