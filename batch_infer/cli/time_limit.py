"""`--time-limit DURATION`: how long a command may take, from its start."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import click

from batch_infer.cli.logs import stop_log
from batch_infer.cli.report import duration, number

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
            self.fail(f"{value!r} is no length of time: say 90s, 30m, 2h, 1h30m, 1d or a number of seconds", param, ctx)
        return seconds


class TimeLimit:
    """Says whether a command's time is over; begins with it. `seconds` None: it has all the time."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._ends = time.monotonic() + (math.inf if seconds is None else seconds)
        self._came = False

    def __call__(self) -> bool:
        """Ask this only where nothing else has stopped the command: then it is the limit that did."""
        self._came = self._came or time.monotonic() >= self._ends
        return self._came

    def tell(self, left: int) -> None:
        """Say that the limit stopped the command, if it did and `left` images are not done."""
        if self._came and left and self._seconds is not None:
            stop_log.warning(
                "the time limit of %s came, and %s left: run the same command again to go on",
                duration(self._seconds),
                f"{number(left, 'image')} {'is' if left == 1 else 'are'}",
                extra={"left": left},
            )
