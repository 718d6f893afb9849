"""Read the ids of rows to select from a file: a table with a column `id`, or a text file with one id per line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from batch_infer.carried import make_python_reader
from batch_infer.errors import RowError, TableError
from batch_infer.records import Source
from batch_infer.table.base import BLANK_ROW, Reader, Scratch
from batch_infer.table.fields import MAX_IMAGES, format_id, parse_integer, read_fields
from batch_infer.table.files import find_files
from batch_infer.table.formats import open_reader

TEXT_FORMATS = (".txt", ".prompts.txt")


def read_keys(path: str) -> Iterator[tuple[str, int | None]]:
    """Yield the id and image index of each row of a file, a URL or standard input (-).

    The image index is None, which selects all images of the row, if the cell is empty or there is no column
    `image_index`. Raises TableError, also if there are no ids or a row has none, ServiceError and StorageError.
    """
    has_ids = False
    with closing(Scratch()) as scratch:
        files, _ = find_files((path,), Path(), scratch)
        for file in files:
            if file.error is not None:
                raise TableError(file.error)
            for key in _read(open_reader(file, "id", scratch)):
                has_ids = True
                yield key
        if not has_ids:
            raise TableError(f"{', '.join(file.name for file in files)} has no ids, so no rows are selected")


def _read(reader: Reader) -> Iterator[tuple[str, int | None]]:
    names = reader.schema.names
    columns = {"id": "prompt"} if reader.file.format in TEXT_FORMATS else {"id": "id", "image_index": "image_index"}
    columns = {field: column for field, column in columns.items() if column in names}
    if "id" not in columns:
        raise TableError(f"{reader.file.name} has no column 'id'; its columns are {', '.join(map(repr, names))}")
    converters = {field: make_python_reader(reader.schema.field(column).type) for field, column in columns.items()}
    for row in reader.read_rows():
        source = Source(reader.file.name, row.number, row.line)
        if row.error:
            raise TableError(f"{source}: {row.error}")
        if row.notice is not None and row.notice.kind == BLANK_ROW:
            continue
        cells = read_fields(columns, row.cells.get)
        for field, convert in converters.items():
            if convert is not None and cells[field] is not None:
                cells[field] = convert(cells[field])
        yield _to_key(cells, source)


def _to_key(cells: dict[str, Any], source: Source) -> tuple[str, int | None]:
    """Return the id and image index in a row's cells. Raises TableError."""
    if cells["id"] is None:
        raise TableError(f"{source}: the id is empty")
    index = cells.get("image_index")
    try:
        return format_id(cells["id"]), None if index is None else parse_integer("image_index", index, 0, MAX_IMAGES)
    except RowError as error:
        raise TableError(f"{source}: {error}") from error
