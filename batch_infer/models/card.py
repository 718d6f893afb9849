"""What a diffusers folder says of itself in its JSON files: family, sizes, scheduler, checker, fingerprint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_infer.errors import ModelError
from batch_infer.models.files import hash_files, refuse_unfit
from batch_infer.records import SizeRules, digest
from batch_infer.settings import ModelSettings, SchedulerSpec

DEMO_MODEL = Path(__file__).parent.parent / "demo_model"
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
"""Where components may come from: another name could be a Python file in the model's folder."""
CHECKER = frozenset({"safety_checker", "feature_extractor"})
NOT_PIXELS = CHECKER | {"scheduler"}
"""Components that the model's fingerprint leaves out: they have fingerprints of their own."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How checkpoints of a pipeline class are laid out, and what rows get of them that do not say.

    `denoiser` is the folder of the network that denoises, `parts` are the other components that there must be.
    `unread` components are neither read nor fetched.
    """

    family: str
    denoiser: str = "unet"
    parts: frozenset[str] = frozenset({"vae", "text_encoder", "tokenizer", "scheduler"})
    unread: frozenset[str] = frozenset()
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0

    def read(self, components: set[str]) -> set[str]:
        """Of the components that model_index.json names, those that are read."""
        return components - self.unread | {self.denoiser}


LAYOUTS = {
    "StableDiffusionPipeline": Layout("stable_diffusion"),
    "LatentConsistencyModelPipeline": Layout("stable_diffusion", num_inference_steps=4, guidance_scale=8.5),
    "DeciDiffusionPipeline": Layout(
        "decidiffusion",
        denoiser="flexible_unet",
        unread=frozenset({"unet"}),
        num_inference_steps=30,
        guidance_rescale=0.7,
    ),
}
"""By the pipeline class that model_index.json names; the defaults are the class's own."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A checkpoint on this machine. `scheduler` is the spec to build, `None` the checkpoint's own.

    `name` is its id or its folder's name, and not where the folder lies: images carry it. `embedded_guidance`: the
    model takes the guidance scale as an input (Meng et al., arXiv 2210.03142), so that one pass a step does.
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
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    embedded_guidance: bool = False

    @property
    def has_checker(self) -> bool:
        return self.checker_fingerprint is not None


def read_card(settings: ModelSettings) -> ModelCard:
    """Find the checkpoint, downloading it where it is a Hugging Face id, and read what it is. Raises ModelError."""
    path = _find(settings)
    name = settings.name or "built-in demo model"
    index = _json(path / "model_index.json", name)
    layout = _layout(index, name)
    components = _components(index, layout, name)
    refuse_unfit(path, components, name, settings.variant)
    _refuse_no_words(path, components, name)
    has_checker = "safety_checker" in components and (path / "safety_checker").is_dir()
    denoiser = _json(path / layout.denoiser / "config.json", name)
    scheduler = _json(path / "scheduler" / "scheduler_config.json", name)
    spec = settings.scheduler
    return ModelCard(
        name=path.name if settings.name and Path(settings.name).expanduser().is_dir() else name,
        path=path,
        revision=settings.revision,
        variant=settings.variant,
        family=layout.family,
        fingerprint=hash_files(path, components - NOT_PIXELS, settings.variant),
        sizes=_sizes(denoiser, _json(path / "vae" / "config.json", name), f"{name}: {layout.denoiser}"),
        scheduler=spec,
        scheduler_name=str(spec) if spec else str(scheduler.get("_class_name")),
        scheduler_fingerprint=digest([scheduler, str(spec)]),
        checker_fingerprint=hash_files(path, CHECKER, settings.variant) if has_checker else None,
        num_inference_steps=layout.num_inference_steps,
        guidance_scale=layout.guidance_scale,
        guidance_rescale=layout.guidance_rescale,
        embedded_guidance=denoiser.get("time_cond_proj_dim") is not None,
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


def _layout(index: dict[str, Any], name: str) -> Layout:
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in LAYOUTS:
        raise ModelError(f"{name} is a {pipeline}; this version runs {', '.join(LAYOUTS)}")
    return LAYOUTS[pipeline]


def _components(index: dict[str, Any], layout: Layout, name: str) -> set[str]:
    """The components that are read. Raises ModelError where one is wanting, or is code of its own."""
    found = set()
    for key, value in index.items():
        match value:
            case [None, *_]:
                continue
            case [str(library), str()] if library in LIBRARIES and key.isidentifier():
                found.add(key)
            case [*_] if not key.startswith("_"):
                raise ModelError(f"{name}: {key} is {value}, and only classes of diffusers and transformers are run")
    found = layout.read(found)
    if missing := (layout.parts | {layout.denoiser}) - found:
        raise ModelError(f"{name}: model_index.json names no {', '.join(sorted(missing))}; is the folder complete?")
    return found


def _refuse_no_words(path: Path, components: set[str], name: str) -> None:
    """transformers would make a tokenizer without a word in it, and every prompt would be the empty one."""
    for component in sorted(components):
        words = ("tokenizer.json", "vocab.json", "spiece.model")
        if component.startswith("tokenizer") and not any((path / component / file).is_file() for file in words):
            raise ModelError(f"{name}: {component}/ holds none of {', '.join(words)}; is the folder complete?")


def _sizes(denoiser: dict[str, Any], vae: dict[str, Any], told: str) -> SizeRules:
    try:
        denoiser = denoiser.get("configurations", denoiser)
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        # DeciDiffusion's last level goes down once more, to half of what its skips hold.
        downs = denoiser.get("add_downsample") or denoiser["block_out_channels"][1:]
        deepest = 2 ** len(downs)
        native = denoiser["sample_size"]
        height, width = (native, native) if isinstance(native, int) else native
        return SizeRules(height * factor, width * factor, factor, deepest * factor)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{told}/config.json or vae/config.json does not say its sizes: {error}") from error
