"""Prepare to render recorded results again: settings, table and a check of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batch_infer.autotune import Probe
from batch_infer.errors import SettingsError
from batch_infer.jobs.description import describe_safety, format_identity
from batch_infer.jobs.job import use_current_endpoint
from batch_infer.jobs.run_json import read_settings
from batch_infer.manifest import SCHEMA
from batch_infer.models import read_card
from batch_infer.settings import LORA_FIELD, OutputSettings, ProvenanceSettings, RowDefaults, RunSettings, TableSettings
from batch_infer.store import temporary_file_errors

CELLS = ("prompt", "negative_prompt", "seed", "height", "width", "num_inference_steps", "guidance_scale",
          "guidance_rescale")  # fmt: skip
"""The result columns with the cells of a row."""


def make_sample_settings(record: Mapping[str, Any], out: str, folder: Path) -> RunSettings:
    """Return the settings of the run, changed to render a table in a folder. Raises UsageError."""
    settings = use_current_endpoint(read_settings(record, out))
    model = replace(settings.model, device="cpu", dtype=record["identity"]["dtype"])
    if record.get("compute", {}).get("device") != "cpu":
        model = replace(model, device="auto")  # this machine may have none of its kind
    processes = settings.compute.processes if settings.compute.engine == "local" else None
    return replace(
        settings,
        out=str(folder / "out"),
        table=TableSettings((str(folder / "sample.parquet"),), folder=folder),
        model=model,
        defaults=RowDefaults(height=settings.defaults.height, width=settings.defaults.width),  # all cells are recorded
        output=OutputSettings(settings.output.image_format, provenance=_without_signature(settings.output.provenance)),
        compute=replace(settings.compute, slots=None, threads=None, compiled=None, processes=processes, engine="local"),
    )


def _without_signature(provenance: ProvenanceSettings) -> ProvenanceSettings:
    """Return the settings without the mark that needs a key. A signature changes no pixels."""
    return replace(provenance, marks=tuple(mark for mark in provenance.marks if mark != "c2pa"))


def refuse_other_model(out: str, record: Mapping[str, Any], settings: RunSettings) -> None:
    """Raise SettingsError if the model, scheduler or checker is not that of the run. Raises ModelError."""
    needs_checker = settings.safety.uses_checker(has_checker=True)
    if settings.compute.processes == 0:
        card = read_card(settings.model, needs_checker=needs_checker)
    else:
        with Probe() as probe:
            card = read_card(settings.model, probe.inspect_pipeline, needs_checker=needs_checker)
    identity = {
        "model": card.fingerprint,
        "scheduler": card.scheduler_fingerprint,
        "safety": describe_safety(settings.safety, card),
    }
    current = {
        "model": {"name": card.name, "quantize": card.quantize},
        "scheduler": {"name": card.scheduler_name},
        "identity": identity,
    }
    for name, value in identity.items():
        if record["identity"].get(name) != value:
            raise SettingsError(
                f"{out} was made with {name} {format_identity(record, name)}, but its settings now give {name} "
                f"{format_identity(current, name)}: restore the files of that model to render a sample again"
            )


def write_sample_table(rows: Sequence[Mapping[str, Any]], lora_column: str | None, settings: RunSettings) -> None:
    """Write a table that renders each result as a row with one image. Raises StorageError."""
    names = [*CELLS, *([LORA_FIELD] if lora_column is not None else [])]
    cells = {name: [_to_cell(row[lora_column or name] if name == LORA_FIELD else row[name]) for row in rows]
             for name in names}  # fmt: skip
    types = {name: SCHEMA.field(name).type for name in CELLS} | {
        "guidance_scale": pa.float64(),
        "guidance_rescale": pa.float64(),
        LORA_FIELD: pa.string(),
    }
    columns = {name: pa.array(values, types[name]) for name, values in cells.items()}
    with temporary_file_errors():
        pq.write_table(
            pa.table({"id": list(map(make_sample_id, range(len(rows)))), **columns}), settings.table.tables[0]
        )


def make_sample_id(number: int) -> str:
    return f"sample-{number:08}"


def _to_cell(value: Any) -> Any:
    """Convert a float32 to the shortest decimal that rounds to it.

    A number in the table with at most six significant digits is restored exactly.
    """
    return float(str(np.float32(value))) if isinstance(value, float) else value
