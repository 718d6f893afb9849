"""What pyproject.toml says of this project."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def project() -> dict[str, Any]:
    file = Path(__file__).parents[1] / "pyproject.toml"
    return dict(tomllib.loads(file.read_text("utf-8"))["project"])
