"""Build diffusers' schedulers, and check `--scheduler` against diffusers' source without importing diffusers."""

from __future__ import annotations

import ast
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from batch_infer.errors import ModelError
from batch_infer.models.components import diffusers_folder
from batch_infer.models.untrusted import LOADING_ERRORS, describe, loading_errors
from batch_infer.settings import SHORT_NAMES, SchedulerSpec

if TYPE_CHECKING:
    from batch_infer.diffusion import Solver


def refuse_unknown_scheduler(spec: SchedulerSpec) -> None:
    """Raise ModelError with a hint if diffusers lacks the scheduler class, or the class lacks one of the options."""
    classes = _find_classes()
    if spec.name not in classes:
        raise ModelError(f"diffusers has no scheduler {spec.name}; {_suggest(spec.name, classes)}")
    options = _list_arguments(classes[spec.name], spec.name, "__init__")
    for key, _ in spec.options:
        if key not in options:  # from_config would silently ignore it
            matches = get_close_matches(key, options, n=1)
            hint = f"did you mean {matches[0]}?" if matches else f"it has {', '.join(options)}"
            if key in _list_arguments(classes[spec.name], spec.name, "step"):
                hint = f"{key} is an argument of its `step` method, which cannot be set here; remove it"
            raise ModelError(f"{spec.name} has no option {key}; {hint}")


def build_scheduler(spec: SchedulerSpec, original: Any) -> Any:
    """Build the scheduler that `spec` describes. Its other options come from the model's original scheduler.

    Raises ModelError.
    """
    import diffusers

    refuse_unknown_scheduler(spec)
    scheduler_type: Any = getattr(diffusers, spec.name, None)
    if backends := getattr(scheduler_type, "_backends", None):
        raise ModelError(f"{spec.name} needs {' and '.join(backends)}: pip install {' '.join(backends)}")
    if not (isinstance(scheduler_type, type) and issubclass(scheduler_type, diffusers.SchedulerMixin)):
        raise ModelError(f"{spec.name} works only in one of diffusers' pipelines; choose another scheduler")
    try:
        scheduler: Any = cast(Any, scheduler_type).from_config(original.config, **dict(spec.options))
    except LOADING_ERRORS as error:
        raise ModelError(f"{spec} cannot be built from this model's scheduler settings: {describe(error)}") from error
    if _is_flow(scheduler) != _is_flow(original):
        objective = "flow matching" if _is_flow(original) else "denoising"
        name = type(original).__name__
        raise ModelError(f"{spec} does not fit: the model was trained for {objective}, like its {name}")
    return scheduler


def make_solver(scheduler: Any, begin_index: int | None = None) -> Solver:
    """Build the solver of a scheduler. `begin_index` is explained in Solver. Raises ModelError."""
    from batch_infer.diffusion import Solver

    with loading_errors(f"{type(scheduler).__name__} with scheduler/scheduler_config.json"):
        return Solver(scheduler, begin_index)


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    has_flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(has_flow) or type(scheduler).__name__.startswith("FlowMatch")


def _suggest(name: str, classes: dict[str, Path]) -> str:
    by_stem = {_stem(candidate): candidate for candidate in (*classes, *SHORT_NAMES)}
    matches = [stem for stem in by_stem if stem.startswith(_stem(name))]
    matches += get_close_matches(_stem(name), by_stem, n=3, cutoff=0.7)
    if matches:
        return f"did you mean {' or '.join(by_stem[stem] for stem in list(dict.fromkeys(matches))[:3])}?"
    return f"short names are {', '.join(SHORT_NAMES)}; or use a class of diffusers, such as UniPCMultistepScheduler"


def _stem(name: str) -> str:
    return name.lower().removesuffix("scheduler")


@cache
def _find_classes() -> dict[str, Path]:
    """Map the name of each scheduler class for PyTorch to its source file."""
    classes = {}
    for file in sorted((diffusers_folder() / "schedulers").rglob("scheduling_*.py")):
        for line in file.read_text("utf-8").splitlines():
            if line.startswith("class ") and "SchedulerMixin" in line and not line.startswith("class Flax"):
                classes[line.removeprefix("class ").partition("(")[0]] = file
    return {name: file for name, file in classes.items() if name.endswith("Scheduler")}


def _list_arguments(file: Path, name: str, method: str) -> list[str]:
    tree = ast.parse(file.read_text("utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    methods = (node for node in body if isinstance(node, ast.FunctionDef) and node.name == method)
    return [argument.arg for node in methods for argument in (*node.args.args[1:], *node.args.kwonlyargs)]
