"""Write a script that makes an image of a run again with plain diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from batch_infer.carried import shorten_float32
from batch_infer.errors import RowError, UsageError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.description import find_environment
from batch_infer.jobs.run_json import find_lora_column, parse_record, read_settings
from batch_infer.manifest import SCHEMA, Manifest, run_number
from batch_infer.models import LoraFolder, PlainImage, write_script
from batch_infer.records import SamplingParams
from batch_infer.settings import LoraSpec, ModelSettings
from batch_infer.store import Out, Store, open_store, to_absolute

COLUMNS = (
    *(
        "id",
        "image_index",
        "prompt",
        "generated_image",
        "status",
        "error",
        "negative_prompt",
        "seed",
        "height",
        "width",
    ),
    *("num_inference_steps", "guidance_scale", "guidance_rescale"),
)


def make_recipe(out: Out, name: str, image_index: int = 0) -> str:
    """Return a script that makes the image of a result again with plain diffusers.

    Its pixel values differ from those of the run by at most 1 of 255 in float32, on the same kind of device. Raises
    StorageError, and UsageError, for example if OUT has no such image or plain diffusers cannot make it.
    """
    store = open_store(to_absolute(out))
    record = outdir.read_existing_run(store)
    row, run = _find_row(store, record, name, image_index)
    if row["status"] not in ("ok", "flagged"):
        raise UsageError(f"{_describe(row)} has no image: it is {row['status']} ({row['error']})")
    settings = read_settings(record, store.location)
    known, compute = record.get("model") or {}, find_environment(record, run)["compute"]
    image = PlainImage(
        model=_locate_model(settings.model, known),
        family=known["family"],
        device=compute["device"],
        dtype=record["identity"]["dtype"],
        loras=(*settings.model.loras, *_find_row_lora(record, settings.model, row)),
        prompt=row["prompt"],
        negative_prompt=row["negative_prompt"],
        seed=row["seed"],
        params=_read_params(row),
        file=f"{Path(row['generated_image'] or f'image-{image_index}').stem}.png",
    )
    return f"{_comment(store, record, row)}{write_script(image)}"


def _find_row(store: Store, record: Mapping[str, Any], name: str, image_index: int) -> tuple[dict[str, Any], int]:
    """Return the columns of a result and the number of the run that committed it. Raises UsageError."""
    lora_column = find_lora_column(record)
    fields = [SCHEMA.field(column) for column in COLUMNS]
    schema = pa.schema([*fields, *([pa.field(lora_column, pa.string())] if lora_column is not None else [])])
    with Manifest(store).index() as index:
        image = index.find((name, image_index))
        if image is None:
            raise UsageError(f"{store.location} has no result with the id {name!r} and image index {image_index}")
        run = run_number(index.parts[image.part]) or parse_record(record).run_number or 0
        return index.read_results([image], schema).to_pylist()[0], run


def _locate_model(model: ModelSettings, known: Mapping[str, Any]) -> ModelSettings:
    """Name the exact checkpoint: the commit of one on the Hub, or the folder of a local one."""
    if known.get("revision"):
        return replace(model, revision=known["revision"])
    return model if model.name is None else replace(model, name=known.get("path") or model.name)


def _find_row_lora(record: Mapping[str, Any], model: ModelSettings, row: Mapping[str, Any]) -> list[LoraSpec]:
    column = find_lora_column(record)
    if column is None or model.lora_folder is None or not (text := (row[column] or "").strip()):
        return []
    try:
        lora = LoraFolder(model.lora_folder).find(text)
    except RowError as error:
        raise UsageError(str(error)) from error
    return [LoraSpec(str(lora.path), lora.weight)]


def _read_params(row: Mapping[str, Any]) -> SamplingParams:
    guidance, rescale = shorten_float32(row["guidance_scale"]), shorten_float32(row["guidance_rescale"])
    return SamplingParams(row["height"], row["width"], row["num_inference_steps"], guidance or 0.0, rescale or 0.0)


def _describe(row: Mapping[str, Any]) -> str:
    return f"image {row['image_index']} of {row['id']!r}"


def _comment(store: Store, record: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    versions = record.get("versions", {})
    libraries = " and ".join(f"{name} {versions[name]}" for name in ("diffusers", "torch") if name in versions)
    lines = [f"{_describe(row)} of {store.location!r}, rendered with {libraries or 'unknown versions'}"]
    if "watermark" in record["identity"]:
        lines.append("The stored image also has an invisible watermark, which changes its pixels.")
    return "".join(f"# {line}\n" for line in lines)
