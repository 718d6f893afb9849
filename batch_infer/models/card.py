"""What a diffusers folder says of itself in its JSON files: family, sizes, scheduler, checker, fingerprint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_infer.errors import ModelError
from batch_infer.records import SizeRules, digest
from batch_infer.settings import ModelSettings, SchedulerSpec

DEMO_MODEL = Path(__file__).parent.parent / "demo_model"
FAMILIES = {"StableDiffusionPipeline": "stable_diffusion"}
REQUIRED = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
"""Where components may come from: another name could be a Python file in the model's folder."""
CHECKER = {"safety_checker", "feature_extractor"}
NOT_PIXELS = CHECKER | {"scheduler"}
"""Components that the model's fingerprint leaves out: they have fingerprints of their own."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A checkpoint on this machine. `scheduler` is the spec to build, `None` the checkpoint's own.

    `name` is its id or its folder's name, and not where the folder lies: images carry it.
    """

    name: str
    path: Path
    revision: str | None
    variant: str | None
    family: str
    fingerprint: str
    sizes: SizeRules
    scheduler: SchedulerSpec | None
    scheduler_name: str
    scheduler_fingerprint: str
    checker_fingerprint: str | None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0

    @property
    def has_checker(self) -> bool:
        return self.checker_fingerprint is not None


def read_card(settings: ModelSettings) -> ModelCard:
    """Find the checkpoint, downloading it where it is a Hugging Face id, and read what it is. Raises ModelError."""
    path = _find(settings)
    name = settings.name or "built-in demo model"
    index = _json(path / "model_index.json", name)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in FAMILIES:
        raise ModelError(f"{name} is a {pipeline}; this version runs {', '.join(FAMILIES)}")
    components = _components(index, name)
    _refuse_pickles(path, components, name)
    _refuse_no_variant(path, components, name, settings.variant)
    _refuse_no_words(path / "tokenizer", name)
    has_checker = "safety_checker" in components and (path / "safety_checker").is_dir()
    scheduler = _json(path / "scheduler" / "scheduler_config.json", name)
    spec = settings.scheduler
    return ModelCard(
        name=path.name if settings.name and Path(settings.name).expanduser().is_dir() else name,
        path=path,
        revision=settings.revision,
        variant=settings.variant,
        family=FAMILIES[pipeline],
        fingerprint=_hash_files(path, components - NOT_PIXELS, settings.variant),
        sizes=_sizes(path, name),
        scheduler=spec,
        scheduler_name=str(spec) if spec else str(scheduler.get("_class_name")),
        scheduler_fingerprint=digest([scheduler, str(spec)]),
        checker_fingerprint=_hash_files(path, CHECKER, settings.variant) if has_checker else None,
    )


def _find(settings: ModelSettings) -> Path:
    if settings.name is None:
        return DEMO_MODEL
    path = Path(settings.name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ModelError(f"{path} is not a diffusers folder: it has no model_index.json")
        return path.resolve()
    if path.is_file():
        raise ModelError(f"{path} is a file; give the diffusers folder that holds model_index.json")
    if settings.name.count("/") != 1 or settings.name.startswith((".", "/", "~")):
        raise ModelError(f"no model folder at {settings.name}, and that is not a Hugging Face id (owner/name) either")
    from batch_infer.models.hub import download

    return download(settings.name, settings.revision, settings.variant)


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{name}: {path} is missing; is the folder complete?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{name}: {path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{name}: {path} does not hold a JSON object")
    return found


def _components(index: dict[str, Any], name: str) -> set[str]:
    """The folders that model_index.json names. Raises ModelError where one is wanting, or is code of its own."""
    found = set()
    for key, value in index.items():
        match value:
            case [None, *_]:
                continue
            case [str(library), str()] if library in LIBRARIES:
                found.add(key)
            case [*_] if not key.startswith("_"):
                raise ModelError(f"{name}: {key} is {value}, and only classes of diffusers and transformers are run")
    if missing := REQUIRED - found:
        raise ModelError(f"{name}: model_index.json names no {', '.join(sorted(missing))}; is the folder complete?")
    return found


def _refuse_pickles(path: Path, components: set[str], name: str) -> None:
    """Weights are read from safetensors alone: unpickling a file runs whatever code it holds."""
    for component in sorted(components):
        folder = path / component
        if not folder.is_dir():
            raise ModelError(f"{name}: model_index.json names {component}/, which is missing; is the folder complete?")
        pickles = [*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        if pickles and not any(folder.glob("*.safetensors")):
            raise ModelError(
                f"{name}: {component}/{pickles[0].name} is pickled and pickles run code when read; "
                "convert the checkpoint to safetensors (save_pretrained does)"
            )


def _refuse_no_variant(path: Path, components: set[str], name: str, variant: str | None) -> None:
    if variant and not any(variant_of(path / component, variant) for component in components):
        raise ModelError(f"{name} has no weights of variant {variant}")


def _refuse_no_words(folder: Path, name: str) -> None:
    """transformers would make a tokenizer without a word in it, and every prompt would be the empty one."""
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise ModelError(f"{name}: tokenizer/ holds neither tokenizer.json nor vocab.json; is the folder complete?")


def _sizes(path: Path, name: str) -> SizeRules:
    unet, vae = (_json(path / part / "config.json", name) for part in ("unet", "vae"))
    try:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        deepest = 2 ** (len(unet["block_out_channels"]) - 1)
        native = unet["sample_size"]
        height, width = (native, native) if isinstance(native, int) else native
        return SizeRules(height * factor, width * factor, factor, deepest * factor)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{name}: unet/config.json or vae/config.json does not say its sizes: {error}") from error


def variant_of(folder: Path, variant: str | None) -> str | None:
    """The variant, where this component has weights of it; else None, for its plain ones."""
    return variant if variant and any(folder.glob(f"*.{variant}[.-]*safetensors")) else None


def _hash_files(path: Path, components: set[str], variant: str | None) -> str:
    """sha256 over the names and bytes of all that is loaded of these components."""
    total = hashlib.sha256()
    for component in sorted(components):
        folder = path / component
        for file in sorted(folder.glob("*")):
            if file.suffix in (".json", ".txt") or _is_loaded(file, variant_of(folder, variant)):
                total.update(f"{component}/{file.name}\0".encode())
                with file.open("rb") as stream:
                    while block := stream.read(1 << 20):
                        total.update(block)
    return total.hexdigest()[:32]


def _is_loaded(file: Path, variant: str | None) -> bool:
    """Whether a file holds weights of this variant: `model.fp16.safetensors`, `model.fp16-00001-of-2.safetensors`."""
    _, *rest = file.name.removesuffix(".safetensors").split(".")
    named = rest[0].split("-")[0] if rest else None
    return file.suffix == ".safetensors" and named == variant
