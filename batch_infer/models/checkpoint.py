"""Read a checkpoint's JSON files and safetensors headers into a ModelCard, without loading weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batch_infer.errors import ModelError
from batch_infer.models.card import DEMO_MODEL, ModelCard, SamplingRules
from batch_infer.models.components import check_vocabularies, named_components, refuse_code
from batch_infer.models.configs import check_configs, check_widths
from batch_infer.models.families import CHECKER_COMPONENTS, FAMILIES, OTHER_FAMILY, Family
from batch_infer.models.lora import Lora, read_loras
from batch_infer.models.schedulers import refuse_unknown_scheduler
from batch_infer.models.tokens import WINDOWS
from batch_infer.models.untrusted import check_weights, hash_files, read_object
from batch_infer.records import digest
from batch_infer.settings import ModelSettings

SUPPORTED_CHECKER = ("stable_diffusion", "StableDiffusionSafetyChecker")
SEPARATE = CHECKER_COMPONENTS | {"scheduler"}
"""Components with separate fingerprints, excluded from the model's fingerprint."""


def read_card(
    settings: ModelSettings,
    inspect: Callable[[Path], SamplingRules] | None = None,
    *,
    needs_checker: bool = True,
) -> ModelCard:
    """Read a checkpoint, downloading it first if the model is a Hugging Face id. Raises ModelError.

    `inspect` returns the sampling rules of a folder without a model family; the default imports torch in this process.
    Without `needs_checker` the safety checker may be missing.
    """
    spec = settings.scheduler
    if spec:
        refuse_unknown_scheduler(spec)
    path, repository = _locate(settings)
    name = settings.name or "built-in demo model"
    index = read_object(path / "model_index.json", name)
    family, all_components = _find_family(index, name), named_components(index, name)
    components = _choose_components(all_components, family, name)
    if not needs_checker:
        components -= {component for component in CHECKER_COMPONENTS if not (path / component).is_dir()}
    chosen = {component: all_components.get(component, ("", "")) for component in components}
    if repository is not None:
        from batch_infer.models.hub import fetch

        fetch(repository, path, chosen, settings.variant)
    _check(path, chosen, name, settings.variant, strict=family is not OTHER_FAMILY)
    scheduler = read_object(path / "scheduler" / "scheduler_config.json", name) if "scheduler" in all_components else {}
    if scheduler.get("use_dynamic_shifting"):
        family = OTHER_FAMILY  # timesteps depend on the image size, so rows of different sizes could not share a step
    if spec and not scheduler:
        raise ModelError(f"{name} has no scheduler for --scheduler {spec} to replace")
    rules = _read_rules(family, path, name, inspect)
    loras, windows = _read_loras(settings, family, name), _count_windows(settings, family, name)
    weights = hash_files(path, components - SEPARATE, settings.variant)
    return ModelCard(
        name=_short_name(name) if settings.name else name,
        path=path,
        revision=path.name if repository else None,
        variant=settings.variant,
        family=family.name,
        pipeline=index["_class_name"],
        fingerprint=_fingerprint(weights, index, family, loras, windows),
        scheduler=spec,
        scheduler_name=str(spec) if spec else all_components["scheduler"][1] if scheduler else "None",
        scheduler_fingerprint=digest([scheduler, str(spec)]),
        checker_fingerprint=hash_files(path, CHECKER_COMPONENTS, settings.variant)
        if "safety_checker" in components
        else None,
        loras=loras,
        windows=windows,
        **{field.name: getattr(rules, field.name) for field in fields(rules)},
    )


def _locate(settings: ModelSettings) -> tuple[Path, str | None]:
    """Return the model's folder, and its Hub repository if the other files may be missing."""
    path = DEMO_MODEL if settings.name is None else Path(settings.name).expanduser()
    if settings.revision and path.exists():
        raise ModelError(f"--revision {settings.revision} is for a Hugging Face id, and {path} is local")
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
        raise ModelError(f"no model folder at {settings.name}, and that is not a Hugging Face id (owner/name) either")
    from batch_infer.models.hub import fetch_index

    return fetch_index(settings.name, settings.revision), settings.name


def _short_name(name: str) -> str:
    """Return a folder's name, a file's name without its suffix, or a repository's id."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_dir() else path.stem if path.is_file() else name


def _find_family(index: Mapping[str, Any], name: str) -> Family:
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or not pipeline.isidentifier():
        raise ModelError(f"{name} is a {pipeline}, and only pipeline classes of diffusers are run")
    return FAMILIES.get(pipeline, OTHER_FAMILY)


def _choose_components(all_components: Mapping[str, tuple[str, str]], family: Family, name: str) -> set[str]:
    """Return the names of the components to load. Raises ModelError if a required component is missing."""
    components = set(all_components) - family.skipped_components
    if family.denoiser is not None:
        components.add(family.denoiser)  # model_index.json of DeciDiffusion does not name it
    elif all_components.get("safety_checker") != SUPPORTED_CHECKER:
        components -= CHECKER_COMPONENTS
    if missing := family.required_components - components:
        raise ModelError(f"{name}: model_index.json names no {', '.join(sorted(missing))}; is the folder complete?")
    return components


def _check(
    path: Path, components: Mapping[str, tuple[str, str]], name: str, variant: str | None, *, strict: bool
) -> None:
    """Run all checks that need no loaded components. Raises ModelError."""
    check_weights(path, components, name, variant)
    refuse_code(path, components, name)
    check_vocabularies(path, components, name)
    check_configs(path, components, name, variant, strict=strict)


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
    from batch_infer.models.pipelines import inspect_pipeline

    return inspect_pipeline(path)


def _read_loras(settings: ModelSettings, family: Family, name: str) -> tuple[Lora, ...]:
    if not settings.loras:
        return ()
    if not family.supports_lora:
        raise ModelError(f"{name} is of the family {family.name}; --lora is for Stable Diffusion 1.x, 2.x and XL")
    if find_spec("peft") is None:
        raise ModelError("--lora needs peft: pip install 'batch-infer[lora]'")
    return read_loras(settings.loras)


def _count_windows(settings: ModelSettings, family: Family, name: str) -> int:
    """Return how many windows of 77 tokens a prompt may fill. Raises ModelError if long prompts are unsupported."""
    if not settings.long_prompts:
        return 1
    if not family.supports_long_prompts:
        raise ModelError(
            f"{name} is of the family {family.name}; --long-prompts is for Stable Diffusion and DeciDiffusion"
        )
    if find_spec("compel") is None:
        raise ModelError("--long-prompts needs compel: pip install 'batch-infer[long-prompts]'")
    return WINDOWS


def _fingerprint(weights: str, index: Mapping[str, Any], family: Family, loras: tuple[Lora, ...], windows: int) -> str:
    """Return a digest of everything that defines the model except its scheduler."""
    if family is OTHER_FAMILY:
        weights = digest([{**index, "_diffusers_version": None}, weights])
    elif family.pixel_options:
        weights = digest([{key: index.get(key, value) for key, value in family.pixel_options}, weights])
    elif family.fingerprints_class:
        weights = digest([index["_class_name"], weights])
    if not loras and windows == 1:
        return weights
    return digest([weights, [(lora.fingerprint, lora.weight) for lora in loras], windows])
