"""Carried columns: values of all types and formats are carried exactly, or as exact text."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_infer.carried import to_python_values, to_result_type, to_values
from batch_infer.jobs.merge import merge, merge_parts
from batch_infer.manifest import SCHEMA, Manifest
from batch_infer.records import PromptRequest, ResultRow, utc_now
from batch_infer.settings import OutputSettings
from batch_infer.store import LocalStore
from batch_infer.worker.rows import make_row
from tests.runs import results
from tests.tables import RULES, open_tables, read_requests, write_bytes, write_csv, write_parquet

ID = b"\x01" * 16


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def carry(table: str | Path, out: Path = Path("out")) -> pa.Table:
    """Return the carried columns of results.parquet as if every row had failed."""
    out.mkdir(exist_ok=True)
    with open_tables(table) as tables:
        rows = list(tables.read_rows(RULES))
        failed = [
            make_row(row, "failed", "x", scheduler="s", worker="w") if isinstance(row, PromptRequest) else row
            for row in rows
        ]
        manifest = Manifest(out)
        for row in failed:
            manifest.commit([row], tables.carried)
        with manifest.index() as index:
            merge(rows, index, tables.carried, LocalStore(out), OutputSettings(results=("parquet", "csv", "jsonl")))
        result = pq.read_table(out / "results.parquet").select(tables.carried.names)
        merge_parts(LocalStore(out), tables.files, OutputSettings(results=("parquet", "csv", "jsonl")))
        assert pq.read_table(out / "results.parquet").select(tables.carried.names).equals(result)
    return result


EXACT = {
    "beyond 9999": pa.array([2**60, None], pa.timestamp("us")),
    "beyond all calendars": pa.array([2**62, -(2**62)], pa.timestamp("us", "Europe/Berlin")),
    "unknown zone": pa.array([1, None], pa.timestamp("ns", "Mars/Base")),
    "nanoseconds": pa.array([1, None], pa.timestamp("ns")),
    "days": pa.array([2**31 - 1, -(2**31)], pa.date32()),
    "time": pa.array([1, None], pa.time64("ns")),
    "duration": pa.array([1, 2**62], pa.duration("ns")),
    "half": pa.array([1.5, None], pa.float16()),
    "decimal": pa.array([Decimal("0." + "1" * 40), None], pa.decimal256(60, 40)),
    "bool8": pa.array([1, None], pa.int8()).cast(pa.bool8()),
    "uuid": pa.array([ID, None], pa.binary(16)).cast(pa.uuid()),
    "json": pa.array(['{"a": 1}', None]).cast(pa.json_()),
    "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(8.0).reshape(2, 2, 2)),
    "list": pa.array([[2**60, None], None], pa.list_(pa.timestamp("us"))),
    "struct": pa.array(
        [{"a": 2**31 - 1, "b": Decimal("1.5")}, None], pa.struct([("a", pa.date32()), ("b", pa.decimal128(9, 2))])
    ),
    "map": pa.array([[("k", 1), ("k", None)], None], pa.map_(pa.string(), pa.timestamp("ns"))),
    "array": pa.array([[1, None], None], pa.list_(pa.time32("s"), 2)),
    "nulls": pa.nulls(2),
}


READS_NULL_ARRAYS = int(pa.__version__.split(".")[0]) >= 26
ARRAY = pytest.param(
    "array",
    marks=pytest.mark.xfail(
        not READS_NULL_ARRAYS, reason="Arrow reads no null list of a fixed size from Parquet", raises=pa.ArrowInvalid
    ),
)


@pytest.mark.parametrize("name", [ARRAY if name == "array" else name for name in EXACT])
def test_a_column_is_carried_unchanged(name: str) -> None:
    """This holds for results.parquet. Writing results.csv and results.jsonl does not fail."""
    column = EXACT[name]
    write_parquet(Path("t.parquet"), prompt=["x", "y"], column=column)
    result, column = carry("t.parquet")["column"], pq.read_table("t.parquet")["column"]
    assert result.type == column.type or name == "tensor"  # Arrow cannot create an empty tensor
    assert to_values(result) == to_values(column)


@pytest.mark.parametrize("array", EXACT.values(), ids=EXACT)
def test_any_column_can_be_written_as_text(array: pa.Array) -> None:
    """Results as CSV and JSON need text if Python has no type."""
    json.dumps(to_python_values(array), default=str)


@pytest.mark.parametrize(
    ("array", "texts"),
    [
        (EXACT["nanoseconds"], ["1970-01-01 00:00:00.000000001"]),
        (EXACT["unknown zone"], ["1970-01-01 00:00:00.000000001Z"]),
        (EXACT["beyond 9999"], ["1152921504606846976 us since 1970-01-01 00:00:00"]),
        (pa.array([253402300800000], pa.timestamp("ms")), ["10000-01-01 00:00:00.000"]),
        (EXACT["duration"], ["1 ns", f"{2**62} ns"]),
        (EXACT["time"], ["00:00:00.000000001"]),
        (EXACT["decimal"], ["0." + "1" * 40]),
        (EXACT["uuid"], ["01010101-0101-0101-0101-010101010101"]),
        (EXACT["bool8"], ["true"]),
        (pa.array([b"\xff\x00"]), ["/wA="]),
        (pa.array([0.1, 1e22]), ["0.1", "1e+22"]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.array([{"a": [b"\xff", None]}]), ['{"a": ["/w==", null]}']),
        (EXACT["map"], ['[["k", "1970-01-01 00:00:00.000000001"], ["k", null]]']),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_if_types_differ_values_become_exact_text(array: pa.Array, texts: list[str]) -> None:
    """Bytes become base64. There is one warning per column."""
    write_parquet(Path("t/a.parquet"), prompt=["x"] * len(array), column=array)
    write_parquet(Path("t/b.parquet"), prompt=["y"], column=["text"])
    result = carry("t")["column"]
    assert result.type == pa.string()
    assert [text for text in result.to_pylist() if text is not None] == [*texts, "text"]
    (warning,) = open_tables("t").notices
    dtype = to_result_type(pq.read_schema("t/a.parquet").field("column").type)
    types = f"column 'column' is {dtype} in t/a.parquet and string in t/b.parquet"
    assert warning == f"{types}: its values are carried as text"


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_numbers_in_a_nested_json_value_keep_all_digits(suffix: str) -> None:
    cell = '{"n": 0.1234567890123456789, "of": [1e400, 2E9999999999999999999, 123456789012345678901, -0.5, "0.5"]}'
    row = f'{{"prompt": "x", "column": {cell}}}'
    write_bytes(Path(f"t.{suffix}"), (row if suffix == "jsonl" else f"[{row}]").encode())
    result = carry(f"t.{suffix}")["column"]
    assert (result.type, result.to_pylist()) == (pa.string(), [cell.replace("1e400", "1E+400")])


def test_struct_fields_with_the_same_name_are_renamed() -> None:
    struct = pa.StructArray.from_arrays([pa.array([1, 2]), pa.array(["a", "b"])], names=["k", "k"])
    structs = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), struct)
    write_parquet(Path("t.parquet"), prompt=["x", "y"], struct=struct, deep=structs, tag=pa.array([["p"], ["q"]]))
    result = carry("t.parquet")
    assert result.to_pylist() == [
        {"struct": {"k": k, "k_2": name}, "deep": [{"k": k, "k_2": name}], "tag": [tag]}
        for k, name, tag in [(1, "a", "p"), (2, "b", "q")]
    ]
    (warning,) = open_tables("t.parquet").notices
    assert warning == (
        "t.parquet has columns with the same name: another 'struct.k' is carried as 'struct.k_2', "
        "another 'deep.k' is carried as 'deep.k_2'"
    )


def test_whole_floats_with_large_integers_are_integers() -> None:
    """If a cell is missing, pandas writes a column of integers as floats."""
    write_parquet(Path("t/a.parquet"), prompt=["x"], id=[1], column=[2**60 + 1])
    write_parquet(Path("t/b.parquet"), prompt=["y", "z"], id=[2.0, float(2**60)], column=[2.0, None])
    result = carry("t")["column"]
    assert (result.type, result.to_pylist()) == (pa.int64(), [2**60 + 1, 2, None])
    assert [row.id for row in read_requests("t")] == ["1", "2", str(2**60)]


def test_names_that_differ_only_by_case_are_renamed() -> None:
    """SQL engines ignore case."""
    write_csv(Path("t/a.csv"), [["prompt", "Seed", "seed", "Tag"], ["x", "old", "1", "a"]])
    write_csv(Path("t/b.csv"), [["prompt", "tag", "STATUS"], ["y", "b", "c"]])
    result = carry("t")
    assert result.to_pylist() == [
        {"input_Seed": "old", "Tag": "a", "input_tag": None, "input_STATUS": None},
        {"input_Seed": None, "Tag": None, "input_tag": "b", "input_STATUS": "c"},
    ]


def test_parts_with_names_that_differ_only_by_case_are_merged(out: Path) -> None:
    """Earlier versions wrote such parts."""
    out.mkdir()
    manifest = Manifest(out)
    shared: dict[str, Any] = {"image_index": 0, "prompt": "x", "status": "failed", "source_file": "t.csv"}
    for number, carried in enumerate(({"Seed": "1", "Tag": "t"}, {"input_Seed": "2", "tag": "u"})):
        row = ResultRow(
            **shared, id=f"{number}", source_row=number, fingerprint="f", finished_at=utc_now(), carried=carried
        )
        manifest.commit([row], pa.schema([(column, pa.string()) for column in carried]))
    merge_parts(LocalStore(out), [], OutputSettings())
    rows = [{name: value for name, value in row.items() if value and name not in SCHEMA.names} for row in results(out)]
    assert [row.pop("input_Seed") for row in rows] == ["1", "2"]
    assert sorted(name for row in rows for name in row) in (["Tag", "input_tag"], ["input_Tag", "tag"])


@pytest.mark.parametrize(
    ("numbers", "dtype", "carried"),
    [
        (["0.12345678901234567890", "0.5"], pa.string(), ["0.12345678901234567890", "0.5"]),
        (["1180123456789012345.0", "7"], pa.int64(), [1180123456789012345, 7]),
        (["0.1", "1e22", "2.50"], pa.float64(), [0.1, 1e22, 2.5]),
        (["1e400", "1e-400", "1.2345678e-320"], pa.string(), ["1E+400", "1E-400", "1.2345678E-320"]),
        (["1e99999999999999999999", "1"], pa.string(), None),
    ],
)
def test_json_numbers_are_not_rounded(numbers: list[str], dtype: pa.DataType, carried: list[Any] | None) -> None:
    lines = "".join(f'{{"prompt": "x", "column": {number}}}\n' for number in numbers)
    result = carry(write_bytes(Path("t.jsonl"), lines.encode()))["column"]
    assert result.type == dtype
    if carried is not None:
        assert result.to_pylist() == carried
