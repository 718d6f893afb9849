"""Compare the settings that two run.json record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from batch_infer.jobs.description import ENVIRONMENT, format_identity
from batch_infer.jobs.scan import OPTIONS

_IGNORED = frozenset(
    f"settings.{name}" for name in ("out", "overwrite", "rerender_changed", "table.tables", "table.folder")
)
"""Settings that name places, or apply to one command only."""
_WHOLE = frozenset(
    f"settings.{name}" for name in ("max_failed", "model.scheduler", "table.columns", "safety.service.thresholds")
)
"""Settings that are shown as one value."""
_OPTION_NAMES = {
    **{f"settings.defaults.{name}": option for name, option in OPTIONS.items()},
    "settings.model.name": "--model",
    "settings.model.revision": "--revision",
    "settings.model.variant": "--variant",
    "settings.model.dtype": "--dtype",
    "settings.model.device": "--device",
    "settings.model.scheduler": "--scheduler",
    "settings.model.loras": "--lora",
    "settings.model.lora_folder": "--lora-folder",
    "settings.model.embeddings": "--embedding",
    "settings.model.long_prompts": "--long-prompts",
    "settings.model.quantize": "--quantize",
    "settings.table.columns": "--column",
    "settings.table.limit": "--limit",
    "settings.table.id_from": "--id-from",
    "settings.safety.mode": "--safety",
    "settings.safety.on_flagged": "--on-flagged",
    "settings.safety.required": "--require-safety",
    "settings.output.image_format": "--image-format",
    "settings.output.provenance.marks": "--provenance",
    "settings.output.provenance.prompt_metadata": "--prompt-metadata",
    "settings.output.results": "--results",
    "settings.output.base64": "--base64",
    "settings.compute.slots": "--slots",
    "settings.compute.threads": "--threads",
    "settings.compute.compiled": "--compile",
    "settings.compute.processes": "--num-processes",
    "settings.compute.engine": "--engine",
    "settings.compute.offload": "--offload",
    "settings.max_failed": "--max-failed",
    "settings.price_per_hour": "--price-per-hour",
}
"""The option for each setting. Other settings keep their names in run.json, with dots."""


def compare_records(record: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings, identity, compute settings and versions that differ, by option or name, with both values.

    Paths of OUT and of tables, and times, are ignored. A value that one record lacks is None.
    """
    first, second = dict(_flatten(record)), dict(_flatten(other))
    names = [name for name in dict.fromkeys((*first, *second)) if first.get(name) != second.get(name)]
    differences = {
        _OPTION_NAMES.get(name, name.removeprefix("settings.")): (first.get(name), second.get(name)) for name in names
    }
    return {**differences, **_compare_identities(record, other)}


def _compare_identities(record: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare fingerprints, since two runs may give one model different names."""
    first, second = record.get("identity") or {}, other.get("identity") or {}
    return {
        f"identity.{name}": (format_identity(record, name), format_identity(other, name))
        for name in dict.fromkeys((*first, *second))
        if first.get(name) != second.get(name)
    }


def compare_environments(record: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the differences of the compute settings and versions on which the bytes of an image may depend."""
    ignored = {"compute.offload", "versions.python", "versions.pyarrow"}
    first, second = ({name: source.get(name) for name in ENVIRONMENT} for source in (record, other))
    differences = compare_records(first, second)
    return {name: values for name, values in differences.items() if name not in ignored}


def _flatten(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values to compare, under their names in run.json."""
    yield from _flatten_value("settings", record.get("settings") or {})
    compute = {name: value for name, value in (record.get("compute") or {}).items() if name != "dtype"}
    yield from _flatten_value("compute", compute)
    yield "versions.batch_infer", record.get("batch_infer")
    yield from _flatten_value("versions", record.get("versions") or {})


def _flatten_value(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if name in _IGNORED:
        return
    if isinstance(value, Mapping) and name not in _WHOLE:
        for key, item in value.items():
            yield from _flatten_value(f"{name}.{key}", item)
    else:
        yield name, value
