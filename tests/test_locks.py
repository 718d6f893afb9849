"""Test that requirements.lock agrees with the version ranges in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.pyproject import project
from tools.lowest_versions import PINNED, lowest_versions

ROOT = Path(__file__).parent.parent
PYPROJECT = ROOT / "pyproject.toml"
PROJECT = project()
LOCKED = {
    requirement.name: str(next(iter(requirement.specifier))).removeprefix("==")
    for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    if (text := line.partition("#")[0].strip())
    if (requirement := Requirement(text)).marker is None or requirement.marker.evaluate()
}
GROUPS = {"dependencies": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
REQUIREMENTS = [
    requirement
    for requirement in (Requirement(text) for name in (*PINNED, "dev") for text in GROUPS[name])
    if requirement.name != "batch-infer" and (requirement.marker is None or requirement.marker.evaluate())
]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_the_locked_version_is_in_the_supported_range(requirement: Requirement) -> None:
    assert requirement.specifier.contains(LOCKED[canonicalize_name(requirement.name)])


def test_every_dependency_but_torch_has_a_lowest_version() -> None:
    lowest = lowest_versions(PYPROJECT)
    assert lowest["diffusers"] == "0.41"
    assert "torch" not in lowest
    assert ("tomli" in lowest) == (sys.version_info < (3, 11))


def test_a_dependency_without_a_lower_bound_is_refused(tmp_path: Path) -> None:
    text = PYPROJECT.read_text("utf-8").replace('"numpy>=1.26"', '"numpy"')
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ValueError, match="numpy has no lower bound"):
        lowest_versions(tmp_path / "pyproject.toml")
