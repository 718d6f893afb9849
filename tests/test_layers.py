"""The floors of the house: what may import what, and what stays out of a command that renders nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import batch_infer
from batch_infer.cli import commands

PACKAGE = Path(batch_infer.__file__).parent
ROOT = PACKAGE.parent

FLOORS = (
    {"batch_infer", "errors"},
    {"temporary"},
    {"records", "settings", "atomic", "stages", "database", "links", "terminal", "carried", "stopping"},
    {"images", "logfile", "accelerator"},
    {"diffusion"},
    {"models", "safety", "table", "planning", "manifest", "sinks", "calibration", "datasheets"},
    {"chain"},
    {"worker"},
    {"engines"},
    {"jobs"},
    {"cli"},
    {"__main__", "azureml"},
)
"""Rooms from the ground up: design.md's floors, told more finely where its rooms stand on each other.

A room imports rooms of lower floors only, so two on one floor do not know each other.
"""

DOORS = {
    *(
        f"batch_infer.jobs.{job}"
        for job in (
            "run",
            "plan",
            "status",
            "retry",
            "rescore",
            "rejudging",
            "remerge",
            "bench",
            "simulation",
            "packaging",
        )
    ),
    *("batch_infer.autotune.plateau", "batch_infer.models.architectures", "batch_infer.models.flops"),
    *(
        "batch_infer.autotune.devices",
        "batch_infer.engines.inline",
        "batch_infer.engines.launched",
        "batch_infer.engines.local",
        "batch_infer.autotune.probe",
        "batch_infer.worker.device",
        "batch_infer.worker.loading",
        "batch_infer.worker.rows",
        "batch_infer.safety.checker",
        "batch_infer.models.acceleration",
    ),
    *("batch_infer.models.any_pipeline", "batch_infer.cli.logs", "batch_infer.cli.config"),
    *("batch_infer.cli.environment", "batch_infer.safety.content_safety"),
    *(
        f"batch_infer.jobs.{room}"
        for room in ("cleanup", "job", "merge", "out", "record", "recovery", "results", "survey")
    ),
}
"""Rooms of a wing that the floor plan names, and that others may therefore enter beside its `__init__`."""

TORCH_FREE = {
    *("batch_infer", "errors", "records", "settings", "atomic", "table", "planning", "manifest", "sinks", "jobs"),
    *(
        "temporary",
        "cli",
        "__main__",
        "calibration",
        "batch_infer.models",
        "batch_infer.models.card",
        "batch_infer.models.files",
    ),
    *(
        "batch_infer.models.tokens",
        "batch_infer.models.hub",
        "batch_infer.models.components",
        "batch_infer.models.layouts",
    ),
    *("batch_infer.models.lora", "batch_infer.models.single_file"),
    *(
        f"batch_infer.engines.{module}"
        for module in (
            "probe",
            "launched",
            "ledger",
            "local",
            "meeting",
            "messages",
            "peers",
            "rank",
            "shift",
            "unguarded",
        )
    ),
    *("batch_infer.engines", "batch_infer.worker", "batch_infer.worker.contract", "batch_infer.worker.rows"),
}
"""Rooms, and modules of rooms, that a command needs which renders nothing."""
RENDERERS = {
    f"batch_infer.bench.{module}" for module in ("bare", "clock", "contenders", "contest", "lanes", "subject", "sweep")
}
"""Modules of these rooms that are imported late, by a command that renders."""
COMMAND_LINE = {"cli", "__main__", "errors", "records", "settings", "temporary"}
RENDERING = {"torch", "diffusers", "transformers", "accelerate"}
SLOW = RENDERING | {"pandas", "pyarrow", "numpy", "PIL", "scipy"}

EXTRAS = {
    "matplotlib": ("plot", "batch_infer.bench.plotting"),
    "compel": ("long-prompts", "batch_infer.models.long_prompts"),
    **{
        library: ("azure", f"batch_infer.safety.{module}")
        for library, module in (("azure", "content_safety"), ("requests", "content_safety"), ("tenacity", "patience"))
    },
    "pyrate_limiter": ("azure", "batch_infer.safety.patience"),
    "azureml_inference_server_http": ("azureml", "batch_infer.azureml.online"),
    "mlflow": ("mlflow", "batch_infer.jobs.export_mlflow"),
    "pyparsing": ("long-prompts", "batch_infer.models.long_prompts"),
}
"""Libraries that not everybody installs, with the extra that does and the module that needs them."""
DISTRIBUTIONS = {
    **{"PIL": "pillow", "huggingface_hub": "huggingface-hub"},
    **{"pyrate_limiter": "pyrate-limiter", "azureml_inference_server_http": "azureml-inference-server-http"},
    **{"prometheus_client": "prometheus-client", "pythonjsonlogger": "python-json-logger"},
}
"""Distributions that are not called as their module is."""


@dataclass(frozen=True)
class Import:
    """One imported module: where it says so, when it is done, and whether for the type checker alone."""

    target: str
    line: int
    at_start: bool
    typing_only: bool


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    return (module.split(".") + ["batch_infer"])[1] if "." in module else module


def floor_of(module: str) -> int:
    return next(floor for floor, rooms in enumerate(FLOORS) if room_of(module) in rooms)


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    return tuple(_walk(ast.parse(MODULES[module].read_text("utf-8")), at_start=True, typing_only=False))


def _walk(node: ast.AST, *, at_start: bool, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                for name in names:
                    yield Import(name.name, child.lineno, at_start, typing_only)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                for name in names:
                    deeper = f"{module}.{name.name}"
                    yield Import(deeper if deeper in MODULES else module, child.lineno, at_start, typing_only)
            case ast.ImportFrom():
                pytest.fail(f"line {child.lineno}: a relative import")
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                yield from _walk(child, at_start=False, typing_only=typing_only)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                yield from _walk(child, at_start=at_start, typing_only=True)
            case _:
                yield from _walk(child, at_start=at_start, typing_only=typing_only)


def inner_imports() -> Iterator[tuple[str, Import]]:
    """What the rooms import of each other, with the module that does."""
    for module in MODULES:
        for found in imports_of(module):
            if found.target in MODULES and room_of(found.target) != room_of(module):
                yield module, found


def loaded_with(module: str) -> dict[str, str]:
    """Packages of others that importing a module of ours loads, each with the module of ours that asks for it."""
    found: dict[str, str] = {}
    waiting, seen = [module], {module}
    while waiting:
        here = waiting.pop()
        parents = {here.rsplit(".", depth)[0] for depth in range(1, here.count(".") + 1)}
        asked = {entry.target for entry in imports_of(here) if entry.at_start and not entry.typing_only} | parents
        for target in asked - seen:
            if target in MODULES:
                seen.add(target)
                waiting.append(target)
            else:
                found.setdefault(target.split(".")[0], here)
    return found


def test_every_module_stands_on_one_floor() -> None:
    rooms = [room for floor in FLOORS for room in floor]
    assert len(rooms) == len(set(rooms))
    assert {room_of(module) for module in MODULES} == set(rooms)


def test_imports_go_down() -> None:
    upward = [
        f"{MODULES[module]}:{found.line} imports {found.target}"
        for module, found in inner_imports()
        if floor_of(found.target) >= floor_of(module)
    ]
    assert not upward


def test_a_wing_is_entered_by_its_door() -> None:
    """Imports for the type checker run nothing, and may name a room behind the door."""
    windows = [
        f"{MODULES[module]}:{found.line} imports {found.target}"
        for module, found in inner_imports()
        if found.target.count(".") > 1 and found.target not in DOORS and not found.typing_only
    ]
    assert not windows


def test_every_door_is_there() -> None:
    assert set(MODULES) >= DOORS


@pytest.mark.parametrize(
    ("rooms", "kept_out"),
    [(TORCH_FREE, RENDERING), (COMMAND_LINE, SLOW)],
    ids=["what does not render", "the command line"],
)
def test_rooms_import_nothing_slow(rooms: set[str], kept_out: set[str]) -> None:
    """Importing a module imports all that it imports in turn, so that is what is looked at."""
    loaded = {
        module: found
        for module in MODULES
        if (room_of(module) in rooms or module in rooms) and module not in RENDERERS
        if (found := {package: by for package, by in loaded_with(module).items() if package in kept_out})
    }
    assert not loaded


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in commands.commands)], ids=" ".join
)
def test_help_answers_at_once(arguments: list[str]) -> None:
    """What takes its time is loading libraries, so no slow one may be loaded."""
    script = f"""
import sys
from batch_infer.__main__ import main
sys.argv = ["batch-infer", *{arguments!r}]
try:
    main()
except SystemExit as end:
    slow = sorted({SLOW!r} & sys.modules.keys())
    print(end.code, slow, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "0 []\n"
    assert done.stdout


def test_every_library_is_a_dependency_in_pyproject() -> None:
    """An undeclared one would be found missing by the first user of a fresh environment."""
    block = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert block
    declared = set(re.findall(r'"([a-z-]+)', block[1]))
    imported = {found.target.split(".")[0] for module in MODULES for found in imports_of(module)}
    others = imported - set(sys.stdlib_module_names) - {"batch_infer"} - EXTRAS.keys()
    assert {DISTRIBUTIONS.get(name, name) for name in others} <= declared


@pytest.mark.parametrize("library", EXTRAS)
def test_the_library_of_an_extra_is_imported_late_in_the_one_module_that_is_named_for_it(library: str) -> None:
    extra, home = EXTRAS[library]
    assert re.search(
        rf'^{extra} = \[.*"{DISTRIBUTIONS.get(library, library)}\b', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    entries = [(module, found) for module in MODULES for found in imports_of(module) if not found.typing_only]
    homes = {module: found for module, found in entries if found.target.split(".")[0] == library}
    assert homes.keys() == {home}
    assert not homes[home].at_start or not [
        module for module, found in entries if found.target == home and found.at_start
    ]


def test_test_modules_do_not_import_each_other() -> None:
    """What several share has a module of its own, with a plain name."""
    imports = {
        path.name: {
            f"{node.module}.{name.name}" if isinstance(node, ast.ImportFrom) else name.name
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in node.names
        }
        for path in (ROOT / "tests").glob("*.py")
    }
    assert "test_layers.py" in imports
    assert not {name: bad for name, found in imports.items() if (bad := [n for n in found if "tests.test_" in n])}


def test_a_file_opens_by_saying_what_it_is() -> None:
    openings = {name: ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "" for name, path in MODULES.items()}
    assert not [name for name, opening in openings.items() if not opening.split("\n\n")[0].endswith((".", ":"))]
