"""Render tables of prompts into images and a results table that accounts for every row.

    summary = batch_infer.run("prompts.parquet", out="out", model="./sdxl", steps=30)
    frame = batch_infer.results("out")

The functions are loaded when they are first used, so that importing the package is fast. See docs/python.md.
"""

from typing import TYPE_CHECKING

from batch_infer import errors
from batch_infer.lazy import import_on_use

if TYPE_CHECKING:
    from batch_infer.api import (
        Gallery,
        Plan,
        RunStatus,
        Summary,
        Verification,
        gallery,
        plan,
        recipe,
        results,
        run,
        status,
        verify,
    )
else:
    __getattr__ = import_on_use(
        __name__,
        api=(
            *("Gallery", "Plan", "RunStatus", "Summary", "Verification"),
            *("gallery", "plan", "recipe", "results", "run", "status", "verify"),
        ),
    )

__all__ = [
    "Gallery",
    "Plan",
    "RunStatus",
    "Summary",
    "Verification",
    "errors",
    "gallery",
    "plan",
    "recipe",
    "results",
    "run",
    "status",
    "verify",
]
__version__ = "0.2.0.dev0"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
