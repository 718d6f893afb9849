"""The schedulers that the installed diffusers has, and their options, read from its source without importing it."""

from __future__ import annotations

import ast
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from batch_infer.errors import ModelError
from batch_infer.settings import SHORT_NAMES, SchedulerSpec


def refuse_unknown_scheduler(spec: SchedulerSpec) -> None:
    """Raises ModelError, with the nearest names, for a class or an option that diffusers does not have."""
    classes = _classes()
    if spec.name not in classes:
        raise ModelError(f"diffusers has no scheduler {spec.name}; {_suggest(spec.name, classes)}")
    accepted = _arguments(classes[spec.name], spec.name, "__init__")
    for key, _ in spec.options:
        if key not in accepted:  # from_config would drop it in silence
            near = get_close_matches(key, accepted, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(accepted)}"
            if key in _arguments(classes[spec.name], spec.name, "step"):
                hint = f"{key} is an argument of its `step` method, which cannot be set here; remove it"
            raise ModelError(f"{spec.name} has no option {key}; {hint}")


def _suggest(name: str, classes: dict[str, Path]) -> str:
    by_stem = {_stem(known): known for known in (*classes, *SHORT_NAMES)}
    near = [stem for stem in by_stem if stem.startswith(_stem(name))]
    near += get_close_matches(_stem(name), by_stem, n=3, cutoff=0.7)
    if near:
        return f"did you mean {' or '.join(by_stem[stem] for stem in list(dict.fromkeys(near))[:3])}?"
    return f"short names are {', '.join(SHORT_NAMES)}; or give a class of diffusers, such as UniPCMultistepScheduler"


def _stem(name: str) -> str:
    return name.lower().removesuffix("scheduler")


@cache
def _classes() -> dict[str, Path]:
    """Return the file of each scheduler class."""
    spec = find_spec("diffusers")
    folders = [Path(place) / "schedulers" for place in (spec and spec.submodule_search_locations) or ()]
    found = {}
    for file in sorted(file for folder in folders for file in folder.rglob("scheduling_*.py")):
        for line in file.read_text("utf-8").splitlines():
            if line.startswith("class ") and "SchedulerMixin" in line and not line.startswith("class Flax"):
                found[line.removeprefix("class ").partition("(")[0]] = file
    return {name: file for name, file in found.items() if name.endswith("Scheduler")}


def _arguments(file: Path, name: str, method: str) -> list[str]:
    """Return the arguments that a method of a scheduler class takes."""
    tree = ast.parse(file.read_text("utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    found = (node for node in body if isinstance(node, ast.FunctionDef) and node.name == method)
    return [argument.arg for node in found for argument in (*node.args.args[1:], *node.args.kwonlyargs)]
