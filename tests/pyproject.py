"""Read the table `project` of this project's pyproject.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.lowest_versions import read_project


def project() -> dict[str, Any]:
    return read_project(Path(__file__).parents[1] / "pyproject.toml")
