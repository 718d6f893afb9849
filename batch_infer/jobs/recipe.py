"""Write a script that reproduces an image of a run with plain diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import PureWindowsPath
from typing import Any

import pyarrow as pa
from msgspec import UNSET

from batch_infer.carried import shorten_float32
from batch_infer.errors import RowError, UsageError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.description import find_environment
from batch_infer.jobs.rescorer import IMAGE_NOT_KEPT
from batch_infer.jobs.run_json import find_lora_column, parse_record, read_settings, require
from batch_infer.manifest import SCHEMA, Manifest, run_number
from batch_infer.models import LoraFolder, PlainImage, write_script
from batch_infer.records import SamplingParams
from batch_infer.settings import LoraSpec, ModelSettings, OnFlagged
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
REPLACED: Mapping[OnFlagged, str] = {
    "blank": "stored a black placeholder instead",
    "blur": "stored a blurred one instead",
    "drop": "did not store it",
}
"""What a run did with a flagged image, by the policies that do not keep it."""
COMPRESSED = (".jpg", ".jpeg", ".webp")
"""Suffixes of image files with lossy compression."""


def make_recipe(out: Out, name: str, image_index: int = 0) -> str:
    """Return a script in ASCII that reproduces the image of a result with plain diffusers.

    In tests on a CPU in float32, its pixel values differed from those of the run by at most 1 of 255. On a GPU or with
    --compile, the difference can be larger. Raises StorageError, and UsageError, for example if OUT has no such image,
    plain diffusers cannot make it, or the files of the model are no longer those of the run.
    """
    store = open_store(to_absolute(out))
    record = outdir.read_existing_run(store)
    row, run = _find_row(store, record, name, image_index)
    if row["status"] not in ("ok", "flagged"):
        raise UsageError(f"{_describe(row)} has no image: it is {row['status']} ({row['error']})")
    settings = read_settings(record, store.location)
    image = PlainImage(
        model=_locate_model(settings.model, record, store.location),
        family=_look_up(record, store.location, "model", "family"),
        device=_look_up(_find_environment(record, run, store.location), store.location, "compute", "device"),
        dtype=_look_up(record, store.location, "identity", "dtype"),
        loras=(*settings.model.loras, *_find_row_lora(record, settings.model, row)),
        prompt=row["prompt"],
        negative_prompt=row["negative_prompt"],
        seed=row["seed"],
        params=_read_params(row),
        file=f"{PureWindowsPath((row['generated_image'] or f'image-{image_index}').rpartition('#')[2]).stem}.png",
        identity=record["identity"],
        digests=tuple(_read_digests(record, store.location)),
    )
    return write_script(image, tuple(_explain(store, record, row, settings.safety.policy)))


def _look_up(record: Mapping[str, Any], out: str, *keys: str) -> str:
    """Return a text in run.json. Raises UsageError if there is none."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return require(value if isinstance(value, str) else UNSET, ".".join(keys), out)


def _find_environment(record: Mapping[str, Any], run: int, out: str) -> Mapping[str, Any]:
    """Return the compute settings and versions of a run. Raises UsageError if run.json does not have them."""
    environments = record.get("environments") or []
    is_valid = isinstance(environments, list) and all(
        isinstance(environment, Mapping) and isinstance(environment.get("run_number", 0), int)
        for environment in environments
    )
    if not is_valid:
        raise UsageError(f"{out}/run.json is damaged or was edited: environments are not those of runs")
    return find_environment(record, run)


def _read_digests(record: Mapping[str, Any], out: str) -> Iterator[str]:
    """Yield the digests of LoRA and embedding files. Raises UsageError if run.json does not have them."""
    for key in ("loras", "embeddings"):
        files = record["model"].get(key) or []
        for file in files if isinstance(files, list) else [None]:
            yield _look_up({key: file}, out, key, "fingerprint")


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


def _locate_model(model: ModelSettings, record: Mapping[str, Any], out: str) -> ModelSettings:
    """Name the exact checkpoint: the commit of one on the Hub, or the folder of a local one. Raises UsageError."""
    known = record.get("model") or {}
    if known.get("revision"):
        return replace(model, revision=_look_up(record, out, "model", "revision"))
    if model.name is None or not known.get("path"):
        return model
    return replace(model, name=_look_up(record, out, "model", "path"))


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


def _explain(store: Store, record: Mapping[str, Any], row: Mapping[str, Any], policy: OnFlagged) -> Iterator[str]:
    """Yield comments that name the image, and say how the stored image differs from that of the script."""
    versions = record.get("versions")
    known = versions if isinstance(versions, Mapping) else {}
    libraries = " and ".join(f"{name} {known[name]}" for name in ("diffusers", "torch") if name in known)
    yield f"{_describe(row)} of {store.location!r}, rendered with {libraries or 'unknown versions'}"
    if row["status"] == "flagged" and IMAGE_NOT_KEPT in (row["error"] or ""):
        yield "The original image was not kept when it was flagged, before the last rescore."
    elif row["status"] == "flagged" and policy in REPLACED:
        yield f"The run flagged this image, and {REPLACED[policy]}."
    elif str(row["generated_image"]).lower().endswith(COMPRESSED):
        yield "The stored image is compressed, which changes its pixels."
    if "watermark" in record["identity"]:
        yield "The stored image also has an invisible watermark, which changes its pixels."
