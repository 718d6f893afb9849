"""Table formats: every format gives the same rows as a CSV, and damage makes as few rows invalid as possible."""

from __future__ import annotations

import gzip
import json
import re
import tracemalloc
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from batch_infer.errors import TableError
from batch_infer.records import PromptRequest, ResultRow
from batch_infer.table import scanner, streams
from batch_infer.table.scanner import Scanner
from tests.tables import (
    ROWS,
    RULES,
    comparable_rows,
    compress,
    error_of,
    in_format,
    open_tables,
    read,
    read_requests,
    write_bytes,
    write_csv,
)

TEXT = ("csv", "tsv", "jsonl", "ndjson", "json", "txt")
FORMATS = (*TEXT, "parquet")
COMPRESSIONS = ("", ".gz", ".bz2", ".xz", ".zst")


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, content: str | bytes | Any) -> Path:
    """Write a file of text or bytes. Any other value is written as JSON."""
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    return write_bytes(Path(name), content.encode() if isinstance(content, str) else content)


def errors_of(rows: list[PromptRequest | ResultRow]) -> list[str | None]:
    return [item.error if isinstance(item, ResultRow) else None for item in rows]


def refusal_of(path: Path | str, **options: Any) -> str:
    with pytest.raises(TableError) as exc_info:
        open_tables(path, **options)
    return str(exc_info.value)


# Equal tables in every format


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", [*(name for name in FORMATS if name != "txt"), "pq", "parq"])
def test_every_format_gives_the_same_rows_as_a_csv(suffix: str, compression: str) -> None:
    expected = comparable_rows(read_requests(write("t.csv", in_format("csv", ROWS))))
    content = in_format(suffix + compression, ROWS)
    for name in (f"lower/t.{suffix}{compression}", f"upper/t.{suffix.upper()}{compression.upper()}"):
        assert comparable_rows(read_requests(write(name, content))) == expected


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_plain_text_has_one_prompt_per_line(compression: str) -> None:
    rows = [{"prompt": "a red circle"}, {"prompt": " two, three "}, {"prompt": 'say "é"'}]
    expected = comparable_rows(read_requests(write("t.csv", in_format("csv", rows))))
    content = in_format("txt", rows).replace(b"\n", b"\r\n\r\n  \n")
    content = compress(compression[1:], content) if compression else content
    items = read_requests(write(f"t.txt{compression}", content), columns={"prompt": "caption"})
    assert comparable_rows(items) == expected


def test_a_line_of_plain_text_that_is_not_utf_8_makes_only_its_row_invalid() -> None:
    rows = read(write("t.txt", b"one\ncaf\xe9\nthree"))
    assert errors_of(rows) == [None, "column 'prompt' is not UTF-8: save the table as UTF-8", None]


@pytest.mark.parametrize("suffix", TEXT)
def test_a_byte_order_mark_is_skipped(suffix: str) -> None:
    content = b"\xef\xbb\xbf" + in_format(suffix, [{"prompt": "x"}])
    assert [item.prompt for item in read_requests(write(f"t.{suffix}", content))] == ["x"]
    assert [item.prompt for item in read_requests(write(f"t.{suffix}.gz", gzip.compress(content)))] == ["x"]


@pytest.mark.parametrize("suffix", TEXT)
def test_utf_16_is_refused_with_advice(suffix: str) -> None:
    content = in_format(suffix, [{"prompt": "x"}]).decode().encode("utf-16")
    assert refusal_of(write(f"t.{suffix}", content)) == (
        f"t.{suffix} is UTF-16; save it as UTF-8, or convert it: iconv -f UTF-16 -t UTF-8"
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.jsonl", "{}\n[1]\n", "line 2 is not a JSON object but list"),
        ("t.json", "[{}, 5]", "element 1 is neither an object nor a prompt but int"),
    ],
)
def test_a_file_of_empty_and_unreadable_rows_is_refused_with_the_reason(name: str, content: str, reason: str) -> None:
    assert refusal_of(write(name, content)) == f"{name} cannot be read: {reason}"


@pytest.mark.parametrize("suffix", TEXT)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_an_empty_file_is_refused(suffix: str, compression: str) -> None:
    assert refusal_of(write(f"t.{suffix}{compression}", b"")) == f"t.{suffix}{compression} is empty"


# Compressed files


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", "zst"])
def test_a_compressed_file_may_have_several_parts(compression: str) -> None:
    content = compress(compression, b"prompt\nx\n") + compress(compression, b"y\n")
    assert [item.prompt for item in read_requests(write(f"t.csv.{compression}", content))] == ["x", "y"]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(("compression", "name"), [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz"), ("zst", "zstd")])
def test_a_file_with_the_wrong_compression_suffix_is_refused(suffix: str, compression: str, name: str) -> None:
    path = write(f"t.{suffix}.{compression}", in_format(suffix, [{"prompt": "x"}]))
    assert refusal_of(path) == f"t.{suffix}.{compression} cannot be read: it is not {name}"


@pytest.mark.parametrize("suffix", TEXT)
def test_a_truncated_gzip_file_gives_the_rows_before_its_end(suffix: str) -> None:
    rows = [{"prompt": f"prompt {i} {i**9}"} for i in range(2000)]
    whole = in_format(f"{suffix}.gz", rows)
    items = read(write(f"t.{suffix}.gz", whole[: len(whole) // 2]))
    assert errors_of(items)[-1] == "the file breaks off here: the gzip stream is cut off"
    assert all(isinstance(item, PromptRequest) for item in items[:-1])
    assert 700 < len(items) < 1300
    assert [item.prompt for item in items[:-1]] == [row["prompt"] for row in rows[: len(items) - 1]]


@pytest.mark.parametrize("compression", ["bz2", "xz"])
def test_a_truncated_file_of_compressed_blocks_gives_the_rows_before_its_end(compression: str) -> None:
    """The blocks before the damage are complete, since they are compressed separately."""
    rows = "".join(f"prompt {i}\n" for i in range(100)).encode()
    whole = compress(compression, b"prompt\n" + rows) + compress(compression, rows)
    items = read(write(f"t.csv.{compression}", whole[:-20]))
    name = {"bz2": "bzip2"}.get(compression, compression)
    assert errors_of(items)[-1] == f"the file breaks off here: the {name} stream is cut off"
    assert [item.prompt for item in items[:100]] == [f"prompt {i}" for i in range(100)]
    assert not any(errors_of(items[:-1]))


def test_a_truncated_zstd_file_gives_the_rows_before_its_end() -> None:
    whole = in_format("csv.zst", [{"prompt": f"prompt {i} {i**9}"} for i in range(30_000)])
    rows = read(write("t.csv.zst", whole[:-100]))
    assert "breaks off here" in (errors_of(rows)[-1] or "")
    assert len(rows) > 10_000


def test_a_damaged_checksum_loses_no_row() -> None:
    whole = bytearray(in_format("csv.gz", [{"prompt": "x"}] * 3))
    whole[-6] ^= 1
    assert [bool(error) for error in errors_of(read(write("t.csv.gz", bytes(whole))))] == [False] * 3 + [True]


def test_a_truncated_parquet_file_in_gzip_is_refused() -> None:
    whole = in_format("parquet.gz", ROWS)
    assert "t.parquet.gz cannot be read: the gzip stream is cut off" in refusal_of(write("t.parquet.gz", whole[:-20]))


# CSV and TSV


@pytest.mark.parametrize("separator", [";", "\t", "|"])
@pytest.mark.parametrize("quoted", [False, True])
def test_the_separator_is_detected_from_the_header(separator: str, quoted: bool) -> None:
    """Excel writes semicolons in German. Commas are then part of the text."""
    form = {"delimiter": separator, "quoting": int(quoted)}
    table = write_csv(Path("t.csv"), [["seed", "prompt", "n,m"], [1, "a red, round circle", "x"]], **form)
    (row,) = read_requests(table)
    assert (row.seed, row.prompt, row.carried) == (1, "a red, round circle", {"n,m": "x"})


def test_the_comma_is_tried_first() -> None:
    (row,) = read_requests(write("t.csv", "prompt,a;prompt;b\nx;y,z\n"))
    assert row.prompt == "x;y"


def test_a_renamed_prompt_column_decides_the_separator() -> None:
    (row,) = read_requests(write("t.csv", "caption;prompt\nx;y\n"), columns={"prompt": "caption"})
    assert row.prompt == "x"


def test_tsv_is_separated_by_tabs_only() -> None:
    assert refusal_of(write("t.tsv", "prompt,seed\nx,1\n")) == (
        "t.tsv has no column 'prompt'; its columns seem to be separated by ',': save it as .csv, or as Parquet"
    )


def test_a_header_without_prompts_is_refused_with_its_columns() -> None:
    assert refusal_of(write("t.csv", "caption;seed\nx;1\n")).endswith(
        "it has 'caption', 'seed'; name one with --column prompt=NAME"
    )
    assert refusal_of(write("t.csv", '"Prompt"|"seed"\n')).endswith("try --column prompt=Prompt")
    assert refusal_of(write("t.csv", "Caption\nx\n"), columns={"prompt": "caption"}).endswith(
        "try --column prompt=Caption"
    )


def test_too_many_cells_with_another_separator() -> None:
    assert error_of(write("t.csv", "prompt;seed\na; b;1;2\n")) == (
        "line 2 has 4 cells, but the header has 2; quote cells that contain semicolons"
    )


def test_columns_without_a_name_are_named_by_position() -> None:
    """Trailing commas in spreadsheets and the index of pandas produce such columns."""
    (row,) = read_requests(write("t.csv", ",prompt,,unnamed_2,\n7,x,,mine,\n"))
    assert row.carried == {"unnamed_0": "7", "unnamed_2_": "", "unnamed_2": "mine", "unnamed_4": ""}


def notices_of(path: Path | str, **options: Any) -> list[str]:
    """Return the notices about a table and its rows."""
    with open_tables(path, **options) as tables:
        list(tables.read_rows(RULES))
        return tables.notices


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_rows_that_contain_only_separators_are_skipped_and_counted(suffix: str) -> None:
    """Spreadsheets write them below a table. They still count in the numbers, and so in the ids, of later rows."""
    text = "prompt,seed,tag\nx,1,\n,,\n\n,,\ny,2,\n,,,,,\n"
    table = write(f"t.{suffix}", text.replace(",", "\t") if suffix == "tsv" else text)
    assert [(item.id, item.seed) for item in read_requests(table)] == [("t-00000000", 1), ("t-00000003", 2)]
    assert len(read(table, limit=2)) == 2
    assert notices_of(table) == [f"rows without any value, which are skipped: 3 (first: t.{suffix}, line 3)"]


def test_a_row_of_one_empty_cell_is_not_skipped() -> None:
    """pandas writes an empty prompt like this."""
    rows = read(write("t.csv", 'prompt\nx\n""\ny\n'))
    assert errors_of(rows) == [None, "the prompt is empty", None]


def test_rows_with_fewer_cells_than_the_header_are_counted() -> None:
    """Spreadsheets omit empty cells at the end of a row. A row that was split in two is also short."""
    table = write("t.csv", "prompt,seed,height,tag\nw,1,64,\nx,1\ny\nz,3,,\n")
    rows = read_requests(table)
    assert [(item.prompt, item.seed) for item in rows if item.seed in (1, 3)] == [("w", 1), ("x", 1), ("z", 3)]
    assert rows[1].carried == {"tag": None}
    (notice,) = notices_of(table)
    assert notice == (
        "rows with fewer cells than there are columns, whose missing cells take their defaults: 2 "
        "(first: t.csv, line 3: 2 of 4 cells, without 'height', 'tag')"
    )
    payload = {"columns": ["prompt", "seed"], "data": [["x", 1], ["y"], "z", {"prompt": "u"}]}
    assert notices_of(write("t.json", payload)) == [
        "rows with fewer cells than there are columns, whose missing cells take their defaults: 1 "
        "(first: t.json, row 1: 1 of 2 cells, without 'seed')"
    ]


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;", "sep=|", "sep=\t", "sep=,", "sep=:"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_first_line_may_declare_the_separator(first: str, end: str) -> None:
    """Excel writes such a line. The header alone would suggest another separator."""
    mark = first.strip('"')[4]
    lines = [first, f"prompt{mark}tag", f"x{mark}1", f'"y{mark}"{mark}2', f"z{mark}{mark}{mark}3"]
    for suffix in ("csv", "tsv"):
        first_row, second, bad = read(write(f"t.{suffix}", end.join([*lines, ""])))
        assert isinstance(first_row, PromptRequest)
        assert (first_row.prompt, first_row.carried, first_row.source.line) == ("x", {"tag": "1"}, 3)
        assert (second.prompt, second.carried) == (f"y{mark}", {"tag": "2"})
        assert (errors_of([bad])[0] or "").startswith("line 5 has 4 cells, but the header has 2; quote cells that")


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_carried_columns_with_the_same_name_are_renamed(suffix: str) -> None:
    if suffix == "csv":
        table = write("t.csv", "tag,prompt,tag,tag_2,tag\n1,x,2,3,4\n")
    elif suffix == "json":
        table = write("t.json", {"columns": ["tag", "prompt", "tag", "tag_2", "tag"], "data": [list("1x234")]})
    else:
        table = Path("t.parquet")
        pq.write_table(
            pa.Table.from_arrays([[cell] for cell in "1x234"], ["tag", "prompt", "tag", "tag_2", "tag"]), table
        )
    (row,) = read_requests(table)
    assert row.carried == {"tag": "1", "tag_3": "2", "tag_2": "3", "tag_4": "4"}
    assert notices_of(table) == [
        f"t.{suffix} has columns with the same name: "
        "another 'tag' is carried as 'tag_3', another 'tag' is carried as 'tag_4'"
    ]


def test_a_duplicate_field_is_refused_unless_it_is_carried() -> None:
    table = write("t.csv", "prompt,seed,seed\nx,1,2\n")
    assert refusal_of(table) == "t.csv has two columns named 'seed'; rename one"
    assert refusal_of(table, columns={"guidance_scale": "seed"}) == "t.csv has two columns named 'seed'; rename one"
    (row,) = read_requests(table, columns={"seed": ""})
    assert row.carried == {"input_seed": "1", "seed_2": "2"}


@pytest.mark.parametrize(
    "line",
    ["# prompts of May", "// a comment", "a cat --steps 20", "--prompt a cat", "a cat --ar 16:9", "a cat -s50 -W512"],
)
def test_comments_and_options_in_plain_text_are_rendered_with_a_notice(line: str) -> None:
    prompts = ["a well-known cat -- sitting", line, "an n-1 -5 degrees - a"]
    table = write("t.txt", "\n".join(["", *prompts]))
    assert [(item.prompt, item.source.line) for item in read_requests(table)] == list(
        zip(prompts, (2, 3, 4), strict=True)
    )
    (notice,) = notices_of(table)
    assert notice.startswith("lines of .txt files that look like comments or options and are rendered word for word (")
    assert notice.endswith(f"): 1 (first: t.txt, line 3: {line!r})")


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "jsonl", "txt"])
def test_a_row_in_a_text_format_has_a_line_number(suffix: str) -> None:
    """It is the line number that an editor shows. `source_row` counts rows from 0."""
    base = suffix.partition(".")[0]
    lines = in_format(base, [{"prompt": "x"}, {"prompt": "y\0"}, {"prompt": "z"}]).replace(b"\r\n", b"\n").splitlines()
    content = b"\n".join([lines[0], b"", *lines[1:], b""])
    rows = read(write(f"t.{suffix}", compress("gz", content) if suffix.endswith("gz") else content))
    first = 3 if base == "csv" else 1
    assert [str(item.source) for item in rows] == [
        f"t.{suffix}, line {line}" for line in (first, *((4, 5) if base == "csv" else (3, 4)))
    ]
    assert [item.source.row for item in rows] == [0, 1, 2]


def test_a_row_in_parquet_has_a_row_number() -> None:
    (row,) = read(write("t.parquet", in_format("parquet", [{"prompt": "x"}])))
    assert str(row.source) == "t.parquet, row 0"


def test_empty_cells_beyond_the_header_are_ignored() -> None:
    first, second, third = read(write("t.csv", "prompt\nx,,,\ny\nz,,1\n"))
    assert isinstance(first, PromptRequest)
    assert isinstance(second, PromptRequest)
    assert errors_of([third]) == ["line 4 has 3 cells, but the header has 1; quote cells that contain commas"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "txt"])
def test_a_line_that_is_too_long_makes_only_its_row_invalid(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_ROW_SIZE", 1000)
    content = in_format(suffix, [{"prompt": "x"}, {"prompt": "y" * 5000}, {"prompt": "z"}])
    first, bad, last = read(write(f"t.{suffix}", content))
    assert isinstance(first, PromptRequest)
    assert errors_of([bad]) == [f"line {3 if suffix == 'csv' else 2} is longer than 1000 characters"]
    assert isinstance(last, PromptRequest)
    assert (last.prompt, last.source.row) == ("z", 2)


@pytest.mark.parametrize("width", [2, 40])
def test_a_row_of_many_lines_has_the_limit_of_one_line(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit does not depend on the length of cells, and lines within the row are not read as rows."""
    monkeypatch.setattr(streams, "MAX_ROW_SIZE", 1000)
    header = ",".join(["prompt", *(f"c{k}" for k in range(1, width))])
    good = ",".join(["x", *["y"] * (width - 1)])
    cells = ",".join(['"' + "word\n" * (20_000 // 5 // width) + '"'] * width)
    first, bad, last = read(write("t.csv", f"{header}\n{good}\n{cells}\n{good}\n"))
    assert isinstance(first, PromptRequest)
    assert errors_of([bad]) == [
        f"lines 3 to {3 + cells.count(chr(10))} are a row of more than 1000 characters; is there an unclosed quote?"
    ]
    assert isinstance(last, PromptRequest)
    assert (last.prompt, last.source.row) == ("x", 2)


@pytest.mark.parametrize("closes", [True, False])
def test_rows_below_a_quote_that_is_closed_much_later_are_read(closes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_ROW_SIZE", 1000)
    good = "".join(f"{k},y\n" for k in range(500))
    text = 'prompt,tag\n"open,y\n' + "prose\n" * 500 + good + 'closed",y\n' * closes
    bad, *rest = read(write("t.csv", text))
    assert errors_of([bad]) == ["lines 2 to 502 are a row of more than 1000 characters; is there an unclosed quote?"]
    assert [item.prompt for item in rest][:500] == [f"{k}" for k in range(500)]
    assert len(rest) == 500 + closes


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ('a,"never closed\nr0,p0\nr1,p1\nz,GIANT\nb,ok\n', ["2 unclosed", "r0 p0 3", "r1 p1 4", "5 long", "b ok 6"]),
        ('a,"never closed\nz,GIANT\nb,ok\n', ["2 unclosed", "3 long", "b ok 4"]),
        ('a,"never closed\nz,GIANT', ["2 unclosed", "3 long"]),
        ('a,"never closed\nz,GIANT\ny,"GIANT"\nb,"ok"\n', ["2 unclosed", "3 long", "4 long", "b ok 5"]),
        ('a,"begin\nGIANT\nmiddle, words\nend"\nb,ok\n', ["2-5 long 3", "b ok 6"]),
        ('a,"begin\nGIANT""GIANT\nGIANT\nmiddle, words\nend"\nb,ok\n', ["2-6 long 3", "b ok 7"]),
        ('a,"GIANT\nmiddle, words\nend"\nb,ok\n', ["2-4 long 2", "b ok 5"]),
        ('a,"begin\nmiddle, words\nGIANT"\nb,ok\n', ["2-4 long 4", "b ok 5"]),
        ('a,"GIANT"\nb,"two\nlines"\n', ["2 long", "b two\nlines 3"]),
        ("COMMAS\nb,ok\n", ["2 long", "b ok 3"]),
        ('a,"begin\nCOMMAS\nmiddle, words\nend"\nb,ok\n', ["2-5 long 3", "b ok 6"]),
        ('a,"beginCOMMAS\nmiddle, words\nend"\nb,ok\n', ["2-4 long 2", "b ok 5"]),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_line_that_is_too_long_makes_the_row_around_it_invalid(
    rows: str, expected: list[str], newline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row has a result with its line number, and text within a quoted cell is not read as a row."""
    monkeypatch.setattr(streams, "MAX_ROW_SIZE", 80)
    content = "id,prompt\n" + rows.replace("GIANT", "red circle " * 100).replace("COMMAS", "," * 500)
    items = read(write("t.csv", content.replace("\n", newline).encode()))

    def summarize(item: PromptRequest | ResultRow) -> str:
        if isinstance(item, PromptRequest):
            return f"{item.id} {item.prompt} {item.source.line}".replace("\r", "")
        error = item.error or ""
        error = re.sub(r"^lines? (\d+) cannot be read as CSV: .*; is there an unclosed quote\?$", r"\1 unclosed", error)
        error = re.sub(r"^line (\d+) is longer than 80 characters$", r"\1 long", error)
        where = r"^lines (\d+) to (\d+) are a row in which line (\d+) is longer than 80 characters$"
        return re.sub(where, r"\1-\2 long \3", error)

    assert [summarize(item) for item in items] == expected
    assert [item.source_row if isinstance(item, ResultRow) else item.source.row for item in items] == list(
        range(len(items))
    )


@pytest.mark.parametrize("text", ["red circle, ", ",", '""'])
def test_memory_does_not_grow_with_a_line_below_an_open_quote(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_ROW_SIZE", 10_000)
    path = write("t.csv", 'id,prompt\na,"open\n' + text * (3_000_000 // len(text)) + '\nend"\nb,ok\n')
    read(path)
    tracemalloc.start()
    try:
        bad, good = read(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert errors_of([bad]) == ["lines 2 to 4 are a row in which line 3 is longer than 10000 characters"]
    assert good.id == "b"


def test_a_header_that_is_one_long_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_ROW_SIZE", 1000)
    with pytest.raises(TableError, match="^t.csv has a header that is longer than 1000 characters"):
        read(write("t.csv", "prompt," + "word" * 400 + "\nx,y\n"))


def test_a_header_of_many_lines_has_the_limit_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_ROW_SIZE", 1000)
    with pytest.raises(TableError, match="^t.csv has a header that is longer than 1000 characters"):
        read(write("t.csv", 'prompt,"' + "word\n" * 400 + '"\nx,y\n'))


def test_a_long_row_in_parquet_makes_only_itself_invalid() -> None:
    """The row is not converted to Python values. A dictionary value counts in every row that has it."""
    long = "x" * (9 << 20)
    columns: dict[str, Any] = {
        "prompt": ["1", "2", "3", None, "5"],
        "text": ["", long, long, None, ""],
        "words": pa.array([long, None, long, "", "w"]).dictionary_encode(),
        "deep": [[b""], [long.encode()], [], None, [b"y"]],
        "number": [1, 2, 3, 4, None],
    }
    pq.write_table(pa.table(columns), "t.parquet")
    rows = read("t.parquet")
    assert [isinstance(item, ResultRow) for item in rows] == [True, True, True, True, False]
    assert [(error or "").partition(":")[0] for error in errors_of(rows[:4])] == [
        "the row's carried cells exceed 1048576 bytes in total",
        "the row has more than 16777216 bytes",
        "the row has more than 16777216 bytes",
        "the prompt is empty",
    ]
    assert [item.id for item in rows] == [f"t-{row:08d}" for row in range(5)]


def test_lines_are_counted_as_an_editor_does() -> None:
    rows = read(write("t.csv", 'prompt,seed\n"x\ny",1\n\nz,one,two\n"open\n'))
    assert [(error or "")[:12] for error in errors_of(rows)] == ["", "line 5 has 3", "line 6 canno"]


# JSON Lines


def test_blank_lines_and_key_order_do_not_matter() -> None:
    rows = read_requests(write("t.jsonl", '\n{"prompt": "x", "seed": 1}\r\n\n \t\n{"seed": 2, "prompt": "y"}'))
    assert [(item.id, item.prompt, item.seed) for item in rows] == [("t-00000000", "x", 1), ("t-00000001", "y", 2)]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        pytest.param(b'{"prompt": "y"', "line 3 is not JSON: Expecting ',' delimiter, character 15", id="cut off"),
        pytest.param(b"{'prompt': 'y'}", "line 3 is not JSON: ", id="Python"),
        pytest.param(b'"y"', "line 3 is not a JSON object but str", id="text"),
        pytest.param(b'["y"]', "line 3 is not a JSON object but list", id="array"),
        pytest.param(b'{"prompt": "caf\xe9"}', "line 3 is not UTF-8", id="Latin-1"),
        pytest.param(b'{"prompt": ' + b"[" * 90_000, "line 3 is nested too deeply", id="deep"),
        pytest.param(b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "line 3 is nested too deeply, in 'a'", id="deeper"),
        pytest.param(b'{"prompt": ' + b"9" * 5000 + b"}", "line 3 is not JSON that can be read", id="endless number"),
        pytest.param(b'{"prompt": ["y"]}', "prompt \"['y']\" is not text but list", id="a list for a prompt"),
        pytest.param(b'{"prompt": 7}', "prompt '7' is not text but int", id="a number for a prompt"),
        pytest.param(b'{"prompt": "\\ud83d"}', "column 'prompt' contains a lone surrogate", id="half a letter"),
        pytest.param(b'{"prompt": "y", "\\ud83d": 1}', "line 3 has an unsupported column ", id="half a name"),
        pytest.param(
            b'{"prompt": "y", "id": ["a"]}', "the id must be text or a number, not a list", id="a list for an id"
        ),
        pytest.param(b'{"seed": 3}', "the prompt is empty", id="no prompt"),
        pytest.param(b'{"prompt": null}', "the prompt is empty", id="null"),
        pytest.param(b'{"prompt": "y", "seed": true}', "seed 'True' is not a whole number", id="a boolean"),
    ],
)
def test_a_bad_line_of_json_makes_only_its_row_invalid(line: bytes, sentence: str) -> None:
    table = write("t.jsonl", b'{"prompt": "x"}\n\n' + line + b'\n{"prompt": "z", "seed": 3}\n')
    first, bad, last = read(table)
    assert isinstance(first, PromptRequest)
    assert isinstance(bad, ResultRow)
    assert (bad.error or "").startswith(sentence)
    assert (bad.id, bad.source_row) == ("t-00000001", 1)
    assert isinstance(last, PromptRequest)
    assert (last.prompt, last.seed, last.id) == ("z", 3, "t-00000002")


@pytest.mark.parametrize(
    ("values", "dtype", "carried"),
    [
        ([1, None, -2], pa.int64(), [1, None, -2]),
        ([True, None, False], pa.bool_(), [True, None, False]),
        ([1.5, None, 2.0], pa.float64(), [1.5, None, 2.0]),
        (["a", None, ""], pa.string(), ["a", None, ""]),
        ([1, 2.5], pa.float64(), [1.0, 2.5]),
        ([2**53 + 1, 2.5], pa.string(), ["9007199254740993", "2.5"]),
        ([2**63 - 1, 1], pa.int64(), [2**63 - 1, 1]),
        ([2**63, 1], pa.string(), ["9223372036854775808", "1"]),
        ([True, 1], pa.string(), ["true", "1"]),
        ([True, "é"], pa.string(), ["true", "é"]),
        ([["é", {"a": None}], "x"], pa.string(), ['["é", {"a": null}]', "x"]),
        ([{"a": 1.5}], pa.string(), ['{"a": 1.5}']),
        ([None, None], pa.null(), [None, None]),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_column_has_the_type_that_holds_all_its_values(
    suffix: str, values: list[Any], dtype: pa.DataType, carried: list[Any]
) -> None:
    rows = [{"prompt": "x", "column": value} for value in values]
    table = write(f"t.{suffix}", in_format(suffix, [{"prompt": "x"}, *rows]))
    assert open_tables(table).carried.field("column").type == dtype
    items = [item.carried["column"] for item in read_requests(table)]
    assert items == [None, *carried]
    assert [type(value) for value in items[1:]] == [type(value) for value in carried]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_keys_that_are_values_make_their_rows_invalid(suffix: str) -> None:
    """Memory must not grow with the table, and the results must not have a column for every row."""
    rows: list[dict[str, Any]] = [{"prompt": "x"}, {"prompt": "z"}]
    rows[1:1] = ({"prompt": "x", f"key {i}": 1} for i in range(2000))
    items = read(write(f"t.{suffix}", in_format(suffix, rows)))
    errors = [error for error in errors_of(items) if error]
    assert len(errors) == 2000 - 1023
    assert "an unsupported column 'key 1023': its name is not UTF-8, or the table already has 1024 columns" in errors[0]
    assert isinstance(items[-1], PromptRequest)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_json_table_without_prompts_is_refused(suffix: str) -> None:
    table = write(f"t.{suffix}", in_format(suffix, [{"Prompt": "x", "seed": 1}]))
    assert refusal_of(table) == f"t.{suffix} has no column 'prompt'; try --column prompt=Prompt"
    assert len(read_requests(table, columns={"prompt": "Prompt"})) == 1


def test_lines_appended_during_a_run_are_left_to_the_next_run() -> None:
    """Their columns and types may differ from those of the results."""
    table = write("t.jsonl", '{"prompt": "x", "n": 1}\n')
    with open_tables(table) as tables:
        with table.open("a") as stream:
            stream.write('{"prompt": "y", "n": "two", "m": 3}\n')
        assert len(list(tables.read_rows(RULES))) == 1
    assert len(read_requests(table)) == 2


def test_a_file_without_a_line_of_json_is_refused() -> None:
    assert refusal_of(write("t.jsonl", "prompt\nx\n")).startswith("t.jsonl cannot be read: line 1 is not JSON: ")


# OpenAI batch files


def batch_line(name: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/images/generations", "body": body}


def test_openai_batch_files_are_read() -> None:
    lines = [
        batch_line("a", model="m", prompt="x", n=2, size="128x64", seed=7),
        batch_line("b", prompt="y", size="auto", negative_prompt="dull", num_inference_steps=3),
        batch_line("c", prompt="z", size="", n=None),
    ]
    first, second, third, fourth = read_requests(write("t.jsonl", in_format("jsonl", lines)))
    assert [item.id for item in (first, second, third, fourth)] == ["a", "a", "b", "c"]
    assert (first.params.width, first.params.height, first.seed, second.seed) == (128, 64, 7, 8)
    assert (third.params.width, third.negative_prompt, third.params.num_inference_steps) == (64, "dull", 3)
    assert first.carried == {"method": "POST", "url": "/v1/images/generations", "model": "m"}


@pytest.mark.parametrize("size", ["10 by 10", "64", 64, ["64x64"], "64x64x64", "-1x64", "1" * 5000 + "x64"])
def test_invalid_sizes_make_their_row_invalid(size: Any) -> None:
    lines = [batch_line("a", prompt="x", size=size), batch_line("b", prompt="y")]
    bad, good = read(write("t.jsonl", in_format("jsonl", lines)))
    assert isinstance(bad, ResultRow)
    assert (bad.id, bad.prompt) == ("a", "x")
    assert bad.error == f"size {str(size)[:40]!r} is not WIDTHxHEIGHT"
    assert isinstance(good, PromptRequest)


def test_the_body_overrides_the_request() -> None:
    line = {**batch_line("a", prompt="x", url="inner", id="inner"), "seed": 1}
    (row,) = read_requests(write("t.jsonl", in_format("jsonl", [line])))
    assert (row.id, row.seed, row.carried["url"]) == ("a", 1, "inner")


def test_the_first_line_determines_whether_a_file_is_a_batch_file() -> None:
    lines = [batch_line("a", prompt="x"), {"prompt": "y"}, {"custom_id": "c", "body": "z"}]
    assert errors_of(read(write("t.jsonl", in_format("jsonl", lines)))) == [
        None,
        "line 2 has no custom_id and body, unlike the first line",
        "line 3 has a body that is not a JSON object but str",
    ]
    rows = read(write("u.jsonl", in_format("jsonl", lines[1:2] + lines[:1])))
    assert errors_of(rows) == [None, "the prompt is empty"]


# JSON documents


def test_an_array_of_prompts() -> None:
    expected = comparable_rows(read_requests(write("t.csv", "prompt\nx\ny\n")))
    assert comparable_rows(read_requests(write("t.json", ["x", "y"]))) == expected
    rows = read_requests(write("t.json", ["x", {"caption": "y", "seed": 1}]), columns={"prompt": "caption"})
    assert [item.prompt for item in rows] == ["x", "y"]


PAYLOADS: list[dict[str, Any]] = [
    {"columns": ["prompt"], "data": ["x", "y"], "index": [0, 1]},
    {"columns": ["prompt"], "data": [["x"], ["y"]]},
    {"columns": ["prompt"], "data": [{"prompt": "x"}, {"prompt": "y"}]},
    {"data": [["x"], ["y"]], "index": [[1], {"a": 2}], "columns": ["prompt"]},
    {"data": ["x", "y"]},
]


@pytest.mark.parametrize("payload", PAYLOADS, ids=str)
@pytest.mark.parametrize("wrapped", [True, False])
def test_azure_payloads(payload: dict[str, Any], wrapped: bool) -> None:
    expected = comparable_rows(read_requests(write("t.csv", "prompt\nx\ny\n")))
    assert comparable_rows(read_requests(write("t.json", {"input_data": payload} if wrapped else payload))) == expected


@pytest.mark.parametrize("first", ["parameters", "data"])
def test_parameters_fill_empty_cells(first: str) -> None:
    parts = {
        "parameters": {"num_inference_steps": 3, "guidance_scale": 2.0, "who": "me"},
        "columns": ["prompt", "num_inference_steps"],
        "data": [["x", 5], ["y", None], {"prompt": "z", "who": "you"}, ["short"]],
    }
    payload = {first: parts[first], **parts}
    rows = read_requests(write("t.json", {"input_data": payload}))
    assert [item.params.num_inference_steps for item in rows] == [5, 3, 3, 3]
    assert {item.params.guidance_scale for item in rows} == {2.0}
    assert [item.carried["who"] for item in rows] == ["me", "me", "you", "me"]


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf\n"])
def test_json_lines_can_be_named_json(compression: str, mark: bytes) -> None:
    """Spark and `datasets.to_json` name them like this."""
    rows: list[dict[str, Any]] = [
        {"prompt": "x", "data": {"a": 1}, "tag": "t"},
        {"prompt": "y", "data": None, "seed": 3},
    ]
    expected = comparable_rows(read_requests(write("t.jsonl", in_format("jsonl", rows))))
    content = mark + in_format("jsonl", rows)
    items = read_requests(write(f"t.json{compression}", compress("gz", content) if compression else content))
    assert comparable_rows(items) == expected
    assert [item.source.line for item in items] == ([1, 2] if not mark else [2, 3])
    assert [item.carried["tag"] for item in items] == ["t", None]


def test_one_line_of_json_is_a_row_if_it_has_a_prompt() -> None:
    assert [item.prompt for item in read_requests(write("t.json", '{"prompt": "x"}'))] == ["x"]
    (row,) = read_requests(write("t.json", '{"caption": "x"}\n'), columns={"prompt": "caption"})
    assert row.prompt == "x"


def test_a_broken_first_line_of_json_lines_named_json_makes_only_its_row_invalid() -> None:
    bad, good = read(write("t.json", '{"prompt": "a red\n{"prompt": "b"}\n'))
    assert "line 1 is not JSON" in (errors_of([bad])[0] or "")
    assert good.prompt == "b"


def test_an_openai_batch_file_can_be_named_json() -> None:
    lines = [batch_line("a", prompt="x"), batch_line("b", prompt="y")]
    assert [item.id for item in read_requests(write("t.json", in_format("jsonl", lines)))] == ["a", "b"]


def test_a_payload_on_one_long_line_can_begin_with_any_key() -> None:
    payload = {"version": 1, "input_data": {"columns": ["prompt"], "data": ["y" * 9_000] * 30}}
    rows = read(write("t.json", payload))
    assert [len(item.prompt or "") for item in rows] == [9_000] * 30


@pytest.mark.parametrize("compression", ["", ".zst"])
def test_a_long_first_line_of_json_lines_named_json(compression: str) -> None:
    content = in_format("jsonl", [{"prompt": "x", "tag": "é" * 200_000}, {"prompt": "y"}])
    rows = read_requests(write(f"t.json{compression}", compress("zst", content) if compression else content))
    assert [item.prompt for item in rows] == ["x", "y"]


def test_a_payload_without_rows_is_a_table_without_rows() -> None:
    assert read(write("t.json", {"input_data": {"columns": ["prompt"], "data": []}})) == []


@pytest.mark.parametrize(
    ("element", "sentence"),
    [
        ("7", "element 1 is neither an object nor a prompt but int"),
        ("null", "element 1 is neither an object nor a prompt but NoneType"),
        ('["y", 1, 2]', "element 1 has 3 cells, but the number of columns is 2"),
        ('{"prompt": 7}', "prompt '7' is not text but int"),
        (
            '{"prompt": "y", "seed": 123456789012345678901234567890}',
            "seed '123456789012345678901234567890' is not within",
        ),
        ('{"prompt": NaN}', "the prompt is empty"),
    ],
)
def test_a_bad_element_makes_only_its_row_invalid(element: str, sentence: str) -> None:
    table = write("t.json", '{"data": [["x", 1], ' + element + ', {"prompt": "z"}], "columns": ["prompt", "seed"]}')
    first, bad, last = read(table)
    assert isinstance(first, PromptRequest)
    assert isinstance(bad, ResultRow)
    assert (bad.error or "").startswith(sentence)
    assert (bad.id, bad.source_row) == ("t-00000001", 1)
    assert isinstance(last, PromptRequest)


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        ('{"prompt": y}', "it is not JSON: Expecting value"),
        ("[" * 50_000 + "]" * 50_000, "it is nested too deeply"),
        ('{"prompt": "\\x"}', "it is not JSON: Invalid "),
        ("9" * 5000, "a number in it is too long"),
        ('"y" "y"', "'\"' instead of , or ]"),
    ],
    ids=lambda value: value[:20],
)
def test_a_document_breaks_off_where_it_is_not_json(element: str, reason: str) -> None:
    """The rows before are read, and a last result says that the file breaks off."""
    rows = read(write("t.json", '{"columns": ["prompt"], "data": ["x", ' + element + ', "z"]}'))
    assert isinstance(rows[0], PromptRequest)
    assert isinstance(rows[-1], ResultRow)
    assert (rows[-1].error or "").startswith(f"the file breaks off here: {reason}")
    assert "z" not in [item.prompt for item in rows]


def test_an_element_that_is_not_utf_8_makes_only_its_row_invalid() -> None:
    rows = read(write("t.json", b'["x", "caf\xe9", {"prompt": "\xff"}, "z"]'))
    assert [bool(error) for error in errors_of(rows)] == [False, True, True, False]


def test_a_list_in_an_array_is_an_invalid_row() -> None:
    assert errors_of(read(write("t.json", ["x", ["y"]]))) == [
        None,
        "element 1 is neither an object nor a prompt but list",
    ]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('["x", "y", "z', 2),
        ('["x", {"prompt": "y"}, {"prompt": "z"', 2),
        ('["x", "y"', 2),
        ('["x", "y" "z"]', 2),
        ('["x", "y"] and so on', 2),
        ('{"input_data": {"columns": ["prompt"], "data": ["x", ["y"], ["z"', 2),
        ('{"input_data": {"columns": ["prompt"], "data": ["x", "y"]}, 7}', 2),
    ],
)
def test_a_document_that_breaks_off_gives_the_rows_before(content: str, rows: int) -> None:
    items = read(write("t.json", content))
    assert [bool(error) for error in errors_of(items)] == [False] * rows + [True]
    assert (errors_of(items)[-1] or "").startswith("the file breaks off here: ")


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": ["x"]}',
        '{"prompt": {"0": "x"}, "seed": {"0": 1}}',
        '{\n  "prompt": "x"\n}\n{\n  "prompt": "y"\n}',
        '{"input_data": ["x"]}',
        '{"data": "x"}',
        '"x"',
        "7",
        "x",
    ],
)
def test_other_documents_are_refused_with_the_accepted_forms(content: str) -> None:
    refusal = refusal_of(write("t.json", content))
    assert refusal.startswith('t.json is not a supported table: a .json file contains [{"prompt": ...}, ...], ["a ')
    assert refusal.endswith("or one object with a prompt per line")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[", "t.json cannot be read: the file breaks off here: it ends in the middle"),
        ("[7, null]", "t.json cannot be read: element 0 is neither an object nor a prompt but int"),
        ("[]", "t.json is empty"),
        ('{"data": ["x"', "t.json cannot be read: it ends in the middle"),
        ('{"columns": ["a", ], "data": ["x"]}', "t.json cannot be read: it is not JSON: "),
        ('{"columns": ["a"], "data": ["x"]}', "t.json has no column 'prompt'; it has 'a'"),
        ('{"columns": ["\\ud83d"], "data": ["x"]}', "t.json has a column whose name is not UTF-8"),
    ],
)
def test_unreadable_documents(content: str, sentence: str) -> None:
    assert refusal_of(write("t.json", content)).startswith(sentence)


def test_an_element_that_is_too_long_ends_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other parts of the document may have any length."""
    monkeypatch.setattr("batch_infer.table.json.Scanner", partial(Scanner, max_length=1000))
    payload = {"index": list(range(100_000)), "columns": ["prompt"], "data": ["x", "y" * 200_000, "z"]}
    rows = read(write("t.json", payload))
    assert errors_of(rows) == [None, "the file breaks off here: it is not JSON: Unterminated string starting"]


@given(st.lists(st.text(min_size=1), max_size=5), st.booleans(), st.integers(1, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_read_boundaries_do_not_matter(prompts: list[str], escaped: bool, size: int) -> None:
    """Values and characters that are split between two reads are joined."""
    rows = [{"prompt": prompt, "n": [1.5, {"a": prompt}]} for prompt in ('é🎨\\"[{,]}', *prompts)]
    path = write("t.json", json.dumps({"data": rows}, ensure_ascii=escaped, indent=2))
    expected = [(item.id, item.prompt, item.carried) for item in read(path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanner, "BUFFER", size)
        assert [(item.id, item.prompt, item.carried) for item in read(path)] == expected


# Streaming


def peak_of(path: Path) -> int:
    """Return Python's peak memory in bytes while reading a table. An earlier pass must have filled the caches."""
    tracemalloc.start()
    try:
        with open_tables(path) as tables:
            count = sum(1 for _ in tables.read_rows(RULES))
        assert count >= 500
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "csv.zst", "jsonl", "jsonl.gz", "json", "txt", "parquet"])
def test_memory_does_not_grow_with_the_table(suffix: str) -> None:
    def rows(count: int) -> Iterator[dict[str, Any]]:
        return ({"prompt": f"prompt {i} " + "word " * 160} for i in range(count))

    small = write(f"small.{suffix}", in_format(suffix, list(rows(500))))
    large = write(f"large.{suffix}", in_format(suffix, list(rows(5000))))
    peak_of(small)
    # A megabyte is about a quarter of the larger table's text.
    assert peak_of(large) < peak_of(small) + 1_000_000


def test_memory_does_not_grow_with_a_payload() -> None:
    def table(count: int) -> Path:
        data = [[f"prompt {i} " + "word " * 160] for i in range(count)]
        return write(
            f"{count}.json", {"input_data": {"data": data, "index": list(range(count)), "columns": ["prompt"]}}
        )

    small, large = table(500), table(5000)
    peak_of(small)
    assert peak_of(large) < peak_of(small) + 1_000_000


def test_memory_does_not_grow_with_a_parquet_row_group() -> None:
    """This measures Arrow's own memory, which tracemalloc does not count."""
    prompts = pa.array([f"prompt {i} " + "word " * 600 for i in range(10_000)])
    pq.write_table(pa.table({"prompt": prompts}), "t.parquet", use_dictionary=False, compression="none")
    size = prompts.nbytes
    del prompts
    before, peak = pa.total_allocated_bytes(), 0
    with open_tables("t.parquet") as tables:
        for _ in islice(tables.read_rows(RULES), 0, None, 50):
            peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < size / 3


# Arbitrary content

relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
STARTS = {
    "csv": [b"", b"prompt,id,seed\n", b"prompt;id\n"],
    "tsv": [b"", b"prompt\tid\n"],
    "jsonl": [b"", b'{"prompt": "x"}\n', b'{"custom_id": "a", "body": {"prompt": "x"}}\n'],
    "json": [b"", b'["x",', b'[{"prompt": "x"},', b'{"input_data": {"columns": ["prompt", "id"], "data": [["x", 1],'],
    "txt": [b"", b"x\n"],
}


def check_any_content(path: Path, readable: int = 0) -> None:
    """Check that every row is a request or an invalid result with a unique key and text that results can store."""
    try:
        rows = read(path)
    except TableError as error:
        assert str(path) in str(error)
        assert not readable
        return
    assert len({item.key for item in rows}) == len(rows) >= readable
    for item in rows:
        "".join(filter(None, [item.id, item.prompt, getattr(item, "error", None)])).encode()


@relaxed
@given(st.sampled_from(sorted(STARTS)), st.data())
def test_any_bytes_give_rows_or_a_table_error(suffix: str, data: st.DataObject) -> None:
    start = data.draw(st.sampled_from(STARTS[suffix]))
    rest = data.draw(st.binary(max_size=150) | st.text('{}[]",:\\\n 1axé', max_size=60).map(str.encode))
    check_any_content(write(f"t.{suffix}", start + rest))


@relaxed
@given(
    st.sampled_from(
        [
            *("csv.gz", "jsonl.gz", "json.gz", "txt.gz", "csv.zst", "json.zst", "jsonl", "json", "parquet.gz"),
            *("csv.bz2", "csv.xz", "json.bz2", "jsonl.xz", "parquet.xz"),
        ]
    ),
    st.data(),
)
def test_any_damage_gives_rows_or_a_table_error(suffix: str, data: st.DataObject) -> None:
    content = bytearray(in_format(suffix, ROWS))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    check_any_content(write(f"t.{suffix}", bytes(content[: data.draw(st.integers(0, len(content)))])))


@relaxed
@given(st.lists(st.one_of(json_values, st.fixed_dictionaries({"prompt": json_values, "c": json_values})), max_size=6))
@example([{"prompt": "x", "a": float("nan")}, {"prompt": "x", "a": 2**70}, {"prompt": "x", "": "\ud800"}])
def test_any_json_is_accounted_for(values: list[Any]) -> None:
    """No value is lost: each becomes one or more requests, or an invalid result."""
    lines = "".join(json.dumps(value) + "\n" for value in [{"prompt": "x"}, *values])
    check_any_content(write("t.jsonl", lines), readable=1 + len(values))
    check_any_content(write("t.json", [{"prompt": "x"}, *values]), readable=1 + len(values))


@relaxed
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=8))
def test_every_format_gives_the_same_text(prompts: list[str]) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "x"}, *({"prompt": prompt} for prompt in prompts)]
    outcomes = [
        [(item.id, item.prompt, item.fingerprint) for item in read(write(f"t.{suffix}", in_format(suffix, rows)))]
        for suffix in ("jsonl", "json", "parquet", "json.gz", "jsonl.zst")
    ]
    for outcome in outcomes[1:]:
        assert [entry[0] for entry in outcome] == [entry[0] for entry in outcomes[0]]
        assert [entry[1] or None for entry in outcome] == [entry[1] or None for entry in outcomes[0]]


def test_one_long_text_in_many_rows_is_loaded_once(tmp_path: Path) -> None:
    """A few kilobytes of Parquet can contain the same two megabytes a thousand times."""
    for name in ("prompt", "tag"):
        text = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["a" * 2_000_000]))
        columns = {"prompt": ["x"] * 1000, name: text}
        pq.write_table(pa.table(columns), path := tmp_path / "t.parquet", compression="zstd", store_schema=False)
        assert path.stat().st_size < 10_000
        before = pa.default_memory_pool().max_memory()
        assert peak_of(path) < 20_000_000
        assert pa.default_memory_pool().max_memory() <= max(before, 50_000_000)


@pytest.mark.parametrize(
    ("suffix", "text"), [("jsonl", "\ud7ff"), ("csv", "x"), ("parquet", "x")], ids=["jsonl", "csv", "parquet"]
)
def test_cells_have_a_size_limit(suffix: str, text: str) -> None:
    """A row beyond the limit is invalid and keeps its other cells."""
    rows: list[dict[str, Any]] = [
        {"id": "1", "prompt": text * 10_001, "negative_prompt": None, "tag": "a"},
        {"id": "2", "prompt": "x", "negative_prompt": text * 10_001, "tag": "b"},
        {"id": text * 10_001, "prompt": "x", "negative_prompt": None, "tag": "c"},
        {"id": "4", "prompt": "x", "negative_prompt": None, "tag": text * 2_000_000},
        {"id": "5", "prompt": text * 10_000, "negative_prompt": text * 10_000, "tag": text * 1_000_000},
    ]
    *bad, good = read(write(f"t.{suffix}", in_format(suffix, rows)))
    assert [item.id for item in bad] == ["1", "2", "t-00000002", "4"]
    assert [item.carried["tag"] for item in bad] == ["a", "b", "c", None]
    assert [item.error for item in bad if isinstance(item, ResultRow)] == [
        "the prompt has 10001 characters; the maximum is 10000 (a model reads about 75 tokens)",
        "the negative_prompt has 10001 characters; the maximum is 10000 (a model reads about 75 tokens)",
        "the id has 10001 characters; the maximum is 10000",
        "the row's carried cells exceed 1048576 bytes in total: dropped 'tag' of 2000000 bytes",
    ]
    assert all(len(item.prompt or "") <= 10_000 for item in bad)
    assert isinstance(good, PromptRequest)


def test_values_in_a_struct_count_towards_its_size() -> None:
    (row,) = read(write("t.parquet", in_format("parquet", [{"prompt": "x", "tag": {"key": ["y" * 2_000_000]}}])))
    assert row.carried == {"tag": None}
    assert errors_of([row]) == ["the row's carried cells exceed 1048576 bytes in total: dropped 'tag' of 2000003 bytes"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_with_too_many_columns_is_refused(suffix: str) -> None:
    table = write(f"t.{suffix}", in_format(suffix, [{"prompt": "x", **{f"column {i}": "y" for i in range(1024)}}]))
    with pytest.raises(TableError, match="^t.* has 1025 columns; the maximum is 1024: leave out some$"):
        read(table)
