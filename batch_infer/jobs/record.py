"""What run.json says of a run: with what it computes, and by what a later run is known to be the same."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batch_infer import __version__
from batch_infer.errors import SettingsError
from batch_infer.models import ModelCard
from batch_infer.records import utc_now
from batch_infer.settings import CATEGORIES, BatchShape, Compute, Device, RunSettings, SafetySettings
from batch_infer.table import Tables, redact_url

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "pyarrow", "pillow", "numpy")
SLOTS = {"cpu": 16, "cuda": 32}
DECODE_BATCH = 8


def choose_compute(settings: RunSettings, earlier: Mapping[str, Any] | None, device: Device) -> Compute:
    """The settings that were given, else those of the run that this one goes on with, else the device's own.

    decode_batch follows from a run's first slots, and stays with the run. So do batch sizes of single image sizes,
    which were measured, or halved where memory did not hold them, until another number of slots is asked for.
    """
    kept = (earlier or {}).get("compute", {})
    asked = settings.compute.slots if isinstance(settings.compute.slots, int) else None
    slots = asked or kept.get("slots") or SLOTS[device.kind]
    shapes = kept.get("by_size", ()) if asked in (None, kept.get("slots")) else ()
    dtype, compiled = settings.model.dtype, settings.compute.compiled
    threads = max(1, cores() // max(1, processes_of(settings, device)))
    if compiled is None:
        compiled = kept.get("compiled", device.kind == "cuda" and _has_compiler())
    return Compute(
        device=device.kind,
        dtype=("float16" if device.kind == "cuda" else "float32") if dtype == "auto" else dtype,
        slots=slots,
        decode_batch=kept.get("decode_batch") or max(1, min(DECODE_BATCH, slots // 2)),
        threads=settings.compute.threads or kept.get("threads") or threads,
        device_name=device.name,
        compiled=compiled,
        by_size=tuple(BatchShape(**shape) for shape in shapes),
    )


def processes_of(settings: RunSettings, device: Device) -> int:
    """How many workers render, 0 where the command does so itself: as many as were asked for, else one a device."""
    return device.count if settings.compute.processes is None else settings.compute.processes


def at_once(processes: int, compute: Compute) -> int:
    """How many of them compute at a time: on a CPU as many as have cores of their own."""
    return max(1, min(processes, cores() // compute.threads) if compute.device == "cpu" else processes)


def _has_compiler() -> bool:
    """Whether torch.compile has what it works with on a GPU: Triton, and a C compiler for Triton."""
    compilers = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    return find_spec("triton") is not None and any(map(shutil.which, compilers))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def policy_of(safety: SafetySettings, card: ModelCard) -> str:
    """Who judges, and by what: all that a verdict depends on beside the image."""
    judges = [f"checker {card.checker_fingerprint}"] if safety.uses_checker(has_checker=card.has_checker) else []
    if (service := safety.service) is not None:
        levels = ", ".join(f"{name} {level}" for name, level in zip(CATEGORIES, service.thresholds, strict=True))
        lists = "".join(f", blocklist {name}" for name in sorted(service.blocklists))
        judges.append(f"azure above {levels}{lists}")
    return f"{' and '.join(judges)}, on flagged {safety.policy}" if judges else "none"


def check_identity(earlier: Mapping[str, Any], record: Mapping[str, Any], out: Path) -> None:
    """A run goes on only as the one that it goes on with. Raises SettingsError."""
    for name, value in record["identity"].items():
        if earlier.get("identity", {}).get(name) != value:
            way_out = "judge its images again with `batch-infer rescore`, " if name == "safety" else ""
            raise SettingsError(
                f"{out} was made with {name} {_told(earlier, name)}, and this run has {name} {_told(record, name)}: "
                f"{way_out}give another --out, or start anew with --overwrite"
            )


def _told(record: Mapping[str, Any], name: str) -> str:
    """A part of the identity for a reader: its name, where it has one, and the start of its fingerprint."""
    value = str(record.get("identity", {}).get(name))
    called = record.get(name, {}).get("name") if isinstance(record.get(name), Mapping) else None
    return f"{called} ({value[:12]})" if called else value


def describe_run(settings: RunSettings, card: ModelCard, compute: Compute, tables: Tables | None) -> dict[str, Any]:
    """run.json as it is before the run is over. `identity` is what rows that are done stand on.

    Without `tables` it is that of a door to which they come one after the other.
    """
    arguments = settings.table.tables
    table = replace(settings.table, tables=tuple(map(redact_url, arguments)))
    return {
        "batch_infer": __version__,
        "started_at": utc_now(),
        "finished_at": None,
        "tables": tables.files if tables else [],
        "unreadable_tables": sorted(tables.unreadable_files) if tables else [],
        # --rerender-changed is a permission that one command has, and retry always.
        "settings": asdict(replace(settings, table=table, rerender_changed=False)),
        "unrepeatable_tables": [
            redact_url(argument) for argument in arguments if argument == "-" or redact_url(argument) != argument
        ],
        "model": {
            "name": card.name,
            "path": card.path,
            "revision": card.revision,
            "family": card.family,
            "fingerprint": card.fingerprint,
            "loras": [
                {"path": lora.path, "weight": lora.weight, "fingerprint": lora.fingerprint} for lora in card.loras
            ],
        },
        "scheduler": {"name": card.scheduler_name, "fingerprint": card.scheduler_fingerprint},
        "identity": {
            "model": card.fingerprint,
            "scheduler": card.scheduler_fingerprint,
            "dtype": compute.dtype,
            "safety": policy_of(settings.safety, card),
        },
        "compute": asdict(compute),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "survey": None,
        "summary": None,
    }
