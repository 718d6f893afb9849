"""Columns that are in the path of a file: Hive's `key=value` folders, as Spark, pyarrow and DuckDB write them.

https://spark.apache.org/docs/latest/sql-data-sources-parquet.html#partition-discovery. Where the file has a column of
that name too, the folder's value counts, as in Spark and pyarrow. Values are text: `month=05` stays 05.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import pyarrow as pa

from batch_infer.table.raw import RawRow, Reader
from batch_infer.table.text import clean
from batch_infer.table.urls import is_http, protocol_of, split_chain

NULL = "__HIVE_DEFAULT_PARTITION__"


def partitions_of(name: str) -> dict[str, str | None]:
    """The columns in the path of a file, as the user named it; names and values are URL-decoded.

    Of a URL, the path of the link counts that has the file. All folders of the path count, also those of the argument,
    so that `ds`, `ds/*/*.csv` and `ds/lang=en/a.csv` give a file the same columns.
    """
    path = name
    if protocol_of(name) is not None:
        link = split_chain(name)[1]
        path = link.partition("://")[2]
        if is_http(link):  # encoded once more, as is any path of http
            path = "/".join(unquote(part) for part in path.split("/")[1:])
    found: dict[str, str | None] = {}
    for folder in path.split("/")[:-1]:
        key, equals, value = folder.partition("=")
        if key and equals:
            found[clean(unquote(key))] = None if value == NULL else clean(unquote(value))
    return found


@dataclass(frozen=True, slots=True)
class Partitioned:
    """The rows of a file with the columns of its path."""

    reader: Reader
    schema: pa.Schema
    values: Mapping[str, str | None]

    def rows(self) -> Iterator[RawRow]:
        for row in self.reader.rows():
            yield row._replace(cells={**row.cells, **self.values})


def with_partitions(reader: Reader, values: Mapping[str, str | None]) -> Reader:
    """A file's reader that also gives the columns of its path."""
    if not values:
        return reader
    own = [field if field.name not in values else field.with_type(pa.string()) for field in reader.schema]
    added = [pa.field(name, pa.string()) for name in values if name not in reader.schema.names]
    return Partitioned(reader, pa.schema([*own, *added]), values)


def overlap_sentence(overlaps: Sequence[tuple[str, str]]) -> list[str]:
    """Say that files have columns of their own, by name, which are in their path too."""
    if not overlaps:
        return []
    file, name = overlaps[0]
    more = f" (and {len(overlaps) - 1:,} more columns of files)" if len(overlaps) > 1 else ""
    return [f"{file} has a column {name!r}{more}, and so has its path: the value of the path is used"]
