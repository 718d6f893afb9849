"""Read a checkpoint's JSON files and safetensors headers into a ModelCard, without loading weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batch_infer.errors import ModelError
from batch_infer.extras import install_command
from batch_infer.models.card import DEMO_MODEL, ModelCard, SamplingRules
from batch_infer.models.components import check_vocabularies, named_components, refuse_code
from batch_infer.models.configs import check_configs, check_widths
from batch_infer.models.families import CHECKER_COMPONENTS, FAMILIES, OTHER_FAMILY, Family
from batch_infer.models.lora import read_lora
from batch_infer.models.schedulers import refuse_unknown_scheduler
from batch_infer.models.startup import QUANTIZATION_LIBRARIES, allow_quantization_libraries
from batch_infer.models.textual_inversion import Embedding, read_embeddings
from batch_infer.models.tokens import WINDOWS
from batch_infer.models.untrusted import check_weights, hash_files, read_object
from batch_infer.records import Lora, digest
from batch_infer.settings import ModelSettings, Quantization

DEMO_NAME = "built-in demo model"
SUPPORTED_CHECKER = ("stable_diffusion", "StableDiffusionSafetyChecker")
SEPARATE = CHECKER_COMPONENTS | {"scheduler"}
"""Components whose files are covered by separate fingerprints instead of the model's fingerprint."""


def read_card(
    settings: ModelSettings, inspect: Callable[[Path], SamplingRules] | None = None, *, needs_checker: bool = True
) -> ModelCard:
    """Read a checkpoint's card. Raises ModelError.

    First, missing files of a Hugging Face id are downloaded, and a single file is converted if it is new. `inspect`
    returns the sampling rules of a folder without a model family; the default imports torch in this process. Without
    `needs_checker` the safety checker may be missing.
    """
    if settings.scheduler:
        refuse_unknown_scheduler(settings.scheduler)
    path, repository = locate_checkpoint(settings)
    name = settings.name or DEMO_NAME
    index = read_object(path / "model_index.json", name)
    components = _choose_components(index, name)
    if not needs_checker:
        missing = {component for component in CHECKER_COMPONENTS if not (path / component).is_dir()}
        components = {component: value for component, value in components.items() if component not in missing}
    if repository is not None:
        from batch_infer.models.hub import fetch

        fetch(repository, path, components, settings.variant)
    check_weights(path, components, name, settings.variant)
    refuse_code(path, components, name)
    check_vocabularies(path, components, name)
    check_configs(path, components, name, settings.variant, strict=index["_class_name"] in FAMILIES)
    return _make_card(settings, path, path.name if repository else None, index, components, inspect)


def locate_checkpoint(settings: ModelSettings) -> tuple[Path, str | None]:
    """Return the model's folder, after converting a single file, and its Hub repository, if any. Raises ModelError."""
    path = DEMO_MODEL if settings.name is None else Path(settings.name).expanduser()
    if settings.revision and path.exists():
        raise ModelError(f"--revision {settings.revision} needs a Hugging Face id, but {path} is local")
    if settings.name is None:
        return DEMO_MODEL, None
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ModelError(f"{path} is not a diffusers folder: it has no model_index.json")
        return path.resolve(), None
    if path.is_file():
        from batch_infer.models.single_file import convert_once

        return convert_once(path), None
    if settings.name.count("/") != 1 or settings.name.startswith((".", "/", "~")):
        raise ModelError(f"{settings.name} is neither a model folder nor a Hugging Face id (owner/name)")
    from batch_infer.models.hub import fetch_index

    return fetch_index(settings.name, settings.revision), settings.name


def _choose_components(index: Mapping[str, Any], name: str) -> dict[str, tuple[str, str]]:
    """Map each component to load to its library and class. Raises ModelError if one is missing or unsupported."""
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or not pipeline.isidentifier():
        raise ModelError(f"{name} is a {pipeline}, but only pipeline classes of diffusers are supported")
    family, components = FAMILIES.get(pipeline, OTHER_FAMILY), named_components(index, name)
    skipped = family.skipped_components
    if family.denoiser is not None:
        components.setdefault(family.denoiser, ("", ""))  # model_index.json of DeciDiffusion does not name it
    elif components.get("safety_checker") != SUPPORTED_CHECKER:
        skipped |= CHECKER_COMPONENTS
    if missing := family.required_components - components.keys():
        raise ModelError(f"{name}: model_index.json names no {', '.join(sorted(missing))}; is the folder complete?")
    return {component: value for component, value in components.items() if component not in skipped}


def _make_card(
    settings: ModelSettings,
    path: Path,
    revision: str | None,
    index: Mapping[str, Any],
    components: Mapping[str, tuple[str, str]],
    inspect: Callable[[Path], SamplingRules] | None,
) -> ModelCard:
    """Describe a checkpoint whose files are complete and safe to load. Raises ModelError."""
    spec, pipeline, name = settings.scheduler, index["_class_name"], settings.name or DEMO_NAME
    family = FAMILIES.get(pipeline, OTHER_FAMILY)
    scheduler = read_object(path / "scheduler" / "scheduler_config.json", name) if "scheduler" in components else {}
    if scheduler.get("use_dynamic_shifting"):
        family = OTHER_FAMILY  # timesteps depend on the image size, so rows of different sizes could not share a step
    if spec and not scheduler:
        raise ModelError(f"{name} has no scheduler for --scheduler {spec} to replace")
    _check_quantization(settings.quantize, path, components, name)
    rules = _read_rules(family, path, name, inspect)
    _check_options(settings, family, rules, f"{name} is a {pipeline}")
    loras = tuple(map(read_lora, settings.loras))
    embeddings = read_embeddings(settings.embeddings)
    windows = WINDOWS if settings.long_prompts else 1
    weights = hash_files(path, components.keys() - SEPARATE, settings.variant)
    has_checker = "safety_checker" in components
    return ModelCard(
        **{field.name: getattr(rules, field.name) for field in fields(rules)},
        name=_display_name(settings.name) if settings.name else name,
        path=path,
        revision=revision,
        variant=settings.variant,
        family=family.name,
        pipeline=pipeline,
        fingerprint=_quantized(
            _add_embeddings(_fingerprint(weights, index, family, loras, windows), embeddings), settings.quantize
        ),
        scheduler=spec,
        scheduler_name=str(spec) if spec else components["scheduler"][1] if scheduler else "None",
        scheduler_fingerprint=digest([scheduler, str(spec)]),
        checker_fingerprint=hash_files(path, CHECKER_COMPONENTS, settings.variant) if has_checker else None,
        loras=loras,
        windows=windows,
        quantize=settings.quantize,
        embeddings=embeddings,
    )


def _display_name(name: str) -> str:
    """Return a folder's name, a file's name without its suffix, or a repository's id."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_dir() else path.stem if path.is_file() else name


def _read_rules(
    family: Family, path: Path, name: str, inspect: Callable[[Path], SamplingRules] | None
) -> SamplingRules:
    """Return the sampling rules. Raises ModelError, also if the component sizes of a known family do not match."""
    if family.denoiser is not None:
        denoiser = read_object(path / family.denoiser / "config.json", name)
        rules = family.make_rules(denoiser, read_object(path / "vae" / "config.json", name), name)
        check_widths(path, family, name)
        return rules
    if inspect is not None:
        return inspect(path)
    from batch_infer.models.pipeline_rules import inspect_pipeline

    return inspect_pipeline(path)


def _check_options(settings: ModelSettings, family: Family, rules: SamplingRules, model: str) -> None:
    """Raise ModelError if the model or this environment does not support an option."""
    lora = "lora" if settings.loras else "lora-folder"
    uses_lora = bool(settings.loras or settings.lora_folder)
    if uses_lora and not rules.supports_lora:
        raise ModelError(f"{model}, for which diffusers has no LoRA loader: leave --{lora} out")
    if settings.embeddings and not rules.supports_embeddings:
        raise ModelError(f"{model}, for which diffusers has no loader of embeddings: leave --embedding out")
    if settings.quantize and settings.lora_folder:
        raise ModelError("--lora-folder and --quantize cannot be used together: leave one out")
    if settings.embeddings and settings.long_prompts:
        raise ModelError("--embedding and --long-prompts cannot be used together: leave one out")
    if settings.long_prompts and not family.supports_long_prompts:
        names = sorted({known.name for known in FAMILIES.values() if known.supports_long_prompts})
        raise ModelError(f"{model}; --long-prompts supports only the model families {', '.join(names)}")
    for option, is_set, library, extra in (
        (lora, uses_lora, "peft", "lora"),
        ("long-prompts", settings.long_prompts, "compel", "long-prompts"),
    ):
        if is_set and find_spec(library) is None:
            raise ModelError(f"--{option} needs {library}: {install_command(extra)}")


def _add_embeddings(fingerprint: str, embeddings: tuple[Embedding, ...]) -> str:
    """Return the fingerprint of a model with textual inversion embeddings."""
    if not embeddings:
        return fingerprint
    return digest([fingerprint, [(embedding.fingerprint, embedding.token) for embedding in embeddings]])


def _check_quantization(kind: Quantization | None, path: Path, components: Iterable[str], name: str) -> None:
    """Raise ModelError if --quantize needs a missing library, or the checkpoint is already quantized."""
    if kind is None:
        return
    allow_quantization_libraries()
    library = QUANTIZATION_LIBRARIES[kind]
    if find_spec(library) is None:
        raise ModelError(f"--quantize {kind} needs {library}: {install_command('quantize', library)}")
    for config in (path / component / "config.json" for component in sorted(components)):
        if config.is_file() and read_object(config, name).get("quantization_config"):
            raise ModelError(f"{name}: the weights in {config.parent.name}/ are already quantized; omit --quantize")


def _quantized(fingerprint: str, kind: Quantization | None) -> str:
    """Return the fingerprint of a model with quantized weights, or the same one without quantization."""
    return fingerprint if kind is None else digest([fingerprint, kind])


def _fingerprint(weights: str, index: Mapping[str, Any], family: Family, loras: tuple[Lora, ...], windows: int) -> str:
    """Return a digest of what defines the model, except the files of its scheduler and safety checker."""
    if family is OTHER_FAMILY:
        weights = digest([{**index, "_diffusers_version": None}, weights])
    elif family.pixel_options:
        weights = digest([{key: index.get(key, value) for key, value in family.pixel_options}, weights])
    elif family.fingerprints_class:
        weights = digest([index["_class_name"], weights])
    if not loras and windows == 1:
        return weights
    return digest([weights, [(lora.fingerprint, lora.weight) for lora in loras], windows])
