"""What the driver and its workers say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Duty:
    """The script that a worker runs, and how it writes rows; None where they are not kept."""

    script: str
    to_csv: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """Files that are handed to the script together, as absolute paths."""

    index: int
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """The script's init() has returned."""


@dataclass(frozen=True, slots=True)
class Began:
    """The script's run() is called."""


@dataclass(frozen=True, slots=True)
class Returned:
    """run() has returned so many rows: as text, and above it the head that a file of them begins with."""

    rows: int
    head: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """init() or run() has raised, or returned what is no result: the traceback."""

    trace: str


FromWorker: TypeAlias = "Ready | Began | Returned | Failed"
ToWorker: TypeAlias = "Duty | MiniBatch | None"
