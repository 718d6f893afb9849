"""Types of option values: duration, number of slots, metrics file, and lists that environment variables hold."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click

UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_NUMBER = r"\d+(?:\.\d+)?"
_PARTS = re.compile("".join(rf"(?:(?P<{unit}>{_NUMBER})\s*{unit}\s*)?" for unit in UNITS), re.ASCII)


class DurationType(click.ParamType):  # type: ignore[type-arg]  # generic in click 8.5, but not in 8.1
    """A duration such as `1h30m`, or a number of seconds. Converted to seconds."""

    # Parsed here: the libraries for it are unmaintained, or accept neither days nor bare seconds.
    name = "DURATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        if re.fullmatch(_NUMBER, text, re.ASCII):
            seconds = float(text)
        else:
            match = _PARTS.fullmatch(text)
            counts = match.groupdict() if match else {}
            seconds = sum(float(count) * UNITS[unit] for unit, count in counts.items() if count)
        if not 0 < seconds < math.inf:
            self.fail(
                f"{value!r} is not a duration (examples: 90s, 30m, 2h, 1h30m, 1d, or a number of seconds)", param, ctx
            )
        return seconds


class SemicolonList(click.ParamType):  # type: ignore[type-arg]
    """Text. An environment variable separates several with semicolons, because names and paths may contain spaces."""

    name = "TEXT"
    envvar_list_splitter = ";"


class SlotsType(click.ParamType):  # type: ignore[type-arg]
    """A number of at least 2, or `auto`."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto":
            return value
        try:
            return click.IntRange(min=2).convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is neither a number of at least 2 nor auto", param, ctx)


class MetricsPath(click.Path):
    """A file, which need not exist, in an existing folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value).expanduser()
        if not path.parent.is_dir():
            self.fail(f"{path}: there is no folder {path.parent}", param, ctx)
        return Path(str(super().convert(str(path), param, ctx)))
