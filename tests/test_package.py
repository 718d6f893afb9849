"""Test that the package, its version, its locks, its workflows and its install hints agree with each other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import batch_infer
from batch_infer.extras import EXTRAS, install_command
from tests.pyproject import project
from tests.runs import QUICK, command
from tools import write_locks
from tools.try_wheel import find_missing, list_sources

ROOT = Path(__file__).parent.parent
PROJECT = project()
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
DEVELOPMENT = {"dev", "docs"}
"""Extras that no message names."""


# The version


def test_the_version_has_one_source(tmp_path: Path) -> None:
    version = batch_infer.__version__
    assert str(Version(version)) == version
    assert PROJECT["dynamic"] == ["version"]  # the test of the wheel finds this version in its metadata
    assert command("--version").stdout.split()[-1] == version
    (tmp_path / "table.csv").write_text("prompt\na red square\n")
    assert command("run", tmp_path / "table.csv", "--out", tmp_path / "out", *QUICK).code == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["batch_infer"] == version
    copies = [path for path in (ROOT / "batch_infer").rglob("*.py") if f'"{version}"' in path.read_text("utf-8")]
    assert copies == [ROOT / "batch_infer" / "__init__.py"]


def test_the_changelog_has_unreleased_changes_or_this_version() -> None:
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased" if Version(batch_infer.__version__).is_devrelease else batch_infer.__version__
    released = [Version(heading) for heading in headings if heading != "Unreleased"]
    assert released == sorted(released, reverse=True)
    assert released[0] <= Version(batch_infer.__version__)


# What is installed


def test_a_wheel_has_every_file_of_the_package_and_nothing_else(tmp_path: Path) -> None:
    """`make wheel` also builds a source distribution, and runs the installed commands."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", str(tmp_path), "."]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert find_missing(tmp_path) == []
    assert {"batch_infer/py.typed", "batch_infer/demo_model/model_index.json"} <= list_sources()


def test_extras_name_the_packages_of_pyproject() -> None:
    groups = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name not in DEVELOPMENT}
    bounds = {name: [_without_lower_bound(Requirement(line)) for line in lines] for name, lines in groups.items()}
    assert {name: list(packages) for name, packages in EXTRAS.items()} == bounds


def _without_lower_bound(requirement: Requirement) -> str:
    return requirement.name + ",".join(str(part) for part in requirement.specifier if part.operator != ">=")


def test_install_commands_are_quoted_for_a_shell() -> None:
    assert install_command("s3") == "pip install s3fs"
    assert install_command("provenance") == "pip install c2pa-python 'wmforge<0.2'"
    assert install_command("quantize", "bitsandbytes") == "pip install bitsandbytes"
    with pytest.raises(KeyError):
        install_command("quantize", "s3fs")


def test_no_message_names_an_extra_of_an_unpublished_package() -> None:
    sources = [ROOT / name for name in list_sources() if name.endswith(".py")]
    assert not [source for source in sources if re.search(r"install.*batch-infer\[", source.read_text("utf-8"))]


def test_dev_has_every_extra_that_the_tests_can_use() -> None:
    """mlflow and Azure's server need other versions of packages, so they have locks of their own."""
    own = next(Requirement(line) for line in PROJECT["optional-dependencies"]["dev"] if line.startswith("batch-infer["))
    assert own.extras == PROJECT["optional-dependencies"].keys() - {"dev", "mlflow", "azureml"}


# The locks


def locked(name: str) -> list[str]:
    return [write_locks.pin_of(line) for line in write_locks.read(ROOT / name)]


def test_the_lock_has_no_address_and_no_gpu_package() -> None:
    text = (ROOT / "requirements.lock").read_text("utf-8")
    assert "://" not in text
    assert "--" not in text
    assert not [line for line in text.splitlines() if write_locks.GPU_PACKAGE.match(line)]
    assert "nvidia-ml-py" in text


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_the_lock_has_each_dependency_for_each_python(version: str) -> None:
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
    environment = {"python_version": version, "python_full_version": f"{version}.20"}
    lines = [Requirement(line.partition("#")[0].strip()) for line in write_locks.read(ROOT / "requirements.lock")]
    found = [line.name for line in lines if line.marker is None or line.marker.evaluate(environment)]
    assert len(found) == len(set(found))
    groups = PROJECT["optional-dependencies"]
    texts = [
        *PROJECT["dependencies"],
        *(line for name in groups if name not in ("mlflow", "azureml") for line in groups[name]),
    ]
    needed = [requirement for text in texts if (requirement := Requirement(text)).name != "batch-infer"]
    missing = {each.name for each in needed if each.marker is None or each.marker.evaluate(environment)} - set(found)
    assert not missing


@pytest.mark.parametrize("name", ["tools/azure-server.lock", "tools/azure-sdk.lock"])
def test_the_azure_locks_have_only_what_differs(name: str) -> None:
    assert not set(locked(name)) & set(locked("requirements.lock"))


# Make and the workflows


def test_the_makefile_pins_no_version() -> None:
    assert not re.findall(r"\w==\d", MAKEFILE)


def _iterate_commands(workflow: dict[str, Any]) -> list[str]:
    commands = []
    for job in workflow["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        targets = [*matrix.get("target", []), *(entry["target"] for entry in matrix.get("include", []))]
        for step in job["steps"]:
            for name in targets or [""]:
                commands.append(step.get("run", "").replace("${{ matrix.target }}", name))
    return commands


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_targets_that_exist(path: Path) -> None:
    commands = _iterate_commands(yaml.safe_load(path.read_text("utf-8")))
    called = {name for text in commands for name in re.findall(r"\bmake ([\w-]+)", text)}
    assert called
    assert called <= TARGETS


def test_ci_tests_every_supported_python() -> None:
    matrix = yaml.safe_load(WORKFLOWS[0].read_text("utf-8"))["jobs"]["tests"]["strategy"]["matrix"]
    classifiers = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert matrix["python"] == classifiers
    assert PROJECT["requires-python"] == f">={classifiers[0]}"
    assert {entry["target"] for entry in matrix["include"]} >= {"lowest", "newest"}


def test_the_gate_calls_targets_that_exist() -> None:
    called = re.findall(r"^(?:exec )?make (\w+)", (ROOT / ".ci" / "run").read_text("utf-8"), re.MULTILINE)
    assert called == ["lint", "docs", "wheel", "test", "promises"]
    assert set(called) <= TARGETS
