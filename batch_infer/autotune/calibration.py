"""What rendering takes on this machine, measured once and remembered."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from platformdirs import user_cache_path

from batch_infer.errors import StorageError
from batch_infer.records import digest
from batch_infer.store import atomic_write

log = logging.getLogger("batch_infer")


@dataclass(frozen=True, slots=True)
class Rates:
    """What one image size takes, in seconds but for `image_bytes`.

    `start`: until the model is loaded; `tick`: one UNet call over all slots; `image`: all else that an image takes of
    the device's time, or keeps the processor from it.
    """

    start: float
    tick: float
    image: float
    image_bytes: float
    measured_at: datetime


@dataclass(frozen=True, slots=True)
class Plateau:
    """The batch sizes beyond which an image size gains no speed: row-forwards in a UNet call, images in a decoder's."""

    slots: int
    decode_batch: int
    measured_at: datetime


Measured = TypeVar("Measured", Rates, Plateau)


def load_calibration(kind: type[Measured], conditions: Mapping[str, Any]) -> Measured | None:
    """What was measured under these conditions, on whatever day."""
    found = recall_facts(kind.__name__.lower(), conditions)
    if found is None:
        return None
    try:
        return kind(**{**found, "measured_at": datetime.fromisoformat(found["measured_at"])})
    except (ValueError, KeyError, TypeError) as error:
        log.debug("a remembered calibration is measured anew: %s", error)
        return None


def save_calibration(conditions: Mapping[str, Any], measured: Rates | Plateau) -> None:
    """Keep it for later; where the cache cannot be written, it is measured again next time."""
    remember_facts(type(measured).__name__.lower(), conditions, asdict(measured))


def recall_facts(name: str, conditions: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the JSON object that was kept under this name and these conditions, or None."""
    try:
        return dict(json.loads(_path(name, conditions).read_text("utf-8"))["measured"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:  # damaged, or another version's
        log.debug("a remembered calibration is measured anew: %s", error)
        return None


def remember_facts(name: str, conditions: Mapping[str, Any], facts: Mapping[Any, Any]) -> None:
    """Keep a JSON object; where the cache cannot be written, it is found out again next time."""
    try:
        with atomic_write(_path(name, conditions), flush=False) as temporary:
            text = json.dumps({"conditions": conditions, "measured": facts}, default=str, indent=2)
            temporary.write_text(text, encoding="utf-8")
    except StorageError as error:
        log.debug("%s", error)


def _path(name: str, conditions: Mapping[str, Any]) -> Path:
    return user_cache_path("batch-infer") / "calibration" / f"{name}-{digest(conditions)}.json"
