"""Convert the values of options and arguments."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click

from batch_infer.store import is_url

PATH = click.Path(path_type=Path)
POSITIVE, NONNEGATIVE = click.IntRange(min=1), click.IntRange(min=0)
MAX_SLOTS = 4096
"""Far more slots than any device needs. Measuring the speed of a mistyped number would take hours."""
_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_NUMBER = r"\d+(?:\.\d+)?"
_DURATION = re.compile("".join(rf"(?:(?P<{unit}>{_NUMBER})\s*{unit}\s*)?" for unit in _SECONDS), re.ASCII)


def parse_duration(value: object) -> float:
    """Convert a duration such as `1h30m`, or a number of seconds, to seconds."""
    # No library is used: those for durations are unmaintained, or accept neither days nor a number without a unit.
    text = f"{value:.9f}" if isinstance(value, float) else str(value).strip()
    if re.fullmatch(_NUMBER, text, re.ASCII):
        text += "s"
    match = _DURATION.fullmatch(text)
    counts = match.groupdict() if match else {}
    seconds = sum(float(count) * _SECONDS[unit] for unit, count in counts.items() if count)
    if not 0 < seconds < math.inf:
        examples = "90s, 30m, 2h, 1h30m, 1d, or a number of seconds"
        raise click.BadParameter(f"{value!r} is not a duration (examples: {examples})")
    return seconds


def parse_out(value: str) -> str:
    """Return OUT, a path or a URL, in the form that messages show."""
    if not is_url(value):
        return str(Path(value).expanduser())
    stripped = value.rstrip("/")
    return stripped if is_url(stripped) else value  # s3:// without a bucket is refused later


def parse_slots(value: Any) -> Any:
    """Convert a number of slots to an integer, and return `auto` unchanged."""
    if value == "auto":
        return value
    try:
        return click.IntRange(2, MAX_SLOTS).convert(value, None, None)
    except click.BadParameter:
        raise click.BadParameter(f"{value!r} is neither a number from 2 to {MAX_SLOTS} nor auto") from None


class FiniteRange(click.FloatRange):
    """A number in a range. `click.FloatRange` also accepts NaN, and infinity if there is no upper limit."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


SHARE = FiniteRange(0, 1)


class SemicolonList(click.ParamType):  # type: ignore[type-arg]  # generic in click 8.5, but not in 8.1
    """A string. In an environment variable, semicolons separate several values, which may contain spaces."""

    name = "TEXT"
    envvar_list_splitter = ";"


class MetricsPath(click.Path):
    """A file in an existing folder. The file need not exist."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value).expanduser()
        if not path.parent.is_dir():
            self.fail(f"{path}: there is no folder {path.parent}", param, ctx)
        return super().convert(path, param, ctx)
