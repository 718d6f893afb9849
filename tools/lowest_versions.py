"""Print pip constraints that pin each dependency in pyproject.toml to its lowest allowed version.

torch is not pinned: old builds are not available for every machine, and `make lowest` installs torch first.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PINNED = ("dependencies", "long-prompts", "lora", "plot", "https", "s3", "gs", "abfss", "azure", "nvml")


def read_project(pyproject: Path) -> dict[str, Any]:
    """Return the table `project` of pyproject.toml."""
    return dict(tomllib.loads(pyproject.read_text("utf-8"))["project"])


def lowest_versions(pyproject: Path) -> dict[str, str]:
    """Return the lower bound of each dependency by name. Raises ValueError if one has no lower bound."""
    project = read_project(pyproject)
    groups = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
    bounds = {}
    for requirement in (Requirement(text) for name in PINNED for text in groups[name]):
        lower = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if not lower:
            raise ValueError(f"{pyproject}: {requirement.name} has no lower bound")
        if requirement.name != "torch" and (requirement.marker is None or requirement.marker.evaluate()):
            bounds[requirement.name] = lower[0]
    return bounds


if __name__ == "__main__":
    for name, version in lowest_versions(Path(__file__).parent.parent / "pyproject.toml").items():
        print(f"{name}=={version}")
