"""What run.json says of a run: with what it computes, and by what a later run is known to be the same."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from batch_infer import __version__
from batch_infer.errors import SettingsError
from batch_infer.models import ModelCard
from batch_infer.records import now
from batch_infer.settings import RunSettings

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "pyarrow", "pillow", "numpy")
SLOTS = {"cpu": 16, "cuda": 32}


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and how a run computes. Bytes depend on all of it."""

    device: str
    dtype: str
    slots: int
    decode_batch: int
    threads: int


def choose_compute(settings: RunSettings, earlier: dict[str, Any] | None) -> Compute:
    """The settings that were given, else those of the run that this one goes on with, else the device's own."""
    from batch_infer.engines import local

    device = local.find_device(settings.model.device)
    kept = (earlier or {}).get("compute", {})
    slots = settings.compute.slots or kept.get("slots") or SLOTS[device]
    dtype = settings.model.dtype
    return Compute(
        device=device,
        dtype=("float16" if device == "cuda" else "float32") if dtype == "auto" else dtype,
        slots=slots,
        decode_batch=max(1, min(8, slots // 2)),
        threads=settings.compute.threads or kept.get("threads") or os.cpu_count() or 1,
    )


def refuse_other(earlier: Mapping[str, Any], record: Mapping[str, Any], out: Path) -> None:
    """A run goes on only as the one that it goes on with. Raises SettingsError."""
    before = earlier.get("identity", {})
    for name, value in record["identity"].items():
        if before.get(name) != value:
            raise SettingsError(
                f"{out} was made with {name} {before.get(name)}, and this run has {name} {value}: "
                "give another --out, or start anew with --overwrite"
            )


def describe(settings: RunSettings, card: ModelCard, compute: Compute, tables: list[str]) -> dict[str, Any]:
    """run.json as it is before the run is over. `identity` is what rows that are done stand on."""
    judged = settings.safety.mode != "none" and card.has_checker
    safety = f"{(card.checker_fingerprint or '')[:12]}, on flagged {settings.safety.on_flagged}" if judged else "none"
    return {
        "batch_infer": __version__,
        "started_at": now(),
        "finished_at": None,
        "tables": tables,
        "settings": asdict(settings),
        "model": {
            "name": card.name,
            "path": card.path,
            "revision": card.revision,
            "family": card.family,
            "fingerprint": card.fingerprint,
        },
        "identity": {
            "model": f"{card.name} ({card.fingerprint[:12]})",
            "scheduler": f"{card.scheduler_name} ({card.scheduler_fingerprint[:12]})",
            "dtype": compute.dtype,
            "safety": safety,
        },
        "compute": asdict(compute),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "summary": None,
    }
