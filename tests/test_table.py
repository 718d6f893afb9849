"""Tables of prompts: every row becomes requests, or one invalid result that says what is wrong."""

from __future__ import annotations

import csv
import datetime
import errno
import json
import math
import os
import re
import shlex
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from batch_infer.carried import to_array
from batch_infer.errors import SettingsError, StorageError, TableError
from batch_infer.manifest import SCHEMA
from batch_infer.records import PromptRequest, ResultRow, SamplingParams
from batch_infer.settings import FIELDS, RowDefaults
from batch_infer.table import RowRules
from tests.tables import (
    RULES,
    error_of,
    in_format,
    open_tables,
    read,
    read_requests,
    write_bytes,
    write_csv,
    write_parquet,
)


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in an empty folder, so that it can name tables as users do."""
    monkeypatch.chdir(tmp_path)


def one_row(**cells: Any) -> Path:
    """Write a CSV table with one row: a prompt and these cells."""
    return write_csv(Path("one.csv"), [["prompt", *cells], ["a red circle", *cells.values()]])


# Files of TABLE arguments


def test_csv_and_parquet_give_equal_rows() -> None:
    columns = {"prompt": ["a red circle", "a blue square"], "seed": [3, 4], "height": [64, 128]}
    from_csv = read_requests(write_csv(Path("t.csv"), [list(columns), *zip(*columns.values(), strict=True)]))
    from_parquet = read_requests(write_parquet(Path("t.parquet"), **columns))
    assert [request.fingerprint for request in from_csv] == [request.fingerprint for request in from_parquet]
    assert [request.params.height for request in from_csv] == [64, 128]


def test_a_folder_is_read_recursively_in_order_of_names() -> None:
    for name in ("b.csv", "a.CSV", "deep/er/c.csv", ".hidden.csv", "_temporary/d.csv", ".git/e.csv"):
        write_csv(Path("prompts", name), [["prompt"], [name]])
    write_parquet(Path("prompts/d.parquet"), prompt=["d.parquet"])
    Path("prompts/notes.txt").write_text("a line")
    Path("prompts/notes.md").write_text("no table")
    rows = {request.id: request.prompt for request in read_requests("prompts")}
    assert rows == {
        "a-00000000": "a.CSV",
        "b-00000000": "b.csv",
        "d-00000000": "d.parquet",
        "deep-er-c-00000000": "deep/er/c.csv",
        "notes-00000000": "a line",
    }
    assert [request.source.file for request in read_requests("prompts")][0] == "prompts/a.CSV"


def test_default_ids_of_a_glob_start_after_its_fixed_part() -> None:
    for name in ("2026/may/a.csv", "2026/june/a.csv", "2025/may/a.csv"):
        write_csv(Path("prompts", name), [["prompt"], [name]])
    rows = [request.id for request in read_requests("prompts/2026/*/a.csv")]
    assert rows == ["june-a-00000000", "may-a-00000000"]
    assert len(read_requests("prompts/**/*.csv")) == 3


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob() -> None:
    assert len(read_requests(write_csv(Path("run[1].csv"), [["prompt"], ["x"]]))) == 1


def test_a_file_given_twice_is_read_once() -> None:
    table = write_csv(Path("t.csv"), [["prompt"], ["x"]])
    assert len(read_requests(table, "./t.csv", table.resolve(), "*.csv")) == 1


def test_results_in_the_folder_are_not_read_as_tables() -> None:
    """`run .` writes OUT next to the tables, so the next run must ignore it."""
    write_csv(Path("t.csv"), [["prompt"], ["x"]])
    for out in (Path("batch-infer-out"), Path(), Path("deep/out")):
        write_bytes(out / "run.json", b"{}")
        write_parquet(out / "manifest" / "part-0.parquet", prompt=["a result"])
        write_parquet(out / "results.parquet", prompt=["a result"])
        write_csv(out / "results.csv", [["prompt"], ["a result"]])
        write_bytes(out / "results.jsonl", b'{"prompt": "a result"}')
        for folder in ("images", "quarantine", "logs", "gallery"):
            write_bytes(out / folder / "deep" / "some.txt", b"a result")
    write_csv(Path("manifest/prompts.csv"), [["prompt"], ["in a folder that is also OUT"]])
    write_csv(Path("elsewhere/manifest/results.csv"), [["prompt"], ["no run.json here"]])
    for argument in (".", "**/*.csv", "./*.*"):
        assert "a result" not in [request.prompt for request in read_requests(argument)]
    assert {request.prompt for request in read_requests(".")} == {"x", "no run.json here"}
    assert len(read_requests("results.csv")) == 1, "a file that the user names is read"


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("missing.csv", "missing.csv: no such file or folder"),
        (
            "notes.md",
            "notes.md: unknown file extension .md; a table ends in .csv, .tsv, .*, "
            "also with .gz, .bz2, .xz or .zst after it",
        ),
        ("Makefile", r"Makefile: unknown file extension \(none\)"),
        ("empty", r"empty: the folder contains no table \(.csv, .tsv, "),
        ("empty/*.csv", r"empty/\*.csv: the glob matches no table"),
        ("missing/**/*.csv", "the glob matches no table"),
    ],
)
def test_an_argument_without_a_table_is_reported(argument: str, sentence: str) -> None:
    Path("empty").mkdir()
    Path("empty/notes.md").touch()
    Path("notes.md").touch()
    Path("Makefile").touch()
    with pytest.raises(TableError, match=sentence):
        open_tables(argument)


def test_a_file_name_that_is_not_utf_8_is_accepted() -> None:
    name = os.fsdecode(b"caf\xe9.csv")
    write_csv(Path(name), [["prompt", "seed"], ["x", "1"], ["y", "one"]])
    good, bad = read(name)
    for item in (good, bad):
        item.id.encode()
    assert isinstance(bad, ResultRow)
    bad.source_file.encode()


# Ids


def test_default_ids_count_rows_from_0() -> None:
    table = write_csv(Path("sub/prompts.csv"), [["prompt"], *([f"prompt {i}"] for i in range(12))])
    rows = read_requests(table)
    assert [request.id for request in rows][::11] == ["prompts-00000000", "prompts-00000011"]
    assert [request.source.row for request in rows] == list(range(12))


def test_two_files_with_the_same_stem_are_refused_with_advice() -> None:
    tables = [write_csv(Path(folder, "a.csv"), [["prompt"], [folder]]) for folder in ("x", "y")]
    with pytest.raises(TableError, match=r"x/a.csv and y/a.csv .* \(a-00000000, ...\): rename one, .* id column"):
        open_tables(*tables)
    assert [request.id for request in read_requests(".")] == ["x-a-00000000", "y-a-00000000"]


def test_two_files_with_the_same_stem_are_accepted_with_ids() -> None:
    tables = [write_csv(Path(folder, "a.csv"), [["id", "prompt"], [folder, "p"]]) for folder in ("x", "y")]
    assert [request.id for request in read_requests(*tables)] == ["x", "y"]


def test_paths_that_differ_only_in_a_slash_or_hyphen_are_refused() -> None:
    write_csv(Path("t/a/b.csv"), [["prompt"], ["1"]])
    write_csv(Path("t/a-b.csv"), [["prompt"], ["2"]])
    with pytest.raises(TableError, match="same ids"):
        open_tables("t")


def test_ids_and_files_that_differ_from_earlier_ones_only_by_case_are_marked() -> None:
    write_csv(Path("t/A.csv"), [["id", "prompt"], ["SKU", "x"], ["other", "x"], ["sku", "x"], ["Sku", "x"]])
    write_csv(Path("t/a.csv"), [["id", "prompt"], ["sKU", "x"], ["", "x"], ["A-00000001", "x"]])
    rows = {row.id: (row.id_collides, row.stem_collides) for row in read_requests("t/A.csv", "t/a.csv")}
    assert rows == {
        "SKU": (False, False),
        "other": (False, False),
        "sku": (True, False),
        "Sku": (True, False),
        "sKU": (True, True),
        "a-00000001": (False, True),
        "A-00000001": (True, True),
    }
    with open_tables("t/A.csv", "t/a.csv") as tables:
        assert [getattr(new, "id_collides", None) for new, _ in tables.compare_rows(RULES, [RULES])] == [
            collides for collides, _ in rows.values()
        ]


def test_default_ids_that_differ_from_earlier_ones_only_by_case_are_marked() -> None:
    for folder in ("X", "x", "y"):
        write_csv(Path("t", folder, "a.csv"), [["prompt"], ["one"], ["two"]])
    assert {row.id: (row.id_collides, row.stem_collides) for row in read_requests("t")} == {
        "X-a-00000000": (False, False),
        "X-a-00000001": (False, False),
        "x-a-00000000": (True, False),
        "x-a-00000001": (True, False),
        "y-a-00000000": (False, False),
        "y-a-00000001": (False, False),
    }


def test_a_duplicate_id_makes_the_later_row_invalid() -> None:
    table = write_csv(Path("t.csv"), [["id", "prompt"], ["a", "1"], ["a", "2"], ["b", "3"]])
    first, later, other = read(table)
    assert (first.id, later.id, other.id) == ("a", "t-00000001", "b")
    assert isinstance(later, ResultRow)
    assert later.error == "duplicate id 'a'"
    assert later.prompt == "2"


def test_an_id_that_looks_like_a_default_id_conflicts_with_no_row() -> None:
    rows = [["t-00000001", "1"], ["", "2"], ["t-00000000", "3"], ["t-00000001", "4"]]
    items = read(write_csv(Path("t.csv"), [["id", "prompt"], *rows]))
    assert len({item.key for item in items}) == 4
    assert [isinstance(item, ResultRow) for item in items] == [False, False, False, True]


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        ([7, 8], ["7", "8"]),
        ([7.0, None], ["7", "t-00000001"]),
        ([b"caf\xc3\xa9", b"b"], ["café", "b"]),
        (["", "b"], ["t-00000000", "b"]),
        ([datetime.date(2026, 5, 1), None], ["2026-05-01", "t-00000001"]),
    ],
    ids=lambda values: type(values[0]).__name__,
)
def test_ids_of_any_type_become_text(values: list[Any], ids: list[str]) -> None:
    table = write_parquet(Path("t.parquet"), id=values, prompt=["1", "2"])
    assert [request.id for request in read_requests(table)] == ids


# Fields and carried columns


def test_other_columns_are_carried_unchanged() -> None:
    """Their types and values stay the same."""
    columns = {
        "number": pa.array([1, None], pa.int16()),
        "real": pa.array([0.1, None], pa.float32()),
        "time": pa.array([1, None], pa.timestamp("ns", "Europe/Berlin")),
        "duration": pa.array([1, None], pa.duration("us")),
        "price": pa.array([Decimal("1.50"), None]),
        "raw": pa.array([b"\xff\x00", None]),
        "tags": pa.array([["a", "b"], None]),
        "nested": pa.array([{"a": {"b": [1]}}, None]),
        "map": pa.array([[("k", 1), ("k", 2)], None], pa.map_(pa.string(), pa.int64())),
        "nulls": pa.nulls(2),
    }
    table = write_parquet(Path("t.parquet"), prompt=["x", "y"], **columns)
    tables = open_tables(table)
    written = pq.read_table(table).select(columns)
    assert tables.carried.equals(written.schema.remove_metadata())
    rows = list(tables.read_rows(RULES))
    arrays = [to_array([item.carried[field.name] for item in rows], field.type) for field in tables.carried]
    assert pa.table(arrays, tables.carried).equals(written.replace_schema_metadata())


def test_categories_and_wide_strings_are_carried_as_text() -> None:
    category = pa.array(["a", "b"]).dictionary_encode()
    table = write_parquet(
        Path("t.parquet"), prompt=["x", "y"], category=category, wide=pa.array(["a", "b"], pa.large_string())
    )
    assert open_tables(table).carried.types == [pa.string()] * 2


def test_carried_columns_with_the_name_of_a_result_column() -> None:
    header = ["prompt", "status", "generated_image", "input_generated_image", "mine"]
    (request,) = read_requests(write_csv(Path("t.csv"), [header, ["x", "1", "2", "3", "4"]]))
    assert request.carried == {
        "input_status": "1",
        "input_input_generated_image": "2",
        "input_generated_image": "3",
        "mine": "4",
    }
    assert not set(open_tables("t.csv").carried.names) & set(SCHEMA.names)


def test_files_with_different_columns_share_one_schema() -> None:
    write_csv(Path("t/a.csv"), [["prompt", "a"], ["x", "1"]])
    write_parquet(Path("t/b.parquet"), prompt=["y"], b=[2])
    first, second = read_requests("t")
    assert (first.carried, second.carried) == ({"a": "1"}, {"b": 2})
    assert open_tables("t").carried.names == ["a", "b"]


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        (pa.array([1]), pa.array(["x"]), pa.string()),
        (pa.array([1], pa.int8()), pa.array([2**40]), pa.int64()),
        (pa.array([1]), pa.array([2.5]), pa.float64()),
        (pa.array([2**60 + 1]), pa.array([2.5]), pa.string()),
        (pa.array([2**60 + 1]), pa.array([2.0]), pa.int64()),
        (pa.array([1]), pa.array([math.nan]), pa.float64()),
        (pa.array([2**60 + 1]), pa.array([math.nan]), pa.string()),
        (pa.array([2**31], pa.uint32()), pa.array([2.5], pa.float32()), pa.float64()),
        (pa.array([-1]), pa.array([2**62], pa.uint64()), pa.int64()),
        (pa.array([-1]), pa.array([2**63 + 1], pa.uint64()), pa.string()),
        (pa.array([2**63 + 1], pa.uint64()), pa.array([0], pa.uint8()), pa.uint64()),
        (pa.array([True]), pa.array([1]), pa.string()),
        (pa.nulls(1), pa.array([3]), pa.int64()),
        (pa.array([Decimal("1.5")]), pa.array([2.5]), pa.string()),
        (pa.array([Decimal("1.5")]), pa.array([Decimal("1.55555")]), pa.string()),
        (pa.array([b"\xff"]), pa.array(["x"]), pa.string()),
        (pa.array([1], pa.timestamp("s")), pa.array([1], pa.timestamp("us")), pa.string()),
        (pa.array([[1]]), pa.array([["x"]]), pa.string()),
        (pa.array([{"a": 1}]), pa.array([{"b": "x"}]), pa.string()),
    ],
    ids=lambda value: str(value if isinstance(value, pa.DataType) else value.type),
)
def test_types_that_differ_between_files_have_a_common_type(
    first: pa.Array, second: pa.Array, common: pa.DataType
) -> None:
    """The common type can represent all values, and is text if necessary: no carried column makes a run fail."""
    for name, array, other in (("a", first, second), ("b", second, first)):
        write_parquet(Path(name, "a.parquet"), prompt=["x"], column=array)
        write_parquet(Path(name, "b.parquet"), prompt=["y"], column=other)
        assert open_tables(name).carried.field("column").type == common
        assert len(read_requests(name)) == 2


def test_a_field_can_be_read_from_a_column_with_another_name() -> None:
    table = write_csv(Path("t.csv"), [["caption", "prompt", "n"], ["a red circle", "the other", "2"]])
    rows = read_requests(table, columns={"prompt": "caption", "num_images_per_prompt": "n"})
    assert [request.prompt for request in rows] == ["a red circle"] * 2
    assert rows[0].carried == {"input_prompt": "the other"}


def test_a_field_can_be_carried_instead() -> None:
    (request,) = read_requests(one_row(height="tall"), columns={"height": ""})
    assert request.params.height == 64
    assert request.carried == {"input_height": "tall"}


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({}, "has no column 'prompt'; try --column 'prompt= Prompt'"),
        ({"prompt": "caption"}, r"has no column 'caption' for prompt; .* --column 'prompt= Prompt'"),
        ({"prompt": ""}, "has no column '' for prompt"),
        ({"prompt": " Prompt", "seed": "luck"}, "has no column 'luck' for seed; it has ' Prompt', 'text'"),
    ],
)
def test_a_missing_column_is_reported(columns: dict[str, str], sentence: str) -> None:
    table = write_csv(Path("t.csv"), [[" Prompt", "text"], ["x", "y"]])
    with pytest.raises(TableError, match=sentence):
        open_tables(table, columns=columns)


def test_two_columns_named_like_a_field_are_refused() -> None:
    with pytest.raises(TableError, match="t.csv has two columns named 'seed'; rename one"):
        open_tables(write_csv(Path("t.csv"), [["prompt", "seed", "seed"], ["x", "1", "2"]]))


def test_limit_counts_rows_and_not_images() -> None:
    table = write_csv(Path("t.csv"), [["prompt", "num_images_per_prompt"], ["a", 2], ["", 1], ["c", 1]])
    assert [item.source.row for item in read_requests(table, limit=1)] == [0, 0]
    assert len(read(table, limit=2)) == 3
    assert len(read(table, limit=99)) == 4


# Cells


@pytest.mark.parametrize("empty", [None, "", float("nan")], ids=str)
def test_an_empty_cell_takes_the_default(empty: Any) -> None:
    rules = RowRules(RowDefaults(30, 6.0, 0.5, 128, 72, "blurry", 2, 7), RULES.sizes, "f")
    names = ("negative_prompt", "seed", "height", "width", "num_inference_steps", "guidance_scale")
    values = {name: [empty] for name in (*names, "guidance_rescale", "num_images_per_prompt")}
    with_cells = read_requests(write_parquet(Path("t.parquet"), prompt=["x"], **values), rules=rules)
    without_cells = read_requests(write_parquet(Path("t.parquet"), prompt=["x"]), rules=rules)
    assert with_cells == without_cells
    assert [request.params for request in with_cells] == [SamplingParams(128, 72, 30, 6.0, 0.5)] * 2
    assert with_cells[0].negative_prompt == "blurry"


def test_cells_override_the_defaults() -> None:
    cells = {"height": 16, "width": 512, "num_inference_steps": 1000, "guidance_scale": 100, "guidance_rescale": 1}
    (request,) = read_requests(one_row(**cells, negative_prompt="dull", seed=2**63 - 1))
    assert request.params == SamplingParams(16, 512, 1000, 100.0, 1.0)
    assert (request.negative_prompt, request.seed) == ("dull", 2**63 - 1)


@pytest.mark.parametrize("text", ["11", "11.0", " 11 ", "1.1e1", "+11", "11." + 50 * "0"])
def test_whole_numbers(text: str) -> None:
    (request,) = read_requests(one_row(num_inference_steps=text))
    assert request.params.num_inference_steps == 11


@pytest.mark.parametrize("value", [11, 11.0, Decimal("11.00")], ids=repr)
def test_whole_numbers_of_any_type(value: Any) -> None:
    (request,) = read_requests(write_parquet(Path("t.parquet"), prompt=["x"], num_inference_steps=[value]))
    assert request.params.num_inference_steps == 11


WHOLE = ("seed", "height", "width", "num_inference_steps", "num_images_per_prompt")
REAL = ("guidance_scale", "guidance_rescale")
NOT_NUMBERS = ["ten", "-nan", "inf", "-inf", "sNaN", "1,5", "0x10", "--1", "true", "½", "1e99999999999999999999"]
NOT_WHOLE = ["2.5", "1e-3", "1e-999999999", "0.1" + 100 * "0" + "1", 40 * "9" + ".5"]
OUT_OF_RANGE = ["-2", str(10**23), "1e999999", "1e9999999", "-1e999999999", 5000 * "9"]


@pytest.mark.parametrize("text", [*NOT_NUMBERS, *NOT_WHOLE, *OUT_OF_RANGE], ids=lambda text: text[:20])
@pytest.mark.parametrize("field", WHOLE)
def test_invalid_whole_numbers(field: str, text: str) -> None:
    """The error names the column, shows the start of the cell and says what is wrong."""
    error = error_of(one_row(**{field: text}))
    assert re.fullmatch(rf"{field} '.{{1,40}}' is not (a whole number|within \d+ to \d+)", error)
    if text in OUT_OF_RANGE:
        assert "within" in error


@pytest.mark.parametrize("text", [*NOT_NUMBERS, *OUT_OF_RANGE], ids=lambda text: text[:20])
@pytest.mark.parametrize("field", REAL)
def test_invalid_real_numbers(field: str, text: str) -> None:
    error = error_of(one_row(**{field: text}))
    assert re.fullmatch(rf"{field} '.{{1,40}}' is not (a number|within 0 to 1(00)?)", error)


@pytest.mark.parametrize("value", [True, [1], b"11", datetime.date(2026, 1, 1)], ids=repr)
def test_invalid_numbers_in_parquet(value: Any) -> None:
    table = write_parquet(Path("t.parquet"), prompt=["x"], num_inference_steps=[value])
    assert "is not a whole number" in error_of(table)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("height", 13, "height '13' is not within 16 to 512"),
        ("height", 20, "height 20 is not a multiple of 8; the nearest is 16"),
        ("width", 100, "width 100 is not a multiple of 8; the nearest is 96"),
        ("width", 100_000, "width '100000' is not within 16 to 512"),
        ("height", 0, "height '0' is not within 16 to 512"),
        ("num_inference_steps", 0, "num_inference_steps '0' is not within 1 to 1000"),
        ("num_inference_steps", 1001, "num_inference_steps '1001' is not within 1 to 1000"),
        ("guidance_scale", 100.5, "guidance_scale '100.5' is not within 0 to 100"),
        ("guidance_rescale", 1.01, "guidance_rescale '1.01' is not within 0 to 1"),
        ("num_images_per_prompt", 0, "num_images_per_prompt '0' is not within 1 to 1000"),
        ("seed", 2**63, f"seed '{2**63}' is not within 0 to {2**63 - 1}"),
    ],
)
def test_values_that_no_model_accepts(field: str, value: Any, sentence: str) -> None:
    assert error_of(one_row(**{field: value})) == sentence


def test_sizes_follow_the_model() -> None:
    sizes = [{"height": 8 * k, "width": 8 * (66 - k)} for k in range(2, 65)]
    table = write_csv(Path("t.csv"), [["prompt", "height", "width"], *(["x", *size.values()] for size in sizes)])
    assert [request.params.height for request in read_requests(table)] == [size["height"] for size in sizes]


def test_all_errors_of_a_row_are_reported() -> None:
    error = error_of(one_row(height=13, seed="x", guidance_scale="y"))
    assert [part.split()[0] for part in error.split("; ")] == ["seed", "height", "guidance_scale"]


def test_defaults_obey_the_rules_for_rows() -> None:
    RULES.validate()
    with pytest.raises(SettingsError, match="num_inference_steps '0' is not within 1 to 1000; guidance_scale"):
        RowRules(RowDefaults(0, 101.0, 0.0, 64, 64), RULES.sizes, "f").validate()


# Seeds and fingerprints


def test_derived_seeds_are_stable_and_differ_between_rows() -> None:
    """These numbers must not change, since images of rows without a seed depend on them."""
    rows = [["a", "1"], ["b", "2"], ["c", "3"]]
    sorted_table = write_csv(Path("t.csv"), [["id", "prompt"], *rows])
    reversed_table = write_csv(Path("u.csv"), [["id", "prompt"], *rows[::-1]])
    first, second = ({item.id: item.seed for item in read_requests(t)} for t in (sorted_table, reversed_table))
    assert first == second == {"a": 1595580616, "b": 2832508741, "c": 1358304166}


def test_the_seed_option_changes_derived_seeds() -> None:
    table = write_csv(Path("t.csv"), [["prompt", "seed"], ["x", ""], ["y", "5"]])
    other = RowRules(RowDefaults(20, 5.0, 0.0, 64, 64, seed=1), RULES.sizes, "the run")
    first, second = (([item.seed for item in read_requests(table, rules=rules)]) for rules in (RULES, other))
    assert first[0] != second[0]
    assert first[1] == second[1] == 5
    assert max(first[0], second[0]) < 2**32


def test_image_k_has_seed_plus_k() -> None:
    rows = read_requests(one_row(seed=41, num_images_per_prompt=3))
    assert [(item.image_index, item.seed) for item in rows] == [(0, 41), (1, 42), (2, 43)]
    assert len({item.fingerprint for item in rows}) == 3


def test_seeds_that_would_overflow_are_refused() -> None:
    assert "is too large for 2 images" in error_of(one_row(seed=2**63 - 1, num_images_per_prompt=2))


def test_a_fingerprint_covers_only_what_determines_the_image() -> None:
    original = {"id": "a", "prompt": "x", "seed": 1}

    def fingerprint(rules: RowRules = RULES, **changes: Any) -> str:
        cells = {**original, **changes}
        (request,) = read_requests(write_csv(Path("t.csv"), [list(cells), list(cells.values())]), rules=rules)
        return request.fingerprint

    changed = [
        fingerprint(prompt="y"),
        fingerprint(seed=2),
        fingerprint(negative_prompt="y"),
        fingerprint(height=128),
        fingerprint(width=128),
        fingerprint(num_inference_steps=21),
        fingerprint(guidance_scale=6),
        fingerprint(guidance_rescale=0.5),
        fingerprint(RowRules(RULES.defaults, RULES.sizes, "another run")),
    ]
    assert len({fingerprint(), *changed}) == len(changed) + 1
    assert fingerprint() == fingerprint(id="b") == fingerprint(carried="c") == fingerprint(num_inference_steps="20.0")


# Contents of files


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\xef\xbb\xbfprompt,n\na,1\nb,2\n", id="byte order mark"),
        pytest.param(b"prompt,n\r\na,1\r\nb,2\r\n", id="CRLF"),
        pytest.param(b"prompt,n\ra,1\rb,2\r", id="CR"),
        pytest.param(b'"prompt","n"\n"a","1"\n"b","2"', id="quotes, and no newline at the end"),
        pytest.param(b"\n\nprompt,n\n\na,1\n\n\nb,2\n\n", id="blank lines"),
        pytest.param(b"n,prompt\n1,a\n2,b\n", id="any order"),
    ],
)
def test_variants_of_csv(content: bytes) -> None:
    rows = read_requests(write_bytes(Path("t.csv"), content))
    assert [(item.id, item.prompt, item.carried["n"]) for item in rows] == [
        ("t-00000000", "a", "1"),
        ("t-00000001", "b", "2"),
    ]


def test_newlines_commas_and_quotes_in_prompts() -> None:
    prompts = ["two\nlines", "two\r\nlines", "a, b", 'say "circle"', " spaces ", "名前 🎨 é"]
    table = write_csv(Path("t.csv"), [["prompt"], *([prompt] for prompt in prompts)])
    assert [request.prompt for request in read_requests(table)] == prompts


def test_a_long_prompt_is_read_in_full() -> None:
    prompt = "word " * 2_000
    assert read_requests(write_csv(Path("t.csv"), [["prompt"], [prompt]]))[0].prompt == prompt


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        pytest.param(b"caf\xe9,1,z", "column 'prompt' is not UTF-8: save the table as UTF-8", id="Latin-1 prompt"),
        pytest.param(b"y,1,caf\xe9", "column 'n' is not UTF-8: save the table as UTF-8", id="Latin-1 carried"),
        pytest.param(b"\xed\xa0\x80,1,z", "column 'prompt' is not UTF-8", id="a surrogate in UTF-8"),
        pytest.param(b"y,1,z,more", "line 3 has 4 cells, but the header has 3", id="too many cells"),
        pytest.param(b'"y"y,1,z', "line 3 cannot be read as CSV", id="text after a quote"),
        pytest.param(b"a\0b,1,z", "NUL", id="NUL"),
        pytest.param(b",1,z", "the prompt is empty", id="no prompt"),
        pytest.param(b" \t ,1,z", "the prompt is empty", id="a blank prompt"),
        pytest.param(b"y,one,z", "seed 'one' is not a whole number", id="a word for a number"),
        pytest.param(b"y,\xff,z", "column 'seed' is not UTF-8", id="a byte for a number"),
    ],
)
def test_a_bad_line_makes_only_its_row_invalid(line: bytes, sentence: str) -> None:
    table = write_bytes(Path("t.csv"), b"prompt,seed,n\nx,1,1\n" + line + b"\nz,3,3\n")
    first, bad, last = read(table)
    assert isinstance(bad, ResultRow)
    assert sentence in (bad.error or "")
    assert (bad.id, bad.source_row) == ("t-00000001", 1)
    assert isinstance(first, PromptRequest)
    assert isinstance(last, PromptRequest)
    assert (last.prompt, last.seed, last.id) == ("z", 3, "t-00000002")


def test_an_invalid_row_keeps_its_readable_cells() -> None:
    table = write_bytes(Path("t.csv"), b"id,prompt,n\nmine,caf\xe9,caf\xe9\n")
    (bad,) = read(table)
    assert isinstance(bad, ResultRow)
    assert (bad.id, bad.prompt, bad.carried) == (
        "mine",
        "caf\N{REPLACEMENT CHARACTER}",
        {"n": "caf\N{REPLACEMENT CHARACTER}"},
    )


@pytest.mark.parametrize("content", [b"caf\xe9", b"a\0b"], ids=["Latin-1", "NUL"])
def test_an_id_that_is_not_text_makes_its_row_invalid(content: bytes) -> None:
    first, last = read(write_bytes(Path("t.csv"), b"id,prompt\n" + content + b",x\nb,y\n"))
    assert isinstance(first, ResultRow)
    assert (first.id, last.id) == ("t-00000000", "b")


def test_a_short_row_leaves_its_last_cells_empty() -> None:
    (request,) = read_requests(write_bytes(Path("t.csv"), b"prompt,seed,n\nx\n"))
    assert request.carried == {"n": None}


@pytest.mark.parametrize(
    ("lines", "bad", "good"),
    [
        (['"y,2', "z,3", "z,4"], "line 3", ["z", "z"]),
        (['"y,2', "z,3", 'z,"4"'], "line 3", ["z", "z"]),
        (['"y,2', "z", '"two', 'lines",4', "z,5"], "lines 3 to 5", ["z"]),
        (['"y,2', "", "z,3"], "lines 3 to 4", ["z"]),
        (['"one', 'two" junk,2', "z,3"], "lines 3 to 4", ["z"]),
        (['"y,2'], "line 3", []),
        (["z,1", '"y,2', "z,3", '"y,4', "z,5"], "line 4", ["z", "z", "z"]),
    ],
)
def test_an_unclosed_quote_makes_only_its_row_invalid(lines: list[str], bad: str, good: list[str]) -> None:
    """Reading continues at the next line that is a complete row."""
    content = "\n".join(["prompt,n", "x,1", *lines, ""])
    rows = read(write_bytes(Path("t.csv"), content.encode()))
    invalid = [item for item in rows if isinstance(item, ResultRow)]
    assert re.match(rf"{bad} cannot be read as CSV: .*; is there an unclosed quote\?", invalid[0].error or "")
    prompts = [item.prompt for item in rows if isinstance(item, PromptRequest)]
    assert [prompt for prompt in prompts[1:] if prompt == "z"] == good
    assert [item.source_row if isinstance(item, ResultRow) else item.source.row for item in rows] == list(
        range(len(rows))
    )


def test_in_one_column_lines_are_rows_only_below_a_quote_that_never_closes() -> None:
    first, bad, *rest = read(write_bytes(Path("t.csv"), b'prompt\nx\n"y\nz\nz\n'))
    assert isinstance(bad, ResultRow)
    assert [item.prompt for item in (first, *rest)] == ["x", "z", "z"]
    bad, last = read(write_bytes(Path("u.csv"), b'prompt\n"a poem\nof red circles\nends" here\nz\n'))
    assert isinstance(bad, ResultRow)
    assert "lines 2 to 4" in (bad.error or "")
    assert last.prompt == "z"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "t.csv is empty"),
        (b"\n\r\n", "t.csv is empty"),
        ("prompt\nx\n".encode("utf-16"), "t.csv is UTF-16; save it as UTF-8"),
        ("prompt\nx\n".encode("utf-16-be"), "t.csv has no column 'prompt'"),
        ("prompt,größe\nx,1\n".encode("latin-1"), "t.csv has a header that is not UTF-8; save it as UTF-8"),
        (b"some text\nmore\n", "t.csv has no column 'prompt'; it has 'some text'"),
    ],
    ids=["empty", "blank", "UTF-16", "UTF-16 without a mark", "Latin-1 header", "no table"],
)
def test_unreadable_files(content: bytes, sentence: str) -> None:
    with pytest.raises(TableError, match=sentence):
        open_tables(write_bytes(Path("t.csv"), content))


def test_a_header_alone_is_a_table_without_rows() -> None:
    assert read(write_bytes(Path("t.csv"), b"prompt,seed\n")) == []
    assert read(write_parquet(Path("t.parquet"), prompt=pa.array([], pa.string()))) == []


def test_an_unreadable_file_is_one_invalid_result() -> None:
    write_csv(Path("t/a.csv"), [["prompt"], ["x"]])
    write_bytes(Path("t/b.parquet"), write_parquet(Path("whole.parquet"), prompt=["y"] * 100).read_bytes()[:-10])
    write_csv(Path("t/c.csv"), [["caption"], ["z"]])
    write_csv(Path("t/d.csv"), [["prompt"], ["x"]])
    first, truncated, missing_column, last = read("t")
    assert (first.id, truncated.id, missing_column.id, last.id) == tuple(f"{stem}-00000000" for stem in "abcd")
    assert isinstance(truncated, ResultRow)
    assert re.match("t/b.parquet cannot be read: ", truncated.error or "")
    assert isinstance(missing_column, ResultRow)
    assert "t/c.csv has no column 'prompt'" in (missing_column.error or "")


def test_if_no_file_can_be_read_all_are_reported() -> None:
    tables = [write_bytes(Path("a.parquet"), b"PAR1 and so on"), write_bytes(Path("b.csv"), b"")]
    with pytest.raises(TableError, match=r"a.parquet cannot be read: .* · b.csv is empty"):
        open_tables(*tables)


def write_groups(path: Path) -> Path:
    """Write a Parquet file of three row groups of 2000 rows."""
    schema = pa.schema([("prompt", pa.string())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for group in range(3):
            writer.write_table(pa.table({"prompt": [f"prompt {group}-{i}" for i in range(2000)]}))
    return path


def test_a_damaged_parquet_row_group_leaves_the_others_readable() -> None:
    path = write_groups(Path("t.parquet"))
    content = bytearray(path.read_bytes())
    second = pq.read_metadata(path).row_group(1).column(0)
    start = second.data_page_offset
    content[start : start + second.total_compressed_size] = bytes(second.total_compressed_size)
    path.write_bytes(content)
    rows = read(path)
    bad = [item for item in rows if isinstance(item, ResultRow)]
    assert [item.source_row for item in bad] == [*range(2000, 4000)]
    assert [item.id for item in bad][::1999] == ["t-00002000", "t-00003999"]
    for item in bad:
        assert re.match("rows 2000 to 3999, in row group 1, cannot be read: ", item.error or "")
    good = [item for item in rows if isinstance(item, PromptRequest)]
    assert [item.source.row for item in good] == [*range(2000), *range(4000, 6000)]
    assert len({item.key for item in rows}) == len(rows)


def zigzag(number: int) -> bytes:
    """Encode an integer as Thrift's compact protocol does."""
    number, digits = (number << 1) ^ (number >> 63), []
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def test_every_row_that_a_damaged_footer_counts_is_accounted_for() -> None:
    """From many such files, Arrow silently reads fewer rows than the footer counts."""
    path = write_groups(Path("t.parquet"))
    content = path.read_bytes()
    footer = slice(-8 - int.from_bytes(content[-8:-4], "little"), -8)
    whole, after = content[footer], content[footer.stop :]
    offsets = [match.start() for count in (2000, 6000) for match in re.finditer(re.escape(zigzag(count)), whole)]
    seen = set()
    for offset in offsets:
        for count in (0, 1999, 5000, 10**12, 2**62, -5):
            damaged = whole[:offset] + zigzag(count) + whole[offset + 2 :]
            path.write_bytes(content[: footer.start] + damaged + len(damaged).to_bytes(4, "little") + after[4:])
            metadata = pq.read_metadata(path)
            groups = [metadata.row_group(group).num_rows for group in range(3)]
            counted = max(metadata.num_rows, sum(count for count in groups if 0 <= count < 10_000))
            rows = read(path)
            assert len({item.key for item in rows}) == len(rows)
            bad = [item.error or "" for item in rows if isinstance(item, ResultRow)]
            errors = (re.sub("[0-9]+", "N", error) for error in bad)
            seen |= {re.sub("(?<=counts -N rows in it; ).+", "...", error) for error in errors}  # in Arrow's words
            if len(rows) != counted:
                assert any(f"counts {number} rows" in error for error in bad for number in (metadata.num_rows, *groups))
            for number in groups:
                assert 0 <= number < 10_000 or any(f"counts {number} rows in it" in error for error in bad)
    assert seen == {
        "rows N to N, in row group N, cannot be read: it has fewer rows than the footer counts",
        "row group N is damaged: the footer counts N rows in it; it has fewer rows than the footer counts",
        "row group N is damaged: the footer counts -N rows in it; ...",
        "the footer is damaged: it counts N rows, and its row groups N",
    }


UNREADABLE = Path("/proc/self/mem")
"""A file that can be opened, but reading its first byte raises EIO."""


@pytest.mark.skipif(not UNREADABLE.exists(), reason="only Linux has a file that raises EIO")
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "txt", "csv.gz", "jsonl.zst", "txt.bz2", "csv.xz"])
@pytest.mark.parametrize("when", ["before opening", "after opening", "removed after opening"])
def test_a_failing_disk_makes_no_row_invalid(suffix: str, when: str) -> None:
    """The file may be intact, so the same command can read it when the disk works again."""
    path = write_bytes(Path(f"t/t.{suffix}"), in_format(suffix, [{"prompt": "x"}]))
    write_csv(Path("t/good.csv"), [["prompt"], ["x"]])
    sentence = "cannot read t/t.*: .*; run the same command again to continue"
    with ExitStack() as stack:
        if when != "before opening":
            tables = stack.enter_context(open_tables("t"))
        path.unlink()
        if when != "removed after opening":
            path.symlink_to(UNREADABLE)
        with pytest.raises(StorageError, match=sentence):
            list((open_tables("t") if when == "before opening" else tables).read_rows(RULES))


@pytest.mark.parametrize("call", ["read_schema", "iter_batches"])
def test_a_failing_disk_makes_no_parquet_row_invalid(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*rest: Any, **options: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    write_parquet(Path("t/t.parquet"), prompt=["x"])
    monkeypatch.setattr(pq if call == "read_schema" else pq.ParquetFile, call, fail)
    with pytest.raises(StorageError, match=r"cannot read t/t.parquet: Input/output error; run the same"):
        read("t")


def test_a_folder_on_a_failing_disk_makes_no_row_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(Path("t/a/t.csv"), [["prompt"], ["x"]])
    write_csv(Path("t/b/t.csv"), [["prompt"], ["x"]])
    scandir = os.scandir

    def fail(path: Any) -> Any:
        if str(path).endswith("t/b"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(StorageError, match="cannot read t/b: Input/output error; run the same"):
        read("t")


def test_text_in_parquet_that_is_not_utf_8_makes_only_its_row_invalid() -> None:
    """Arrow does not check that strings in Parquet are UTF-8."""
    data = pa.array([b"one", b"caf\xe9", b"three"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, data.buffers())
    for columns in ({"prompt": text}, {"prompt": ["1", "2", "3"], "carried": text}):
        first, bad, last = read(write_parquet(Path("t.parquet"), **columns))
        assert isinstance(bad, ResultRow)
        assert "UTF-8" in (bad.error or "").replace("utf-8", "UTF-8")
        assert (bad.id, bad.source_row) == ("t-00000001", 1)
        assert isinstance(first, PromptRequest)
        assert isinstance(last, PromptRequest)


def test_a_date_without_a_python_type_can_be_an_id() -> None:
    when = pa.array([0, 2**60], pa.timestamp("us"))
    rows = read_requests(write_parquet(Path("t.parquet"), prompt=["x", "y"], id=when))
    assert [request.id for request in rows] == [
        "1970-01-01 00:00:00",
        "1152921504606846976 us since 1970-01-01 00:00:00",
    ]


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (7, "prompt '7' is not text but int"),
        (["x"], r"prompt .* is not text but list"),
        (True, "prompt 'True' is not text but bool"),
        (b"caf\xe9", "prompt is not UTF-8"),
        (None, "the prompt is empty"),
        ("", "the prompt is empty"),
    ],
    ids=repr,
)
def test_prompts_in_parquet_that_are_not_text(prompt: Any, sentence: str) -> None:
    assert re.match(sentence, error_of(write_parquet(Path("t.parquet"), prompt=[prompt])))


def test_bytes_in_parquet_can_be_text() -> None:
    table = write_parquet(Path("t.parquet"), prompt=["été".encode()], negative_prompt=[b"dull"])
    assert [(item.prompt, item.negative_prompt) for item in read_requests(table)] == [("été", "dull")]


# Arbitrary tables

cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
tables = st.integers(1, 5).flatmap(
    lambda width: st.tuples(
        st.lists(cells.filter(bool), min_size=width, max_size=width, unique=True),
        st.lists(st.lists(cells, min_size=width, max_size=width), max_size=8),
    )
)
WRITERS: list[dict[str, Any]] = [
    {},
    {"lineterminator": "\n", "quoting": csv.QUOTE_ALL},  # otherwise the writer does not quote a carriage return
    {"quoting": csv.QUOTE_NONNUMERIC, "lineterminator": "\r"},
]
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(tables, st.sampled_from(WRITERS))
def test_rows_of_a_csv_writer_are_read_back(table: tuple[list[str], list[list[str]]], form: dict[str, Any]) -> None:
    names, rows = table
    header = ["prompt", *(f"carried {name}" for name in names)]
    path = write_csv(Path("t.csv"), [header, *(["x", *row] for row in rows)], **form)
    assert [list(item.carried.values()) for item in read_requests(path)] == rows


@relaxed
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(b"prompt,id,seed\n".__add__)))
@example(b'prompt,id\n"a\nb,c\n')
@example(b"prompt,id\n\xff,\xff\n\xff,\xff\n")
@example(b"prompt\n\0\n")
def test_any_bytes_give_rows_or_a_table_error(content: bytes) -> None:
    """Every row is a request or an invalid result with a unique key."""
    path = write_bytes(Path("t.csv"), content)
    try:
        rows = read(path)
    except TableError as error:
        assert "t.csv" in str(error)
        return
    assert len({item.key for item in rows}) == len(rows)
    for item in rows:
        assert "".join(filter(None, [item.id, item.prompt, getattr(item, "error", None)])).encode()


@relaxed
@given(st.data())
def test_any_damage_to_a_parquet_file_gives_rows_or_a_table_error(data: st.DataObject) -> None:
    content = bytearray(write_parquet(Path("t.parquet"), prompt=["x", "y"], seed=[1, 2]).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = write_bytes(Path("t.parquet"), bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        rows = read(path)
    except TableError as error:
        assert "t.parquet" in str(error)
        return
    assert len({item.key for item in rows}) == len(rows)


def test_a_column_without_a_name_is_not_a_field(tmp_path: Path) -> None:
    """pandas writes its index without a name. `--column seed=` means that no column contains the seed."""
    table = write_csv(tmp_path / "t.csv", [["", "prompt"], ["7", "a red circle"]])
    (row,) = read_requests(table, columns={"seed": ""})
    assert row.seed != 7
    assert row.carried == {"unnamed_0": "7"}


@pytest.mark.parametrize("cell", ["NaN", "nan", "NA", "n/a", "NULL", "null", "None", r"\N", "#N/A", "<NA>", "  ", "\t"])
def test_a_missing_number_takes_the_default(cell: str) -> None:
    """Databases, spreadsheets and pandas write these cells. In a text field they are text."""
    numbers = [field for field in FIELDS if field not in ("prompt", "id", "negative_prompt")]
    write_csv(Path("t.csv"), [["prompt", "negative_prompt", *numbers], ["x", "", *[""] * 7], ["x", "", *[cell] * 7]])
    first, second = read_requests("t.csv")
    assert first.params == second.params
    if cell.strip():
        write_csv(Path("t.csv"), [["id", "prompt", "negative_prompt", "tag"], [cell] * 4])
        (request,) = read_requests("t.csv")
        assert (request.id, request.prompt, request.negative_prompt, request.carried) == (
            cell,
            cell,
            cell,
            {"tag": cell},
        )


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ({"id": "a\0b"}, "the id contains a NUL byte"),
        ({"id": "a\ud83d"}, "the id contains a lone surrogate, which is half a character: write whole characters"),
        ({"prompt": "a\ud83d"}, "column 'prompt' contains a lone surrogate"),
        ({"tag": "a\ud83d"}, "column 'tag' contains a lone surrogate"),
    ],
    ids=str,
)
def test_text_that_is_not_unicode_is_described(cells: dict[str, str], sentence: str) -> None:
    table = write_bytes(Path("t.jsonl"), json.dumps({"prompt": "x", **cells}).encode())
    assert error_of(table).startswith(sentence)


@pytest.mark.parametrize(
    ("header", "field", "column"),
    [
        (["prompt", "Seed"], "seed", "Seed"),
        (["prompt", "steps"], "num_inference_steps", "steps"),
        (["prompt", "Num Inference-Steps"], "num_inference_steps", "Num Inference-Steps"),
        (["prompt", "cfg"], "guidance_scale", "cfg"),
        (["prompt", "CFG scale"], "guidance_scale", "CFG scale"),
        (["prompt", "negative"], "negative_prompt", "negative"),
        (["prompt", "w"], "width", "w"),
        (["prompt", "heigth"], "height", "heigth"),
        (["prompt", "images_per_prompt"], "num_images_per_prompt", "images_per_prompt"),
        (["prompt", "ID"], "id", "ID"),
    ],
)
def test_a_column_whose_name_resembles_a_field_is_carried_with_a_notice(
    header: list[str], field: str, column: str
) -> None:
    write_csv(Path("t.csv"), [header, ["x", "2"]])
    (notice,) = open_tables("t.csv").notices
    option = f"{field}={column}"
    advice = f"if it is the {field}, add --column {shlex.quote(option)}"
    assert notice == f"t.csv: column {column!r} is carried and has no effect; {advice}"
    assert not open_tables("t.csv", columns={field: ""}).notices
    assert not open_tables("t.csv", columns={field: column}).notices
    assert list(read_requests("t.csv")[0].carried.values()) == ["2"]


@pytest.mark.parametrize(
    "header",
    [
        ["prompt", "seed", "Seed"],
        ["prompt", "caption", "text", "Prompt"],
        ["prompt", "num_inference_steps", "steps"],
        ["prompt", "weight", "tag", "night", "depth", "step", "image_id", "label", "id_hash"],
    ],
    ids=str,
)
def test_other_carried_columns_have_no_notice(header: list[str]) -> None:
    write_csv(Path("t.csv"), [header, ["1"] * len(header)])
    assert not open_tables("t.csv").notices


def test_shards_with_one_header_have_one_notice() -> None:
    for name in "abc":
        write_csv(Path(f"t/{name}.csv"), [["prompt", "steps"], ["x", "2"]])
    (notice,) = open_tables("t").notices
    assert notice.startswith("t/a.csv and 2 more: column 'steps'")


def test_empty_bytes_are_an_empty_cell(tmp_path: Path) -> None:
    table = pa.table({"id": [b"", b""], "prompt": ["x", "y"], "negative_prompt": [b"", b"dull"]})
    pq.write_table(table, tmp_path / "t.parquet")
    rows = read_requests(tmp_path / "t.parquet")
    assert [(row.id, row.negative_prompt) for row in rows] == [("t-00000000", None), ("t-00000001", "dull")]
