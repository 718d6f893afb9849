"""Write scripts that reproduce one image with plain diffusers, without importing this package. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_infer.errors import ModelError, UsageError
from batch_infer.models.card import ANY_PIPELINE
from batch_infer.models.checkpoint import locate_checkpoint, read_card
from batch_infer.models.families import FAMILIES
from batch_infer.models.lora import read_lora
from batch_infer.models.script_text import check_name, check_script, write_comment, write_literal
from batch_infer.models.textual_inversion import Embedding, read_embeddings
from batch_infer.models.untrusted import read_object
from batch_infer.records import SamplingParams
from batch_infer.settings import LoraSpec, ModelSettings

DISABLED_BY_PIPELINE: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"safety_checker": None, "requires_safety_checker": False},
    "LatentConsistencyModelPipeline": {"safety_checker": None, "requires_safety_checker": False},
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}
"""Arguments that leave out components which change images after they are made, for the pipelines of model families."""
DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class PlainImage:
    """What determines an image. `model` names a local checkpoint by its absolute path, or one of the Hub.

    `family` is that of ModelCard. `device` and `dtype` are those of the run. `loras` are those of --lora and the row's
    own. `file` is the name of the file to save the image in. `identity` is that of the run, or None to write a script
    without comparing the model with that of the run, and `digests` are those of its LoRA and embedding files.
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
    identity: Mapping[str, str] | None = None
    digests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Pipeline:
    """A pipeline class, the arguments that leave out components, those of its call, and how to read its image."""

    name: str
    without: Mapping[str, Any]
    arguments: Mapping[str, Any]
    image: str = ".images[0]"


def write_script(image: PlainImage, comments: Sequence[str] = ()) -> str:
    """Return the script, which starts with comments of one line each.

    Raises UsageError if plain diffusers cannot make the image, a file is missing, the model is not that of the run, or
    a value is not one that a run records, since a script must not contain code from an edited file.
    """
    _check_values(image)
    folder, repository = locate_checkpoint(image.model)
    source = repository or str(folder)
    name = check_name(read_object(folder / "model_index.json", source).get("_class_name"), f"the pipeline of {source}")
    _refuse(image, name)
    _refuse_other_model(image, repository)
    pipeline = _inspect(image, folder, name)
    embeddings = read_embeddings(image.model.embeddings)
    scheduler = image.model.scheduler
    imports = [pipeline.name, *([check_name(scheduler.name, "the scheduler")] if scheduler else [])]
    lines = [*map(write_comment, comments), "import torch", f"from diffusers import {', '.join(imports)}"]
    lines += ["from safetensors.torch import load_file"] * bool(embeddings) + [""]
    if image.device == "cuda" and image.dtype == "float32":
        lines.append("torch.backends.cudnn.allow_tf32 = False")
    lines += [*_load_lines(image, pipeline, source), *_scheduler_lines(image)]
    lines += [*_embedding_lines(embeddings), *_lora_lines(image.loras)]
    if image.device != "cpu":
        lines.append(f"pipe.to({write_literal(image.device)})")
    lines += [*_noise_lines(image), *_call_lines(image, pipeline)]
    return check_script("\n".join(lines) + "\n")


def _check_values(image: PlainImage) -> None:
    """Raise UsageError for values that no run records."""
    params = image.params
    numbers = (image.seed, params.height, params.width, params.num_inference_steps)
    families = {ANY_PIPELINE, *(family.name for family in FAMILIES.values())}
    for name, value, is_valid in (
        ("device", image.device, image.device in DEVICES),
        ("dtype", image.dtype, image.dtype in DTYPES),
        ("model family", image.family, image.family in families),
        ("prompt", image.prompt, isinstance(image.prompt, str)),
        ("seed, height, width and number of steps", numbers, all(type(number) is int for number in numbers)),
    ):
        if not is_valid:
            raise UsageError(f"a script cannot be written with the {name} {value!a}, which no run records")


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


def _refuse_other_model(image: PlainImage, repository: str | None) -> None:
    """Raise ModelError if the checkpoint could run code, or if its files or the LoRAs are not those of the run.

    The files of a commit on the Hub do not change, so those of a model family are neither downloaded nor hashed.
    """
    model = image.model
    if repository is None or image.family == ANY_PIPELINE:
        card = read_card(model, needs_checker=False)
        current: Any = {"model": card.fingerprint, "scheduler": card.scheduler_fingerprint}
        recorded: Any = {name: image.identity.get(name) for name in current} if image.identity is not None else current
    else:
        loras = [read_lora(lora).fingerprint for lora in model.loras]
        current = (*loras, *(embedding.fingerprint for embedding in read_embeddings(model.embeddings)))
        recorded = current if image.identity is None else image.digests
    if current != recorded:
        raise ModelError(
            f"the files of {model.name or 'the demo model'}, its scheduler, LoRAs or embeddings are not those of the "
            "run: restore them to reproduce its images"
        )


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
    return _Pipeline(name, DISABLED_BY_PIPELINE.get(name, {}), {**arguments, **numbers, **rescale})


def _load_lines(image: PlainImage, pipeline: _Pipeline, source: str) -> Iterator[str]:
    options = {"revision": image.model.revision, "variant": image.model.variant}
    yield f"pipe = {pipeline.name}.from_pretrained("
    yield f"    {write_literal(source)},"
    yield from (f"    {key}={write_literal(value)}," for key, value in options.items() if value is not None)
    yield f"    dtype=torch.{image.dtype},"
    yield "    use_safetensors=True,"
    yield from (f"    {key}={write_literal(value)}," for key, value in pipeline.without.items())
    yield ")"


def _scheduler_lines(image: PlainImage) -> Iterator[str]:
    if (scheduler := image.model.scheduler) is not None:
        options = "".join(
            f", {check_name(key, 'an option of the scheduler')}={write_literal(value)}"
            for key, value in scheduler.options
        )
        yield f"pipe.scheduler = {scheduler.name}.from_config(pipe.scheduler.config{options})"


def _embedding_lines(embeddings: Sequence[Embedding]) -> Iterator[str]:
    for embedding in embeddings:
        token = write_literal(embedding.token)
        yield f"embedding = load_file({write_literal(str(embedding.path))})"
        for encoder, tensor in embedding.tensors:
            vectors = f"embedding[{write_literal(tensor)}].reshape({embedding.vectors}, -1)"
            parts = f"text_encoder=pipe.{encoder}, tokenizer=pipe.{encoder.replace('text_encoder', 'tokenizer')}"
            yield f"pipe.load_textual_inversion({{{token}: {vectors}}}, token={token}, {parts})"


def _lora_lines(loras: Sequence[LoraSpec]) -> Iterator[str]:
    for number, lora in enumerate(loras):
        folder, file = write_literal(str(Path(lora.file).parent)), write_literal(Path(lora.file).name)
        name = write_literal(f"lora_{number}")
        yield f"pipe.load_lora_weights({folder}, weight_name={file}, adapter_name={name})"
        yield f"pipe.set_adapters({name}, {write_literal(lora.weight)})"
        yield "pipe.fuse_lora()"
        yield "pipe.unload_lora_weights()"


def _noise_lines(image: PlainImage) -> Iterator[str]:
    yield f"generator = torch.Generator('cpu').manual_seed({write_literal(image.seed)})"
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
    yield from (f"    {name}={write_literal(value)}," for name, value in pipeline.arguments.items())
    if image.dtype != "float32" and image.family != ANY_PIPELINE:
        yield "    latents=latents,"
    yield "    generator=generator,"
    yield f"){pipeline.image}"
    yield f"image.save({write_literal(image.file)})"
