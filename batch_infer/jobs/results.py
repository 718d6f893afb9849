"""Write results.parquet, results.csv and results.jsonl, and have `openai_results` write its two files."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_infer.carried import format_value, shorten_float32, to_json, to_python_values
from batch_infer.jobs.image_folder import ImageFolderWriter, may_replace_metadata
from batch_infer.jobs.openai_results import BatchFiles
from batch_infer.settings import METADATA, RESULTS_FILES, OutputSettings, ResultsFormat
from batch_infer.sinks import Sink, make_sink
from batch_infer.store import Store, hash_file

log = logging.getLogger("batch_infer")


def write_results(
    tables: Iterable[pa.Table],
    schema: pa.Schema,
    store: Store,
    output: OutputSettings,
    partial_rows: Collection[str] = (),
) -> dict[str, str]:
    """Write tables of this schema to results.parquet and the requested formats. Raises StorageError.

    Return the SHA-256 of each file by its name, computed before the file is published. `partial_rows` contains the ids
    of rows that lack results; reading `tables` may add ids.
    """
    images = make_sink(store) if output.base64 else None
    digests: dict[str, str] = {}
    with ExitStack() as stack:
        paths = {}
        for name in output.results_files:
            if name == METADATA and not may_replace_metadata(store):
                continue
            paths[name] = stack.enter_context(store.write(name))
            stack.push(_make_hasher(digests, name, paths[name]))  # runs once the writers are closed
        writers = [
            _open_writer(stack, [paths[file] for file in RESULTS_FILES[name]], name, schema, images, partial_rows)
            for name in dict.fromkeys(("parquet", *output.results))
        ]
        if METADATA in paths:
            writers.append(stack.enter_context(ImageFolderWriter(paths[METADATA], schema)).write)
        for table in tables:
            for write in writers:
                write(table)
    return digests


def _make_hasher(digests: dict[str, str], name: str, path: Path) -> Callable[..., None]:
    """Return a function that stores a file's SHA-256 in `digests` when a context ends without an exception."""

    def add_digest(error_class: type[BaseException] | None, *_: object) -> None:
        if error_class is None:
            digests[name] = hash_file(path)

    return add_digest


def remove_other_results(store: Store, names: Iterable[str], output: OutputSettings) -> None:
    """Remove those of these results files whose formats are no longer requested, and say so."""
    if removed := sorted(set(names) - set(output.results_files)):
        store.remove(removed)
        log.warning(
            "removed %s from %s: this run writes other formats (see --results)", " and ".join(removed), store.location
        )


def _open_writer(
    stack: ExitStack,
    paths: Sequence[Path],
    name: ResultsFormat,
    schema: pa.Schema,
    images: Sink | None,
    partial_rows: Collection[str],
) -> Callable[[pa.Table], object]:
    """Return a function that appends a table to the files of format `name`.

    With `images`, text formats contain images in base64.
    """
    if name == "parquet":
        parquet = stack.enter_context(pq.ParquetWriter(paths[0], schema, compression="zstd"))
        return lambda table: parquet.write_table(table)
    streams = [stack.enter_context(path.open("w", encoding="utf-8", newline="")) for path in paths]
    stream = streams[0]
    if name == "openai":
        files = stack.enter_context(BatchFiles(*streams, partial_rows=partial_rows, embeds_images=images is not None))
        return lambda table: files.write(_iterate_rows(table, images))
    if name == "jsonl":
        return lambda table: stream.writelines(f"{to_json(row)}\n" for row in _iterate_rows(table, images))
    writer = csv.writer(stream)
    writer.writerow(schema.names)
    return lambda table: writer.writerows(map(_format_csv_cell, row.values()) for row in _iterate_rows(table, images))


def _iterate_rows(table: pa.Table, images: Sink | None) -> Iterator[dict[str, Any]]:
    """Yield rows as dictionaries. With `images`, generated_image contains bytes, or None if the image is missing."""
    for cells in zip(*map(to_python_values, table.columns), strict=True):
        row = dict(zip(table.column_names, cells, strict=True))
        if images is not None and row["generated_image"] is not None:
            path, row["generated_image"] = row["generated_image"], images.read(row["generated_image"])
            if row["generated_image"] is None:
                log.warning("%s is missing or not an image of this run, so it is omitted", path)
        for name in ("guidance_scale", "guidance_rescale", "seconds"):
            row[name] = shorten_float32(row[name])
        if (scores := row["safety_scores"]) is not None:
            row["safety_scores"] = {score["category"]: shorten_float32(score["score"]) for score in scores}
        yield row


def _format_csv_cell(value: Any) -> Any:
    match value:
        case bool():
            return "true" if value else "false"
        case Mapping() | list():
            return to_json(value)
        case datetime() | bytes():
            return format_value(value)
        case _:
            return value
