"""Write and read tar shards by the conventions of WebDataset.

All files of a sample have the same name up to the first dot, its key, and are adjacent: KEY.png, or another image
format, and KEY.json with the columns of its row. See https://github.com/webdataset/webdataset.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import pyarrow as pa

from batch_infer.carried import to_json, to_python_values
from batch_infer.sinks.shards import Sample

_METADATA = ".json"


class TarFormat:
    """Uncompressed tar files. Equal samples give equal bytes."""

    suffix = ".tar"

    def write(self, path: Path, samples: Iterable[Sample], rows: pa.Table) -> None:
        columns = dict(zip(rows.column_names, map(to_python_values, rows.columns), strict=True))
        with tarfile.open(path, "w") as tar:
            for name, content, row in samples:
                metadata = to_json({column: values[row] for column, values in columns.items()})
                _add(tar, name, content)
                _add(tar, _metadata_name(name), metadata.encode())

    def load(self, file: pa.NativeFile) -> TarShard:
        return TarShard(file)


class TarShard:
    """An open tar file."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file
        self._end = file.size()
        self._locations = _read_locations(file)
        self.sizes: Mapping[str, int] = {
            name: size for name, (_, size) in self._locations.items() if not name.endswith(_METADATA)
        }

    def read(self, name: str) -> bytes:
        offset, size = self._locations[name]
        self._file.seek(offset)
        return bytes(self._file.read(max(0, min(size, self._end - offset))))

    def keep(self, names: Collection[str], path: Path) -> None:
        kept = {other for name in names for other in (name, _metadata_name(name))}
        with tarfile.open(path, "w") as tar:
            for name in self._locations:
                if name in kept:
                    _add(tar, name, self.read(name))


def _read_locations(file: pa.NativeFile) -> dict[str, tuple[int, int]]:
    """Return the offset and size of each file in a tar file by its name, up to the first damaged header."""
    locations: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg():
                    locations[member.name] = member.offset_data, member.size
    except (tarfile.TarError, ValueError, RecursionError):
        pass
    return locations


def _metadata_name(name: str) -> str:
    return f"{name.partition('.')[0]}{_METADATA}"


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without an owner or a time, so that the bytes are reproducible
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
