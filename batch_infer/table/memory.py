"""Read tables that a Python program passes as objects: a DataFrame, an Arrow table, or a list of prompts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from batch_infer.errors import TableError
from batch_infer.store import temporary_file_errors
from batch_infer.table.base import Scratch, TableFile, find_encoding_error, format_error
from batch_infer.table.formats import parse_name

InMemoryTable: TypeAlias = pa.Table
IN_MEMORY: dict[Literal["dataframe", "prompts"], str] = {"dataframe": "<dataframe>", "prompts": "<prompts>"}
"""TABLE argument that names a table in memory, by the stem of its default ids."""

_tables: ContextVar[Mapping[str, InMemoryTable] | None] = ContextVar("tables", default=None)


@contextmanager
def in_memory_tables(tables: Mapping[str, InMemoryTable]) -> Iterator[None]:
    """Inside the context, let TABLE arguments of IN_MEMORY name these tables. Other threads do not see them."""
    token = _tables.set(tables)
    try:
        yield
    finally:
        _tables.reset(token)


def make_in_memory(data: object) -> tuple[str, InMemoryTable] | None:
    """Return the TABLE argument for an object and its table, or None if it is neither a list nor a data frame.

    A list contains prompts. A data frame is one of pandas, whose index is left out, or an object that supports the
    Arrow PyCapsule interface (https://arrow.apache.org/docs/format/CDataInterface/PyCapsuleInterface.html), such as a
    table of Arrow or a data frame of Polars. Raises TableError.
    """
    if isinstance(data, list):
        return IN_MEMORY["prompts"], pa.table({"prompt": pa.array(_check_prompts(data), pa.string())})
    pandas = sys.modules.get("pandas")
    try:
        if pandas is not None and isinstance(data, pandas.DataFrame):
            if data.columns.nlevels > 1:
                raise TableError("the dataframe has columns of several levels: give each column one name")
            table = pa.Table.from_pandas(data, preserve_index=False)
        elif hasattr(data, "__arrow_c_stream__") and not isinstance(data, type):
            _refuse_objects(data)
            table = pa.table(data)
        else:
            return None
    except (pa.ArrowException, ValueError, OverflowError, TypeError) as error:
        raise TableError(f"the dataframe cannot be read: {_explain(error)}; give each column one type") from error
    return IN_MEMORY["dataframe"], _without_views(table).replace_schema_metadata(None)


def _refuse_objects(data: object) -> None:
    """Raise TableError if a data frame of Polars has a column of Python objects, which it exports as addresses."""
    polars = sys.modules.get("polars")
    if polars is not None and isinstance(data, polars.DataFrame):
        for name, dtype in data.schema.items():
            if dtype == polars.Object:
                raise TableError(
                    f"column {name!r} of the dataframe contains Python objects: convert it to another type"
                )


def _check_prompts(prompts: Sequence[Any]) -> Sequence[str]:
    """Return the prompts. Raises TableError if they are not strings, or seem to be the paths of tables."""
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            hint = "; pass several tables as a tuple" if isinstance(prompt, os.PathLike) else ""
            raise TableError(f"a list must contain prompts, but item {index} is {type(prompt).__name__}{hint}")
        if (error := find_encoding_error(prompt)) is not None:
            raise TableError(f"item {index} of the list {error}")
    if prompts and all(parse_name(prompt) for prompt in prompts):
        raise TableError(f"a list contains prompts, but {prompts[0]!r} looks like a file: pass tables as a tuple")
    return prompts


def _explain(error: Exception) -> str:
    """Join the parts of an Arrow error, which name the value and its column."""
    if isinstance(error, UnicodeError):
        return str(error)
    return ": ".join(str(part) for part in reversed(error.args)) or type(error).__name__


def _without_views(table: pa.Table) -> pa.Table:
    """Replace string views and binary views, which Parquet files cannot contain, also in dictionaries."""
    types = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    for position, field in enumerate(table.schema):
        column = table.column(position)
        if isinstance(field.type, pa.DictionaryType) and (dtype := types.get(field.type.value_type)) is not None:
            chunks = [chunk.dictionary.cast(dtype).take(chunk.indices) for chunk in column.chunks]
            column = pa.chunked_array(chunks, dtype)
        elif (dtype := types.get(field.type)) is not None:
            column = column.cast(dtype)
        table = table.set_column(position, field.name, column)
    return table


def is_in_memory(argument: str) -> bool:
    """Return whether a TABLE argument may name a table in memory."""
    return argument in IN_MEMORY.values()


def find_in_memory(argument: str) -> InMemoryTable | None:
    """Return the table that an argument names in this context, or None if it names a file."""
    return (_tables.get() or {}).get(argument)


def write_in_memory(argument: str, table: InMemoryTable, scratch: Scratch) -> TableFile:
    """Write a table to a Parquet file, since tables are read more than once. Raises TableError, StorageError."""
    path, name = scratch.new_path(), argument.strip("<>")
    try:
        with temporary_file_errors():
            pq.write_table(table, path)
    except pa.ArrowException as error:
        raise TableError(
            f"the {name} cannot be stored as Parquet: {format_error(error)}; convert the column of this type to text"
        ) from error
    return TableFile(path, name, name, format=".parquet", origin="memory")
