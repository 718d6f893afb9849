"""Defer imports from modules that are slow to load until the names are first used."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def import_on_use(package: str, **modules: tuple[str, ...]) -> Callable[[str], Any]:
    """Return a module-level `__getattr__` (PEP 562) that imports names from modules of a package.

    `modules` maps a module to the names to import from it. Type checkers need the same imports under `TYPE_CHECKING`.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{module_of[name]}"), name)

    return __getattr__
