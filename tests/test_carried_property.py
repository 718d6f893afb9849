"""Arbitrary mixes of types, formats and errors: values are carried exactly or as exact text, and no row is lost."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_infer.carried import to_array, to_result_type, to_text, to_values
from batch_infer.jobs.merge import merge, merge_parts
from batch_infer.jobs.summary import Counts
from batch_infer.manifest import Manifest
from batch_infer.records import PromptRequest
from batch_infer.settings import IdSource, OutputSettings
from batch_infer.store import LocalStore
from batch_infer.worker.rows import make_row
from tests.tables import RULES, exact_json, in_format, open_tables

EVERYTHING = OutputSettings(results=("parquet", "csv", "jsonl"))


def make_results(folder: Path, id_from: IdSource = "row") -> tuple[Counts, pa.Table]:
    """Return the counts and results of a folder of tables as if every row had failed."""
    out = folder / "out"
    out.mkdir()
    with open_tables(folder / "tables", id_from=id_from) as tables:
        rows = list(tables.read_rows(RULES))
        committed = [
            make_row(row, "failed", "x", scheduler="s", worker="w") if isinstance(row, PromptRequest) else row
            for row in rows
        ]
        manifest = Manifest(out)
        for part in (committed[::2], committed[1::2]):
            if part:
                manifest.commit(part, tables.carried)
        with manifest.index() as index:
            counts = merge(tables.read_rows(RULES), index, tables.carried, LocalStore(out), EVERYTHING)
        results = pq.read_table(out / "results.parquet")
        merge_parts(LocalStore(out), tables.files, EVERYTHING)
        again = pq.read_table(out / "results.parquet")
    assert {name: again.schema.field(name).type for name in again.column_names} == dict(
        zip(results.column_names, results.schema.types, strict=True)
    )
    for name in results.column_names:  # NaN does not equal itself
        assert repr(to_values(again[name])) == repr(to_values(results[name]))
    assert [(row.id, row.image_index) for row in rows] == list(
        zip(results["id"].to_pylist(), results["image_index"].to_pylist(), strict=True)
    )
    return counts, results


# Values

INTEGERS = [(getattr(pa, f"{sign}int{bits}")(), bits, sign) for bits in (8, 16, 32, 64) for sign in ("", "u")]


def integers(bits: int, sign: str = "") -> st.SearchStrategy[int]:
    lowest, highest = (0, 2**bits - 1) if sign else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    edges = [value for value in (0, 1, 2**53, 2**53 + 1, lowest, highest) if lowest <= value <= highest]
    return st.sampled_from(edges) | st.integers(lowest, highest)


def decimals(digits: int, scale: int) -> st.SearchStrategy[Decimal]:
    return st.integers(-(10**digits) + 1, 10**digits - 1).map(lambda value: Decimal(f"{value}E-{scale}"))


LEAVES: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    *((dtype, integers(bits, sign)) for dtype, bits, sign in INTEGERS),
    (pa.float32(), st.floats(width=32)),
    (pa.float16(), st.floats(width=16)),
    (pa.float64(), st.floats() | st.sampled_from([1.0, 2.0**53, 2.0**63, -0.0, 0.5])),
    (pa.bool_(), st.booleans()),
    (pa.string(), st.text(max_size=5)),
    (pa.large_string(), st.text(max_size=5)),
    (pa.binary(), st.binary(max_size=5)),
    (pa.binary(2), st.binary(min_size=2, max_size=2)),
    (pa.uuid(), st.binary(min_size=16, max_size=16)),
    (pa.bool8(), st.integers(0, 1)),
    (pa.json_(), st.just('{"a": 1}')),
    (pa.date32(), integers(32)),
    (pa.time32("ms"), st.integers(0, 86_399_999)),
    (pa.time64("ns"), st.integers(0, 86_399_999_999_999)),
    *((pa.timestamp(unit, zone), integers(64)) for unit in ("ms", "us", "ns") for zone in (None, "UTC", "Asia/Tokyo")),
    (pa.duration("us"), integers(64)),
    (pa.decimal128(9, 2), decimals(9, 2)),
    (pa.decimal256(60, 30), decimals(60, 30)),
    (pa.null(), st.none()),
]


def nested(dtype: pa.DataType, values: st.SearchStrategy[Any]) -> list[tuple[pa.DataType, st.SearchStrategy[Any]]]:
    nullable = values | st.none()
    return [
        (pa.list_(dtype), st.lists(nullable, max_size=2)),
        (pa.large_list(dtype), st.lists(nullable, max_size=2)),
        (
            pa.struct([("a", dtype), ("b", pa.string())]),
            st.fixed_dictionaries({"a": nullable, "b": st.text(max_size=2)}),
        ),
        (pa.map_(pa.string(), dtype), st.lists(st.tuples(st.text(max_size=2), nullable), max_size=2)),
    ]


TWICE = "twice_2"
"""The result name of the second field `twice` of a struct."""


def duplicate_field(array: pa.StructArray) -> pa.StructArray:
    """Return an array of structs whose two fields have the same name."""
    return array.view(pa.struct([array.type.field(0), array.type.field(1).with_name("twice")]))


@st.composite
def columns(draw: st.DrawFn) -> pa.Array:
    dtype, values = draw(st.sampled_from(LEAVES))
    if not pa.types.is_null(dtype) and not isinstance(dtype, pa.BaseExtensionType) and draw(st.integers(0, 7)) == 0:
        cells = draw(st.lists(st.fixed_dictionaries({"twice": values, TWICE: st.text(max_size=2)}), min_size=1))
        return to_array(cells, pa.struct([("twice", dtype), (TWICE, pa.string())]))
    if not pa.types.is_null(dtype) and draw(st.integers(0, 3)) == 0:
        storage = dtype.storage_type if isinstance(dtype, pa.BaseExtensionType) else dtype
        dtype, values = draw(st.sampled_from(nested(storage, values)))
    cells = draw(st.lists(values | st.none(), min_size=1, max_size=3))
    array = to_array(cells, dtype)
    return array.dictionary_encode() if pa.types.is_string(dtype) and draw(st.booleans()) else array


exponents = st.tuples(st.integers(-99, 99), st.integers(-400, 400)).map(lambda pair: Decimal(f"{pair[0]}E{pair[1]}"))
json_values = st.recursive(
    st.none() | st.booleans() | integers(70) | st.floats() | st.text(max_size=5) | decimals(40, 20) | exponents,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)
shards = st.lists(
    columns()
    | st.tuples(st.just("jsonl"), st.lists(json_values, min_size=1, max_size=3))
    | st.tuples(st.just("csv"), st.lists(texts, min_size=1, max_size=3)),
    min_size=1,
    max_size=3,
)


def check_values(tables: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, expected = Path(name), []
        (folder / "tables").mkdir()
        for number, shard in enumerate(tables):
            path = folder / "tables" / f"{number}"
            if isinstance(shard, pa.Array):
                path = path.with_suffix(".parquet")
                pq.write_table(pa.table({"prompt": ["x"] * len(shard), "column": shard}), path)
                stored = pq.read_table(path)["column"]
                if pa.types.is_struct(shard.type) and TWICE in shard.type.names:
                    structs = duplicate_field(stored.combine_chunks())
                    pq.write_table(pa.table({"prompt": ["x"] * len(shard), "column": structs}), path)
                expected += [(value, to_result_type(stored.type)) for value in to_values(stored)]
                continue
            suffix, cells = shard
            rows = [{"prompt": "x", "column": cell} for cell in cells]
            path.with_suffix(f".{suffix}").write_bytes(in_format(suffix, rows))
            expected += [(cell, pa.string() if suffix == "csv" else None) for cell in cells]
        _, results = make_results(folder)
        column = results["column"] if "column" in results.column_names else pa.chunked_array([pa.nulls(len(expected))])
        assert len(column) == len(expected)
        for (value, dtype), carried in zip(expected, to_values(column), strict=True):
            assert is_same(value, dtype, carried, column.type), (value, dtype, carried, column.type)


def is_same(value: Any, dtype: pa.DataType | None, carried: Any, carried_type: pa.DataType) -> bool:
    """Return whether a value was carried exactly, or as exact text."""
    if value is None or carried is None:
        return value is None and carried is None
    if dtype is None and pa.types.is_string(carried_type) and not isinstance(value, (str, bool)):
        return is_same_json(
            json.loads(exact_json(value), parse_float=Decimal), json.loads(carried, parse_float=Decimal)
        )
    if pa.types.is_string(carried_type) and not isinstance(value, str):
        assert carried == to_text(value, dtype)
        if isinstance(value, float):
            return float(carried) == value or (math.isnan(value) and carried == "nan")
        if isinstance(value, int) and not isinstance(value, bool) and (dtype is None or pa.types.is_integer(dtype)):
            return int(carried) == value
        if isinstance(value, Decimal):
            return Decimal(carried) == value
        return True
    if isinstance(value, Decimal) and isinstance(carried, float):  # 0.1 is carried as the float that prints as 0.1
        return Decimal(repr(carried)) == value
    return bool(carried == value) or repr(carried) == repr(value)


def is_same_json(value: Any, carried: Any) -> bool:
    """Return whether two JSON values are equal. Numbers must be numbers and equal to the last digit."""
    if isinstance(value, list):
        return isinstance(carried, list) and len(value) == len(carried) and all(map(is_same_json, value, carried))
    if isinstance(value, dict):
        return (
            isinstance(carried, dict)
            and value.keys() == carried.keys()
            and all(is_same_json(value[name], carried[name]) for name in value)
        )
    if isinstance(value, (int, Decimal)) and not isinstance(value, bool):
        return isinstance(carried, (int, Decimal)) and not isinstance(carried, bool) and value == carried
    return type(value) is type(carried) and repr(value) == repr(carried)


@settings(max_examples=40)
@given(shards)
def test_any_mix_of_types_is_carried_exactly(tables: list[Any]) -> None:
    check_values(tables)


@pytest.mark.promises
@settings(max_examples=300)
@given(shards)
def test_many_mixes_of_types_are_carried_exactly(tables: list[Any]) -> None:
    check_values(tables)


# Rows

cells = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["x", "", None, "a red circle", "y" * 10_001, " "]), "row": st.just("is not blank")},
    optional={
        "id": st.sampled_from([None, "", "a", "A", "0-00000000", "0-00000001", "1-00000000", "x" * 10_001, "b/../c"]),
        "num_images_per_prompt": st.sampled_from([None, 1, 2, 3, "0", "NaN", "many"]),
        "seed": st.sampled_from([None, 0, 2**63 - 1, -1, "7", "NULL"]),
        "height": st.sampled_from([None, 64, 72, 13, "tall"]),
        "tag": st.text(max_size=3),
        "Tag": st.integers() | st.none(),
    },
)  # fmt: skip
files = st.tuples(st.sampled_from(["csv", "jsonl", "json"]), st.lists(cells, min_size=1, max_size=5))
folders = st.lists(files, min_size=1, max_size=3)


def check_rows(tables: Iterable[tuple[str, list[dict[str, Any]]]], id_from: IdSource) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, sources = Path(name), []
        for number, (suffix, rows) in enumerate(tables):
            path = folder / "tables" / f"{number}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            names = dict.fromkeys(key for row in rows for key in row)
            complete = [{key: row.get(key) for key in names} for row in rows]
            path.write_bytes(in_format(suffix, complete if suffix == "csv" else rows))
            sources += [(str(path), row) for row in range(len(rows))]
        counts, results = make_results(folder, id_from)
        rows = results.select(["source_file", "source_row", "image_index", "status"]).to_pylist()
        assert Counter((row["source_file"], row["source_row"]) for row in rows).keys() == set(sources)
        assert (counts.rows, counts.remaining) == (len(sources), 0)
        images: dict[Any, list[dict[str, Any]]] = {}
        for row in rows:
            images.setdefault((row["source_file"], row["source_row"]), []).append(row)
        for group in images.values():
            assert [row["image_index"] for row in group] == list(range(len(group)))
            assert len(group) == 1 or {row["status"] for row in group} == {"failed"}
        keys = list(zip(results["id"].to_pylist(), results["image_index"].to_pylist(), strict=True))
        assert len(set(keys)) == len(keys)


@settings(max_examples=40)
@given(folders, st.sampled_from(["row", "content"]))
def test_any_row_is_accounted_for_exactly_once(tables: Any, id_from: IdSource) -> None:
    check_rows(tables, id_from)


@pytest.mark.promises
@settings(max_examples=300)
@given(folders, st.sampled_from(["row", "content"]))
def test_many_rows_are_accounted_for_exactly_once(tables: Any, id_from: IdSource) -> None:
    check_rows(tables, id_from)
