"""Write and read Parquet shards whose images Hugging Face's `datasets` decodes.

The column `image` is a struct of the file's bytes and its name, as `datasets.Image` stores images
(https://huggingface.co/docs/datasets/image_dataset#parquet), and the schema says so under the key `huggingface`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_infer.carried import rename_reserved, to_portable
from batch_infer.sinks.shards import Sample

IMAGE = "image"
_IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_FEATURES = {"huggingface": json.dumps({"info": {"features": {IMAGE: {"_type": "Image"}}}})}
ROW_GROUP_BYTES = 8 << 20
"""Total size in bytes of images at which a row group is complete. Reading one image reads its row group."""


class ParquetFormat:
    """Parquet files with the images uncompressed, since PNG, JPEG and WebP are compressed."""

    suffix = ".parquet"

    def write(self, path: Path, samples: Iterable[Sample], rows: pa.Table) -> None:
        rows = to_portable(rows.rename_columns(rename_reserved(rows.column_names, {IMAGE: f"input_{IMAGE}"})))
        _write(path, (_make_table(group, rows) for group in _split(samples)), rows.schema)

    def load(self, file: pa.NativeFile) -> ParquetShard:
        return ParquetShard(file)


class ParquetShard:
    """An open Parquet file."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = pq.ParquetFile(file, page_checksum_verification=True)
        self._group: tuple[int, pa.Table] | None = None
        self._locations: dict[str, tuple[int, int]] = {}
        """Row group and row of each image."""
        sizes: dict[str, int] = {}
        for number in range(self._file.num_row_groups):
            table = self._file.read_row_group(number, columns=[f"{IMAGE}.path", "image_bytes"])
            names = pc.struct_field(table[IMAGE], "path").to_pylist()
            for row, (name, size) in enumerate(zip(names, table["image_bytes"].to_pylist(), strict=True)):
                if isinstance(name, str) and isinstance(size, int):
                    self._locations[name], sizes[name] = (number, row), size
        self.sizes: Mapping[str, int] = sizes

    def read(self, name: str) -> bytes:
        number, row = self._locations[name]
        if self._group is None or self._group[0] != number:
            self._group = number, self._file.read_row_group(number, columns=[f"{IMAGE}.bytes"])
        return bytes(self._group[1][IMAGE][row]["bytes"].as_py() or b"")

    def keep(self, names: Collection[str], path: Path) -> None:
        def read_kept() -> Iterator[pa.Table]:
            for number in range(self._file.num_row_groups):
                table = self._file.read_row_group(number)
                kept = table.filter(pc.is_in(pc.struct_field(table[IMAGE], "path"), pa.array(list(names))))
                if len(kept):
                    yield kept

        schema = self._file.schema_arrow  # `image` is the first column
        _write(path, read_kept(), schema.remove(0))


def _split(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Yield the samples of one row group after another."""
    group: list[Sample] = []
    byte_count = 0
    for sample in samples:
        group.append(sample)
        byte_count += len(sample.content)
        if byte_count >= ROW_GROUP_BYTES:
            yield group
            group, byte_count = [], 0
    if group:
        yield group


def _make_table(group: list[Sample], rows: pa.Table) -> pa.Table:
    images = pa.array([{"bytes": content, "path": name} for name, content, _ in group], _IMAGE_TYPE)
    return rows.take([row for _, _, row in group]).add_column(0, IMAGE, images)


def _write(path: Path, tables: Iterable[pa.Table], columns: pa.Schema) -> None:
    schema = pa.schema([pa.field(IMAGE, _IMAGE_TYPE), *columns], metadata=_FEATURES)
    with pq.ParquetWriter(
        path, schema, compression="none", use_dictionary=columns.names, write_statistics=False, write_page_checksum=True
    ) as writer:
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=max(1, len(table)))
