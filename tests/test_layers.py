"""Test which packages a package imports, and which libraries a command that renders nothing does not load."""

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

LAYERS = (
    {"errors", "extras", "lazy"},
    {"batch_infer"},
    {"records", "settings", "stages", "carried", "terminal", "stopping", "peak_flops", "spawning", "admission"},
    {"store"},
    {"images", "accelerator", "energy"},
    {"diffusion", "stacking"},
    {"models", "safety", "table", "planning", "manifest", "sinks", "provenance", "galleries"},
    {"chain"},
    {"worker"},
    {"autotune"},
    {"engines"},
    {"serving", "jobs"},
    {"bench", "simulation"},
    {"cli"},
    {"__main__", "azureml", "api"},
)
"""Packages and modules from the lowest layer up. Imports point down, never to the same layer."""

LOADS_TORCH = {"accelerator", "diffusion", "stacking", "serving", "azureml"}
"""Packages that may load torch on import. The others load it when a name that needs it is first used."""
COMMAND_LINE = {"cli", "__main__", "errors", "records", "settings", "store", "lazy"}
RENDERING = {"torch", "diffusers", "transformers", "accelerate"}
SLOW = RENDERING | {"pandas", "pyarrow", "numpy", "PIL", "scipy"}

EXTRAS = {
    "matplotlib": ("plot", "batch_infer.bench.plotting"),
    "peft": ("lora", "batch_infer.models.lora_formats"),
    "compel": ("long-prompts", "batch_infer.models.long_prompts"),
    "azure": ("azure", "batch_infer.safety.content_safety", "batch_infer.store.objects.azure"),
    "requests": ("azure", "batch_infer.safety.content_safety"),
    "tenacity": ("azure", "batch_infer.safety.retries"),
    "pyrate_limiter": ("azure", "batch_infer.safety.retries"),
    "azureml_inference_server_http": ("azureml", "batch_infer.azureml.online"),
    "mlflow": ("mlflow", "batch_infer.jobs.export_mlflow"),
    "ray": ("ray", "batch_infer.engines.ray"),
    "pyparsing": ("long-prompts", "batch_infer.models.long_prompts"),
    "torchao": ("quantize", "batch_infer.models.quantization"),
    "bitsandbytes": ("quantize", "batch_infer.models.quantization"),
    "pynvml": ("nvml", "batch_infer.energy"),
    "s3fs": ("s3", "batch_infer.store.objects.s3"),
    "cryptography": ("sign", "batch_infer.jobs.signing"),
    "c2pa": ("provenance", "batch_infer.provenance.c2pa"),
    "wmforge": ("provenance", "batch_infer.provenance.watermark"),
}
"""Optional libraries, with the extra that installs them and the modules that import them.

The libraries called azure are several: adlfs, of the extra abfss, installs those for storage.
"""
DISTRIBUTIONS = {
    **{"PIL": "pillow", "huggingface_hub": "huggingface-hub"},
    **{"pyrate_limiter": "pyrate-limiter", "azureml_inference_server_http": "azureml-inference-server-http"},
    **{"c2pa": "c2pa-python", "pynvml": "nvidia-ml-py"},
    **{"prometheus_client": "prometheus-client", "pythonjsonlogger": "python-json-logger"},
}
"""Distributions whose name differs from that of their module."""


PATH_METHODS = {
    *("chmod", "exists", "glob", "hardlink_to", "is_dir", "is_file", "is_mount", "is_symlink", "iterdir", "lstat"),
    *("mkdir", "open", "read_bytes", "read_text", "readlink", "rename", "resolve", "rglob", "rmdir", "samefile"),
    *("stat", "symlink_to", "touch", "unlink", "write_bytes", "write_text"),
}
OS_FUNCTIONS = {
    *("access", "chmod", "link", "listdir", "lstat", "makedirs", "mkdir", "open", "readlink", "remove", "rename"),
    *("replace", "rmdir", "scandir", "stat", "symlink", "truncate", "unlink", "utime", "walk"),
    *(f"path.{name}" for name in ("exists", "getmtime", "getsize", "isdir", "isfile", "islink", "realpath")),
}
REACHES_DISK = {
    "store": "OUT, and temporary files",
    "azureml": "OUT, which Azure mounts as a folder, and the output of an MLflow model",
    "simulation": "the folders of a simulated endpoint",
    "models": "checkpoints",
    "table": "tables, and downloads of them",
    "autotune": "the cache of measurements, and the driver's device files",
    "bench.plotting": "the file of --plot",
    "cli.config": "configuration files",
    "cli.metrics": "the metrics file",
    "cli.values": "the folder of the metrics file",
    "images": "the bytes of an image in memory",
    "galleries.assets": "the files of the page",
    "jobs.export_mlflow": "the exported model",
    "jobs.signing": "the keys of signatures",
    "provenance.c2pa": "the certificates and the key of signatures in images",
    "__main__": "the standard streams",
}
"""Packages and modules that reach a disk, and what they read or write there."""
EXCEPTIONS = {
    "engines.remote": {"path.exists", "card.path.is_dir", "folder.mkdir"},  # the model, and the folder of its lock
    "jobs.checksums": {"temporary.write_bytes"},  # a temporary file of the store
    "jobs.out": {"temporary.write_bytes"},  # a temporary file of the store
    "jobs.results": {"path.open"},  # a temporary file of the store
    "jobs.run_json": {"(folder / model.name).exists"},
    "sinks.webdataset": {"tarfile.open"},  # a temporary file of the store, or a file that the store has opened
    "worker.interface": {"Path('/proc/self/status').read_text"},
}
"""The expressions that reach a disk in modules that also use OUT. They reach OUT only through its store."""


@dataclass(frozen=True)
class Import:
    """One import statement's module, as written, and the module that defines the imported name."""

    target: str
    defined_in: str
    line: int
    at_start: bool
    typing_only: bool


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def package_of(module: str) -> str:
    """Return the name in LAYERS that a module belongs to."""
    return (module.split(".") + ["batch_infer"])[1] if "." in module else module


def layer_of(module: str) -> int:
    return next(layer for layer, packages in enumerate(LAYERS) if package_of(module) in packages)


@cache
def exports_of(package: str) -> dict[str, str]:
    """Return the module that defines each name that a package's `__init__` imports, now or on use."""
    if MODULES[package].name != "__init__.py":
        return {}
    tree = ast.parse(MODULES[package].read_text("utf-8"))
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.name: str(node.module) for node in statements for name in node.names}


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    return tuple(_walk(ast.parse(MODULES[module].read_text("utf-8")), at_start=True, typing_only=False))


def _walk(node: ast.AST, *, at_start: bool, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                for name in names:
                    yield Import(name.name, name.name, child.lineno, at_start, typing_only)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                for name in names:
                    submodule = f"{module}.{name.name}"
                    target = submodule if submodule in MODULES else module
                    defined_in = exports_of(module).get(name.name, target) if target in MODULES else target
                    yield Import(target, defined_in, child.lineno, at_start, typing_only)
            case ast.ImportFrom():
                pytest.fail(f"line {child.lineno}: a relative import")
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                yield from _walk(child, at_start=False, typing_only=typing_only)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                for part in child.body:
                    yield from _walk(ast.Module([part], []), at_start=at_start, typing_only=True)
                for part in child.orelse:
                    yield from _walk(ast.Module([part], []), at_start=at_start, typing_only=typing_only)
            case _:
                yield from _walk(child, at_start=at_start, typing_only=typing_only)


def inner_imports() -> Iterator[tuple[str, Import]]:
    """Yield each import of one package from another, with the importing module."""
    for module in MODULES:
        for entry in imports_of(module):
            if entry.target in MODULES and package_of(entry.target) != package_of(module):
                yield module, entry


def loaded_with(module: str) -> dict[str, str]:
    """Return the libraries that importing a module loads, each with the module of ours that imports it."""
    libraries: dict[str, str] = {}
    waiting, seen = [module], {module}
    while waiting:
        here = waiting.pop()
        parents = {here.rsplit(".", depth)[0] for depth in range(1, here.count(".") + 1)}
        entries = [entry for entry in imports_of(here) if entry.at_start and not entry.typing_only]
        targets = {name for entry in entries for name in (entry.target, entry.defined_in)} | parents
        for target in targets - seen:
            if target in MODULES:
                seen.add(target)
                waiting.append(target)
            else:
                libraries.setdefault(target.split(".")[0], here)
    return libraries


def test_every_module_belongs_to_one_layer() -> None:
    packages = [package for layer in LAYERS for package in layer]
    assert len(packages) == len(set(packages))
    assert {package_of(module) for module in MODULES} == set(packages)


def test_imports_point_down() -> None:
    upward = [
        f"{MODULES[module]}:{entry.line} imports {entry.target}"
        for module, entry in inner_imports()
        if layer_of(entry.target) >= layer_of(module)
        and not (module == "batch_infer" and entry.target == "batch_infer.api" and entry.typing_only)
    ]
    assert not upward


def test_a_package_is_entered_through_its_init() -> None:
    inside = [
        f"{MODULES[module]}:{entry.line} imports {entry.target}"
        for module, entry in inner_imports()
        if entry.target.count(".") > 1
    ]
    assert not inside


def test_a_package_does_not_import_itself_through_its_init() -> None:
    """Such an import would depend on the order of the imports in `__init__`."""
    circular = [
        f"{path}:{entry.line}"
        for module, path in MODULES.items()
        for entry in imports_of(module)
        if entry.target == f"batch_infer.{package_of(module)}" != module
    ]
    assert not circular


def test_packages_load_torch_only_on_use() -> None:
    packages = [module for module in MODULES if module.count(".") < 2 and package_of(module) not in LOADS_TORCH]
    slow = {module: loaded_with(module).keys() & RENDERING for module in packages}
    assert not {module: libraries for module, libraries in slow.items() if libraries}


def test_the_command_line_loads_nothing_slow() -> None:
    slow = {module: loaded_with(module).keys() & SLOW for module in MODULES if package_of(module) in COMMAND_LINE}
    assert not {module: libraries for module, libraries in slow.items() if libraries}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in commands.commands)], ids=" ".join
)
def test_help_loads_no_slow_library(arguments: list[str]) -> None:
    """Loading libraries takes the time, so no slow one may be loaded."""
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


def disk_accesses(module: str) -> Iterator[str]:
    """Yield each call of `open`, `os`, `shutil` or a method of Path that reaches a disk, except methods of stores."""
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        match node:
            case ast.Call(func=ast.Name(id="open")):
                yield f"{MODULES[module]}:{node.lineno}: open"
            case ast.Attribute(attr=method):
                owner, _, inner = ast.unparse(node.value).partition(".")
                is_function = owner == "os" and ".".join(filter(None, (inner, method))) in OS_FUNCTIONS
                is_copy = owner == "shutil" and method != "which"
                is_method = method in PATH_METHODS and not ast.unparse(node.value).endswith("store")
                if is_function or is_copy or is_method:
                    yield f"{MODULES[module]}:{node.lineno}: {ast.unparse(node)}"


def test_out_is_reached_only_through_a_store() -> None:
    """Otherwise it could not be in an object store."""
    names = {module: module.removeprefix("batch_infer.") for module in MODULES}
    accesses = {names[module]: list(disk_accesses(module)) for module in MODULES}
    reaching = {name for name, lines in accesses.items() if lines}
    allowed = {name for name in reaching if {name, name.partition(".")[0]} & REACHES_DISK.keys()}
    assert {name: {line.rpartition(": ")[2] for line in accesses[name]} for name in reaching - allowed} == EXCEPTIONS
    assert all(any(f"{name}.".startswith(f"{entry}.") for name in reaching) for entry in REACHES_DISK)


def test_every_library_is_a_dependency_in_pyproject() -> None:
    """An undeclared library would be missing in a fresh environment."""
    block = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert block
    declared = set(re.findall(r'"([a-z0-9-]+)', block[1]))
    imported = {entry.target.split(".")[0] for module in MODULES for entry in imports_of(module)}
    others = imported - set(sys.stdlib_module_names) - {"batch_infer"} - EXTRAS.keys()
    assert {DISTRIBUTIONS.get(name, name) for name in others} <= declared


@pytest.mark.parametrize("library", EXTRAS)
def test_libraries_of_extras_are_imported_late_in_their_one_module(library: str) -> None:
    extra, *expected = EXTRAS[library]
    assert re.search(
        rf'^{extra} = \[.*"{DISTRIBUTIONS.get(library, library)}\b', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    entries = [(module, entry) for module in MODULES for entry in imports_of(module) if not entry.typing_only]
    homes = {module: entry for module, entry in entries if entry.target.split(".")[0] == library}
    assert homes.keys() == set(expected)
    for home in expected:
        importers = [module for module, entry in entries if entry.defined_in == home and entry.at_start]
        assert not homes[home].at_start or not importers


def test_test_modules_do_not_import_each_other() -> None:
    """Shared helpers are in modules whose names do not begin with test_."""
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
    assert not {name: bad for name, names in imports.items() if (bad := [n for n in names if "tests.test_" in n])}


def test_every_file_has_a_docstring() -> None:
    openings = {name: ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "" for name, path in MODULES.items()}
    assert not [name for name, opening in openings.items() if not opening.split("\n\n")[0].endswith((".", ":"))]
