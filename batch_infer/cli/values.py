"""The kinds of values that options take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class Column(click.ParamType):  # type: ignore[type-arg]  # generic in click 8.5, not so in 8.1
    """FIELD=NAME; in the environment, semicolons separate several, since names may hold blanks."""

    name = "FIELD=NAME"
    envvar_list_splitter = ";"


class Lora(click.ParamType):  # type: ignore[type-arg]
    """FILE[:WEIGHT]; in the environment, semicolons separate several, since paths may hold blanks and colons."""

    name = "FILE[:WEIGHT]"
    envvar_list_splitter = ";"


class Slots(click.ParamType):  # type: ignore[type-arg]
    """A number of at least 2, or `auto`."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto":
            return value
        try:
            return click.IntRange(min=2).convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is neither a number of at least 2 nor auto", param, ctx)


class MetricsFile(click.Path):
    """A file that may be made, in a folder that is there."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value).expanduser()
        if not path.parent.is_dir():
            self.fail(f"{path}: there is no folder {path.parent}", param, ctx)
        return Path(str(super().convert(str(path), param, ctx)))
