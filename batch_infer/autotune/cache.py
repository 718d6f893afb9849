"""Cache measurements of this machine between commands, as JSON files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
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
    """Costs of rendering images of one size. Times are in seconds.

    `start` is the time until the model is loaded, `tick` the time of one denoiser call over all slots, and `image` the
    remaining rendering time per image. On a CPU, a measured `image` includes the encoding of the image file, which
    shares the cores. `image_bytes` is the mean size of an image file.
    """

    start: float
    tick: float
    image: float
    image_bytes: float
    measured_at: datetime


@dataclass(frozen=True, slots=True)
class Plateau:
    """Batch sizes for one image size: batch elements per denoiser call, and images per decode.

    They are at the throughput plateau, or smaller if a run with the sizes at the plateau ran out of memory.
    """

    slots: int
    decode_batch: int
    measured_at: datetime


Value = TypeVar("Value")


def load_calibration(value_type: type[Value], conditions: Mapping[str, Any], name: str | None = None) -> Value | None:
    """Return the value saved under these conditions and `name`, or None. The default name is that of the type."""
    name = name or value_type.__name__.lower()
    try:
        measured = json.loads(_cache_path(name, conditions).read_text("utf-8"))["measured"]
        return msgspec.convert(measured, value_type, str_keys=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:  # unreadable, damaged or from another version
        log.debug("cannot read the cached %s, so it is measured again: %s", name, error)
        return None


def save_calibration(conditions: Mapping[str, Any], value: object, name: str | None = None) -> None:
    """Save a value for later commands. Ignores storage errors."""
    content = {"conditions": conditions, "measured": msgspec.to_builtins(value, str_keys=True)}
    try:
        with atomic_write(_cache_path(name or type(value).__name__.lower(), conditions), flush=False) as temporary:
            temporary.write_text(json.dumps(content, default=str, indent=2), encoding="utf-8")
    except StorageError as error:
        log.debug("%s", error)


def _cache_path(name: str, conditions: Mapping[str, Any]) -> Path:
    return user_cache_path("batch-infer") / "calibration" / f"{name}-{digest(conditions)}.json"
