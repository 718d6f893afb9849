"""What a diffusers folder says of itself in its JSON files: family, sizes, scheduler, checker, fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from batch_infer.errors import ModelError
from batch_infer.models.components import named_components, refuse_code, refuse_no_words
from batch_infer.models.configs import check_configs, check_widths
from batch_infer.models.files import hash_files, refuse_unfit
from batch_infer.models.layouts import ANY, CHECKER, JUDGED, LAYOUTS, Layout, SamplingRules
from batch_infer.models.lora import Lora, read_loras
from batch_infer.models.schedulers import refuse_unknown_scheduler
from batch_infer.models.tokens import count_windows
from batch_infer.models.untrusted import read_object
from batch_infer.records import SizeRules, digest
from batch_infer.settings import ModelSettings, SchedulerSpec

DEMO_MODEL = Path(__file__).parent.parent / "demo_model"
NOT_PIXELS = CHECKER | {"scheduler"}
"""Components that the model's fingerprint leaves out: they have fingerprints of their own."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A checkpoint on this machine. `scheduler` is the spec to build, `None` the checkpoint's own.

    `name` is its id, its folder's name or its file's, and not where that lies: images carry it. `revision` is the
    commit that was fetched, `None` where it came from no Hub. `pipeline` is the class that model_index.json names.
    `windows`: so many times 77 tokens of a prompt are read. `embedded_guidance` and `fixed` are as in PipelineFacts.
    """

    name: str
    path: Path
    revision: str | None
    variant: str | None
    family: str
    pipeline: str
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
    fixed: tuple[tuple[str, Any], ...] = ()
    loras: tuple[Lora, ...] = ()
    windows: int = 1

    @property
    def title(self) -> str:
        """The name, and what was added to the weights."""
        return " + ".join((self.name, *map(str, self.loras)))

    @property
    def uses_pipeline_call(self) -> bool:
        """Whether diffusers' own pipeline has the loop, and not we."""
        return self.family == ANY.family

    @property
    def has_checker(self) -> bool:
        return self.checker_fingerprint is not None


def read_card(
    settings: ModelSettings,
    read_facts: Callable[[Path], SamplingRules] | None = None,
    *,
    checked: bool = True,
) -> ModelCard:
    """Find the checkpoint, downloading it where it is a Hugging Face id, and read what it is. Raises ModelError.

    `read_facts` says of a folder what diffusers alone can tell; by default it is asked here, which imports torch.
    With `checked` False the checkpoint's safety checker is not needed, and may be missing.
    """
    if settings.scheduler:
        refuse_unknown_scheduler(settings.scheduler)
    path, repository = _find(settings)
    name = settings.name or "built-in demo model"
    index = read_object(path / "model_index.json", name)
    layout = _layout(index, name)
    named = named_components(index, name)
    components = _read(named, layout, name)
    if not checked:
        components -= {component for component in CHECKER if not (path / component).is_dir()}
    _complete(path, repository, {key: named.get(key, ("", "")) for key in components}, layout, settings)
    scheduler = read_object(path / "scheduler" / "scheduler_config.json", name) if "scheduler" in named else {}
    if scheduler.get("use_dynamic_shifting"):
        layout = ANY  # its steps hang on the image's size, and rows of one table could not be packed
    if (spec := settings.scheduler) and not scheduler:
        raise ModelError(f"{name} has no scheduler that --scheduler {spec} could stand for")
    facts = _facts(layout, path, name, read_facts)
    if layout.denoiser is not None:
        check_widths(path, layout.family, layout.denoiser, name)
    loras = read_loras(settings.loras, layout.family, name)
    windows = count_windows(layout.family, name, long_prompts=settings.long_prompts)
    weights = hash_files(path, components - NOT_PIXELS, settings.variant)
    return ModelCard(
        name=_called(name) if settings.name else name,
        path=path,
        revision=path.name if repository else None,
        variant=settings.variant,
        family=layout.family,
        pipeline=index["_class_name"],
        fingerprint=_fingerprint(weights, index, layout, [(lora.fingerprint, lora.weight) for lora in loras], windows),
        scheduler=spec,
        scheduler_name=str(spec) if spec else named["scheduler"][1] if scheduler else "None",
        scheduler_fingerprint=digest([scheduler, str(spec)]),
        checker_fingerprint=hash_files(path, CHECKER, settings.variant) if "safety_checker" in components else None,
        loras=loras,
        windows=windows,
        **{field.name: getattr(facts, field.name) for field in fields(facts)},
    )


def _complete(
    path: Path,
    repository: str | None,
    components: Mapping[str, tuple[str, str]],
    layout: Layout,
    settings: ModelSettings,
) -> None:
    """Fetch the components where needed, and check all that is known without loading them. Raises ModelError."""
    name = settings.name or "built-in demo model"
    if repository is not None:
        from batch_infer.models.hub import fetch

        fetch(repository, path, components, settings.variant)
    refuse_unfit(path, components, name, settings.variant)
    refuse_code(path, components, name)
    refuse_no_words(path, components, name)
    check_configs(path, components, name, settings.variant, strict=layout is not ANY)


def _fingerprint(weights: str, index: dict[str, Any], layout: Layout, loras: list[Any], windows: int) -> str:
    """Of all that makes the model, beside its scheduler."""
    if layout is ANY:
        weights = digest([{**index, "_diffusers_version": None}, weights])
    elif layout.options:
        weights = digest([{key: index.get(key, value) for key, value in layout.options}, weights])
    elif index["_class_name"] == "LatentConsistencyModelPipeline":
        weights = digest(
            [index["_class_name"], weights]
        )  # the other class of its family mends the scheduler's settings
    return digest([weights, loras, windows]) if loras or windows > 1 else weights


def _facts(layout: Layout, path: Path, name: str, read_facts: Callable[[Path], SamplingRules] | None) -> SamplingRules:
    if layout is not ANY:
        denoiser, vae = (read_object(path / folder / "config.json", name) for folder in (str(layout.denoiser), "vae"))
        return layout.facts(denoiser, vae, told=name)
    if read_facts is not None:
        return read_facts(path)
    from batch_infer.models.pipelines import read_facts as read_here

    return read_here(path)


def _find(settings: ModelSettings) -> tuple[Path, str | None]:
    """The model's folder and, where it holds no more than model_index.json yet, the repository that has the rest."""
    path = DEMO_MODEL if settings.name is None else Path(settings.name).expanduser()
    if settings.revision and path.exists():
        raise ModelError(f"--revision {settings.revision} is for a Hugging Face id, and {path} is here")
    if settings.name is None:
        return DEMO_MODEL, None
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ModelError(f"{path} is not a diffusers folder: it has no model_index.json")
        return path.resolve(), None
    if path.is_file():
        from batch_infer.models.single_file import converted

        return converted(path), None
    if settings.name.count("/") != 1 or settings.name.startswith((".", "/", "~")):
        raise ModelError(f"no model folder at {settings.name}, and that is not a Hugging Face id (owner/name) either")
    from batch_infer.models.hub import fetch_index

    return fetch_index(settings.name, settings.revision), settings.name


def _called(name: str) -> str:
    """A folder by its name, a file without its ending, and a repository by its id."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_dir() else path.stem if path.is_file() else name


def _layout(index: dict[str, Any], name: str) -> Layout:
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or not pipeline.isidentifier():
        raise ModelError(f"{name} is a {pipeline}, and only pipeline classes of diffusers are run")
    return LAYOUTS.get(pipeline, ANY)


def _read(named: Mapping[str, tuple[str, str]], layout: Layout, name: str) -> set[str]:
    """The components that are read. Raises ModelError where one is wanting."""
    found = layout.read(set(named))
    if layout is ANY and named.get("safety_checker") != JUDGED:
        found -= CHECKER
    if missing := (layout.parts | {layout.denoiser or ""}) - found - {""}:
        raise ModelError(f"{name}: model_index.json names no {', '.join(sorted(missing))}; is the folder complete?")
    return found
