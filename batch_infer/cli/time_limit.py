"""DURATION: a duration on the command line, as `--time-limit` takes it."""

from __future__ import annotations

import math
import re
from typing import Any

import click

UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_NUMBER = r"\d+(?:\.\d+)?"
_PARTS = re.compile("".join(rf"(?:(?P<{unit}>{_NUMBER})\s*{unit}\s*)?" for unit in UNITS), re.ASCII)


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic in click 8.5, not so in 8.1
    """A time as its parts, the largest first, or as a number of seconds; comes as seconds."""

    # Parsed here: the libraries that do it are no longer kept, or know no days and no bare seconds.
    name = "DURATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        if re.fullmatch(_NUMBER, text, re.ASCII):
            seconds = float(text)
        else:
            parts = _PARTS.fullmatch(text)
            found = parts.groupdict() if parts else {}
            seconds = sum(float(count) * UNITS[unit] for unit, count in found.items() if count)
        if not 0 < seconds < math.inf:
            self.fail(
                f"{value!r} is not a duration (examples: 90s, 30m, 2h, 1h30m, 1d, or a number of seconds)", param, ctx
            )
        return seconds
