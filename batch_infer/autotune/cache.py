"""Measurements and facts about this machine, kept as JSON files in the user's cache between commands."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from platformdirs import user_cache_path

from batch_infer.errors import StorageError
from batch_infer.records import digest
from batch_infer.store import atomic_write

log = logging.getLogger("batch_infer")


@dataclass(frozen=True, slots=True)
class Rates:
    """Cost of one image size, in seconds except `image_bytes`.

    `start`: until the model is loaded. `tick`: one UNet call over all slots. `image`: everything else that an image
    takes of the device's time, or of the CPU's if that is the device.
    """

    start: float
    tick: float
    image: float
    image_bytes: float
    measured_at: datetime


@dataclass(frozen=True, slots=True)
class Plateau:
    """Batch sizes at the throughput plateau of one image size: batch elements of a UNet call, images of a decode."""

    slots: int
    decode_batch: int
    measured_at: datetime


Calibration = TypeVar("Calibration", Rates, Plateau)
Facts = TypeVar("Facts")


def load_calibration(kind: type[Calibration], conditions: Mapping[str, Any]) -> Calibration | None:
    """Return what was measured under these conditions, or None."""
    return load_facts(kind.__name__.lower(), conditions, kind)


def save_calibration(conditions: Mapping[str, Any], calibration: Rates | Plateau) -> None:
    """Keep a calibration for later commands. A cache that cannot be written is no error."""
    save_facts(type(calibration).__name__.lower(), conditions, asdict(calibration))


def load_facts(name: str, conditions: Mapping[str, Any], kind: type[Facts]) -> Facts | None:
    """Return the facts saved under this name and these conditions, or None."""
    try:
        entry = json.loads(_path(name, conditions).read_text("utf-8"))["measured"]
        return msgspec.convert(entry, kind, str_keys=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:  # damaged, or of another version
        log.debug("the cached %s cannot be read and is measured again: %s", name, error)
        return None


def save_facts(name: str, conditions: Mapping[str, Any], facts: Mapping[Any, Any]) -> None:
    """Keep facts for later commands. A cache that cannot be written is no error."""
    try:
        with atomic_write(_path(name, conditions), flush=False) as temporary:
            text = json.dumps({"conditions": conditions, "measured": facts}, default=str, indent=2)
            temporary.write_text(text, encoding="utf-8")
    except StorageError as error:
        log.debug("%s", error)


def _path(name: str, conditions: Mapping[str, Any]) -> Path:
    return user_cache_path("batch-infer") / "calibration" / f"{name}-{digest(conditions)}.json"
