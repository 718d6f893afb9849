"""Write metadata.parquet, with which Hugging Face's `load_dataset("imagefolder", data_dir=OUT)` reads the results.

See https://huggingface.co/docs/datasets/image_dataset#imagefolder.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_infer.carried import rename_reserved, to_portable, to_portable_type
from batch_infer.settings import METADATA
from batch_infer.store import IMAGE_FOLDERS, Store
from batch_infer.terminal import quote_command

_MARK = {"batch-infer": "metadata"}
"""Schema metadata that distinguishes the file from another program's."""
_IMAGE_COLUMNS = ("image", "images")
"""Names of the columns that `datasets` adds."""
_FILE_COLUMNS = ("file_name", "file_names")
"""Ends of the names of columns that `datasets` takes for the paths of images."""

log = logging.getLogger("batch_infer")


class ImageFolderWriter:
    """Writes the results of images that are not flagged, with `file_name` instead of `generated_image`.

    Flagged images are left out, whatever --on-flagged says: a black or unsafe image must not become training data.
    Other columns keep their names, unless `datasets` would take them for images.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        reserved = {name: _rename(name) for name in schema.names} | {"generated_image": "file_name"}
        self._names = rename_reserved(schema.names, reserved)
        fields = [
            pa.field(name, to_portable_type(column.type)) for name, column in zip(self._names, schema, strict=True)
        ]
        self._file = pq.ParquetWriter(path, pa.schema(fields, metadata=_MARK), compression="zstd")

    def __enter__(self) -> ImageFolderWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, table: pa.Table) -> None:
        """Write the results in a table that have an image file."""
        is_file = pc.starts_with(pc.fill_null(table["generated_image"], ""), f"{IMAGE_FOLDERS[0]}/")  # not in a shard
        is_included = pc.and_(pc.equal(table["status"], "ok"), is_file)
        images = to_portable(table.filter(is_included).rename_columns(self._names))
        self._file.write_table(images.cast(self._file.schema))


def _rename(name: str) -> str:
    """Return the name of a column, changed if `datasets` would take it for an image."""
    if name in _IMAGE_COLUMNS:
        return f"input_{name}"
    if name in _FILE_COLUMNS or name.endswith(tuple(f"_{ending}" for ending in _FILE_COLUMNS)):
        return f"{name}_"
    return name


def may_replace_metadata(store: Store) -> bool:
    """Return whether metadata.parquet is missing or was written here. Warn if not. Raises StorageError."""
    if not store.exists(METADATA):
        return True
    try:
        with store.open_file(METADATA) as file:
            if (pq.read_schema(file).metadata or {}).get(b"batch-infer"):
                return True
    except (OSError, pa.ArrowException):
        pass
    log.warning(
        "%s was not written by batch-infer, so it is kept, and datasets cannot load OUT as an image folder: move it "
        "away and run %s",
        store.locate(METADATA),
        quote_command("merge", store.location),
    )
    return False
