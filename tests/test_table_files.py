"""TABLE arguments: files, folders, globs, URLs and standard input. Arguments without a table are refused."""

from __future__ import annotations

import errno
import ftplib
import io
import os
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from batch_infer.errors import RetryableError, ServiceError, StorageError, TableError
from batch_infer.manifest import SCHEMA
from batch_infer.records import PromptRequest, ResultRow
from batch_infer.settings import TableSettings
from batch_infer.store import redact_urls
from batch_infer.table import SharedFolder, Tables, redact_url
from tests.file_servers import answer_ftp, serve_folder
from tests.tables import (
    ROWS,
    RULES,
    comparable_rows,
    compress,
    in_format,
    open_tables,
    read,
    read_requests,
    write_bytes,
    write_csv,
    write_parquet,
)

FORMATS = (
    *("csv", "tsv", "jsonl", "json", "parquet", "csv.gz", "jsonl.zst", "json.gz", "parquet.gz", "parquet.zst"),
    *("csv.bz2", "jsonl.xz", "parquet.bz2"),
)


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder in which temporary folders are created."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def expected() -> list[tuple[Any, ...]]:
    cells = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    return comparable_rows(read_requests(write_csv(Path("equal/t.csv"), cells)))


def refusal_of(*tables: Path | str, **options: Any) -> str:
    with pytest.raises(TableError) as exc_info:
        open_tables(*tables, **options)
    return str(exc_info.value)


# Arguments with and without a table


def test_every_argument_without_a_table_is_reported() -> None:
    """A misspelt name, or part of an option that contains a space, must not become a table with one invalid row."""
    write_csv(Path("good.csv"), [["prompt"], ["x"]])
    Path("empty").mkdir()
    Path("notes.md").touch()
    refusal = refusal_of("percent", "missing.csv.gz", "good.csv", "notes.md", "empty", "none/*.csv", "no://a.csv")
    for line, sentence in zip(
        refusal.split(" · "),
        (
            "percent: no such file or folder",
            "missing.csv.gz: no such file or folder",
            "notes.md: unknown file extension .md; a table ends in .csv, ",
            "empty: the folder contains no table (.csv, ",
            "none/*.csv: the glob matches no table (",
            "no://a.csv cannot be opened: Protocol not known: no",
        ),
        strict=True,
    ):
        assert line.startswith(sentence)


@pytest.mark.parametrize("content", [b"caption\nx\n", b"", b"\xff\xfep"])
def test_a_named_file_that_cannot_be_read_is_refused_and_one_in_a_folder_is_not(content: bytes) -> None:
    write_csv(Path("t/good.csv"), [["prompt"], ["x"]])
    write_bytes(Path("t/bad.csv"), content)
    assert refusal_of("t/good.csv", "t/bad.csv").startswith("t/bad.csv ")
    assert refusal_of("t", "t/bad.csv") == refusal_of("t/bad.csv", "t") == refusal_of("t/bad.csv")
    for argument in ("t", "t/*.csv"):
        bad, good = read(argument)
        assert isinstance(bad, ResultRow)
        assert (bad.source_file, bad.error) == ("t/bad.csv", refusal_of("t/bad.csv"))
        assert isinstance(good, PromptRequest)


def test_if_no_file_can_be_read_all_are_reported() -> None:
    assert re.fullmatch("a.csv: no such .* · b.txt: no such .* · c/: no such .*", refusal_of("a.csv", "b.txt", "c/"))


def test_an_argument_that_cannot_be_a_file_name_is_refused() -> None:
    assert refusal_of("a\0b.csv")
    assert refusal_of("x" * 5000 + ".csv")


def test_unreadable_files_are_listed_by_name() -> None:
    write_csv(Path("t/good.csv"), [["prompt"], ["x"]])
    write_bytes(Path("t/bad.csv"), b"caption\nx\n")
    with open_tables("t") as tables:
        assert list(tables.unreadable_files) == ["t/bad.csv"]
        assert tables.files == ["t/bad.csv", "t/good.csv"]
        assert tables.locations == [str(Path(name).absolute()) for name in tables.files]


def test_relative_paths_are_resolved_against_the_folder_of_the_settings(tmp_path: Path) -> None:
    """Results contain the paths as the user wrote them."""
    for name in ("a.csv", "more/b.csv", "more/c.txt"):
        write_bytes(tmp_path / "there" / name, b"prompt\nx\n")
    with open_tables("a.csv", "more", "mo*/c.txt", folder=tmp_path / "there") as tables:
        assert tables.files == ["a.csv", "more/b.csv", "more/c.txt"]
        assert tables.locations == [str(tmp_path / "there" / name) for name in tables.files]
        rows = list(tables.read_rows(RULES))
    assert [item.id for item in rows] == ["a-00000000", "b-00000000", "c-00000000", "c-00000001"]


def test_files_that_differ_in_their_suffix_have_the_same_stem() -> None:
    for name in ("t/a.csv", "t/a.jsonl.gz"):
        write_bytes(Path(name), in_format(Path(name).name.partition(".")[2], [{"prompt": "x"}]))
    assert "t/a.csv and t/a.jsonl.gz would give their rows the same ids (a-00000000, ...)" in refusal_of("t")


def test_a_dot_in_a_name_is_part_of_the_stem() -> None:
    write_csv(Path("v1.2.csv"), [["prompt"], ["x"]])
    assert [item.id for item in read("v1.2.csv")] == ["v1.2-00000000"]


def test_run_json_is_not_read_as_a_table() -> None:
    write_bytes(Path("t/run.json"), b'["a result"]')
    write_bytes(Path("t/a.json"), b'["x"]')
    assert [item.prompt for item in read("t")] == ["x"]


def test_local_files_need_no_temporary_folder(temporary: Path) -> None:
    read(write_bytes(Path("t.csv.gz"), in_format("csv.gz", ROWS)))
    with open_tables("t.csv.gz"):
        assert not list(temporary.iterdir())


# Files in a folder that are not tables

IGNORED_FILES = {
    "name": [
        *(
            "README.txt",
            "README",
            "README_first.csv",
            "readme.md",
            "deep/LICENSE.txt",
            "LICENSE-MIT.txt",
            "Licence.txt",
        ),
        *("CHANGELOG.csv", ".hidden.csv", "_SUCCESS", "_committed_17", "deep/.part-0.csv.crc", "part-0.csv.crc"),
    ],
    "ending": ["b.feather", "c.csv.7z", "deep/d.zip", "e", "notes.md"],
}
TABLES = ["a.csv", "deep/b.csv.bz2", "deep/license_plates.csv", "p.parq", "q.pq", "readme_prompts.csv", "t.txt"]


def fill(folder: Path, *names: str) -> None:
    for name in names:
        content = in_format("parquet", [{"prompt": name}]) if name.endswith(("pq", "parq")) else b"prompt\nx\n"
        write_bytes(folder / name, compress("bz2", content) if name.endswith("bz2") else content)


@pytest.mark.parametrize("argument", ["t", "t/", "t/**/*", "memory://t", "memory://t/**"])
def test_documentation_markers_and_other_suffixes_are_ignored_and_reported(argument: str, memory: Any) -> None:
    """The same rule applies to folders and globs, local and remote."""
    fill(Path("t"), *TABLES, *IGNORED_FILES["name"], *IGNORED_FILES["ending"])
    for path in Path("t").rglob("*.*" if "memory" in argument else "nothing"):
        memory.pipe(f"/{path}", path.read_bytes()) if path.is_file() else None
    for name in ("README", "_SUCCESS", "_committed_17", "e"):
        memory.pipe(f"/t/{name}", b"")
    scheme = "memory://" if "memory" in argument else ""
    with open_tables(argument) as tables:
        assert tables.files == [f"{scheme}t/{name}" for name in TABLES]
        ignored_files = tables.ignored_files.group()
    assert ignored_files == {
        reason: {f"{scheme}t/{name}": 1 for name in sorted(names, key=lambda name: name.split("/"))}
        for reason, names in IGNORED_FILES.items()
    } | {"name": {"*.txt": 4, **{f"{scheme}t/{n}": 1 for n in IGNORED_FILES["name"] if not n.endswith(".txt")}}}


def test_thousands_of_similar_files_are_one_entry() -> None:
    fill(Path("t"), "a.csv", *(f"{i}.png" for i in range(2000)), *(f"{i % 9}/_SUCCESS" for i in range(9)), "x.npy")
    fill(Path("t/.git"), *(f"{i}.txt" for i in range(50)))
    fill(Path("t/out"), "run.json", ".lock", "results.parquet", *(f"images/p-00000/{i}.txt" for i in range(50)))
    with open_tables("t") as tables:
        assert tables.files == ["t/a.csv"]
        assert str(tables.ignored_files) == (
            "for their names: t/.git/, 9 */_SUCCESS; for their endings: 2,000 *.png, t/x.npy; "
            "as output of an earlier run: t/out/"
        )
    with open_tables("t/**/*.*") as tables:
        assert tables.files == ["t/a.csv"]
        assert str(tables.ignored_files) == (
            "for their names: t/.git/; for their endings: 2,000 *.png, t/x.npy; as output of an earlier run: t/out/"
        )


def test_a_file_that_another_argument_reads_is_not_ignored() -> None:
    fill(Path("t"), "a.csv", "README.csv")
    with open_tables("t", "t/README.csv") as tables:
        assert tables.files == ["t/a.csv", "t/README.csv"]
        assert str(tables.ignored_files) == ""


def test_the_error_for_a_folder_without_tables_names_its_files() -> None:
    fill(Path("t"), "README.txt", "a.zip")
    assert refusal_of("t").endswith("after it); ignored for their names: t/README.txt; for their endings: t/a.zip")


def refuse_to_list(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make listing a folder with this name raise PermissionError."""
    scandir = os.scandir

    def scandir_or_refuse(path: Any = ".") -> Any:
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir_or_refuse)


def test_unreadable_links_and_folders_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file may be skipped silently, so a broken link is an error."""
    fill(Path("t"), "a.csv", "closed/b.csv")
    fill(Path("elsewhere"), "c.csv")
    Path("t/linked").symlink_to(Path("elsewhere").absolute())
    Path("t/broken.csv").symlink_to("nothing.csv")
    Path("t/also.csv").symlink_to(Path("elsewhere/c.csv").absolute())
    refuse_to_list("closed", monkeypatch)
    with open_tables("t") as tables:
        assert str(tables.ignored_files) == "as links to folders: t/linked/"
        assert tables.files == ["t/a.csv", "t/also.csv", "t/broken.csv", "t/closed"]
        assert tables.unreadable_files == {
            "t/broken.csv": "t/broken.csv: the target of the link does not exist",
            "t/closed": "t/closed: Permission denied",
        }
    assert refusal_of("t/closed") == "t/closed: Permission denied"


# Columns in the path


def partitioned(suffix: str, store: Callable[[str, bytes], Any]) -> None:
    """Write a folder as Spark and pyarrow do, with the columns lang, height and `a b` in its paths."""
    for path, prompt in (
        ("lang=en/height=128", "a"),
        ("lang=de/height=64", "b"),
        ("lang=__HIVE_DEFAULT_PARTITION__/height=__HIVE_DEFAULT_PARTITION__", "c"),
        ("lang=05/height=72/a%20b=S%C3%A3o%2FPaulo=1", "d"),
    ):
        store(f"ds/{path}/part.0.{suffix}", in_format(suffix, [{"prompt": prompt, "tag": "t"}]))
    store("ds/_SUCCESS", b"")


def read_columns(*tables: str, **options: Any) -> dict[str, tuple[Any, ...]]:
    rows = read_requests(*tables, **options)
    return {item.prompt: (item.params.height, *(item.carried.get(name) for name in ("lang", "a b"))) for item in rows}


PARTITIONED = {"a": (128, "en", None), "b": (64, "de", None), "c": (64, None, None), "d": (72, "05", "São/Paulo=1")}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "txt", "parquet", "csv.gz", "parquet.xz"])
def test_key_value_folders_are_columns(suffix: str, memory: Any, tmp_path: Path) -> None:
    """This holds for every format and every kind of argument, local and remote."""
    partitioned(suffix, lambda path, content: write_bytes(Path(path), content))
    partitioned(suffix, lambda path, content: memory.pipe(f"/{path}", content))
    for argument in ("ds", "ds/**/*.*", "memory://ds", "memory://ds/**/*.*", f"file://{tmp_path}/ds"):
        assert read_columns(argument) == PARTITIONED
    assert read_columns("ds/lang=en") == read_columns("ds/lang=*n/*/*") == {"a": PARTITIONED["a"]}
    assert read_columns(f"ds/lang=en/height=128/part.0.{suffix}") == {"a": PARTITIONED["a"]}
    with open_tables("ds") as tables:
        kinds = {field.name: str(field.type) for field in tables.carried}
        assert {kinds.pop(name) for name in ("lang", "a b")} == {"string"}
        assert kinds.keys() == ({"tag"} if suffix != "txt" else set())
    assert sorted(item.id for item in read_requests("ds"))[-1] == "lang=en-height=128-part.0-00000000"


def test_columns_in_the_path_of_a_served_file(server: str) -> None:
    partitioned("csv", lambda path, content: write_bytes(Path("served", path), content))
    assert read_columns(f"{server}/ds/lang=en/height=128/part.0.csv?sig=x=y/z") == {"a": PARTITIONED["a"]}
    encoded = "lang=05/height=72/a%2520b=S%25C3%25A3o%252FPaulo=1"
    for url in (f"{server}/ds/{encoded}/part.0.csv", f"simplecache::{server}/ds/{encoded}/part.0.csv"):
        assert read_columns(url) == {"d": PARTITIONED["d"]}


def test_columns_in_a_path_inside_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile("seed=9.zip", "w") as archive:
        partitioned("csv", archive.writestr)
    assert read_columns(f"zip://ds::file://{tmp_path}/seed=9.zip") == PARTITIONED


def test_a_column_in_the_path_overrides_the_column_in_the_file_with_a_notice() -> None:
    write_parquet(Path("t/height=128/n=5/a.parquet"), prompt=["x"], n=[7], height=[64])
    write_parquet(Path("t/b.parquet"), prompt=["y"], n=[7])
    with open_tables("t", columns={"seed": ""}) as tables:
        assert tables.carried.field("n").type == "string"
        first, second = tables.read_rows(RULES)
        notice = (
            "t/height=128/n=5/a.parquet: column 'height' is also in the path of the file, "
            "and the value in the path is used (columns: 2, files: 1)"
        )
        assert notice in tables.notices
    assert isinstance(second, PromptRequest)
    assert (second.params.height, second.carried, first.carried) == (128, {"n": "5"}, {"n": "7"})


def test_a_bad_value_in_the_path_makes_the_rows_of_its_file_invalid() -> None:
    write_csv(Path("t/height=tall/a.csv"), [["prompt"], ["x"]])
    write_csv(Path("t/height=64/b.csv"), [["prompt"], ["y"]])
    write_csv(Path("t/prompt=a%20ring/c.csv"), [["tag"], ["z"]])
    good, bad, other = read("t")
    assert isinstance(bad, ResultRow)
    assert bad.error == "height 'tall' is not a whole number"
    assert (good.prompt, other.prompt) == ("y", "a ring")


def test_a_file_of_a_mini_batch_has_the_columns_in_its_path(tmp_path: Path) -> None:
    """Results contain only the name of the file, but its columns come from the whole path."""
    write_csv(tmp_path / "lang=en" / "height=128" / "a.csv", [["prompt"], ["x"]])
    settings = TableSettings(("./a.csv",), folder=tmp_path / "lang=en" / "height=128")
    with Tables(settings, SCHEMA.names, SharedFolder(("a.csv",), lambda name, file: False)) as tables:
        (row,) = tables.read_rows(RULES)
    assert isinstance(row, PromptRequest)
    assert (row.id, row.params.height, row.carried) == ("a-00000000", 128, {"lang": "en"})


@pytest.mark.parametrize("names", [("a.csv", "b.csv", "B.csv"), ("B.csv", "b.csv"), ("b.csv",)])
def test_collisions_in_a_mini_batch_do_not_depend_on_its_other_files(tmp_path: Path, names: tuple[str]) -> None:
    for name, ids in {"a.csv": ["SKU", "Z"], "b.csv": ["Sku", "sku", "z"], "B.csv": ["sKu"]}.items():
        write_csv(tmp_path / name, [["id", "prompt"], *([row_id, "x"] for row_id in ids)])
    settings = TableSettings(tuple(f"./{name}" for name in names), folder=tmp_path)
    others = SharedFolder(("b.csv", "a.csv", "B.csv"), lambda name, file: False)
    with Tables(settings, SCHEMA.names, others) as tables:
        rows = {row.id: (row.id_collides, row.stem_collides) for row in tables.read_rows(RULES)
                 if isinstance(row, PromptRequest) and row.source.file == "b.csv"}  # fmt: skip
    assert rows == {"Sku": (False, True), "sku": (True, True), "z": (False, True)}


def test_a_folder_is_a_column_only_if_it_has_a_name_before_an_equals_sign() -> None:
    for path in ("a=/x.csv", "=b/x.csv", "c/x.csv", "_d/x.csv"):
        write_csv(Path("t", path), [["prompt"], [path]])
    with open_tables("t") as tables:
        assert tables.carried.names == ["a"]
        assert [item.carried for item in tables.read_rows(RULES)] == [{}, {"a": ""}, {}]


# Standard input


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize("suffix", FORMATS)
def test_any_format_can_be_read_from_standard_input(
    suffix: str, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    rows = [{"id": f"row {i}", **row} for i, row in enumerate(ROWS)]
    equal = read_requests(write_csv(Path("t.csv"), [list(rows[0]), *(list(row.values()) for row in rows)]))
    pipe(monkeypatch, in_format(suffix, rows))
    with open_tables("-", "-") as tables:
        assert tables.files == ["stdin"]
        assert tables.locations == []
        items = list(tables.read_rows(RULES))
        assert list(tables.read_rows(RULES)) == items, "a second pass reads the same rows"
        assert list(temporary.iterdir())
    assert not list(temporary.iterdir())
    assert comparable_rows(item for item in items if isinstance(item, PromptRequest)) == comparable_rows(equal)
    assert {item.source.file for item in items if isinstance(item, PromptRequest)} == {"stdin"}


@pytest.mark.parametrize(
    "content",
    [
        b"prompt\nx\n",
        b"\xef\xbb\xbf\n\nprompt;seed\nx;1\n",
        b"seed\tprompt\n1\tx\n",
        b'\n  {"prompt": "x"}\n',
        b'{"custom_id": "stdin-00000000", "body": {"prompt": "x"}}',
        b' ["x"]',
        b'[\n"x"]',
        b'{"input_data": {"columns": ["prompt"], "data": ["x"]}}',
        b'{"columns": ["prompt"], "data": ["x"]}',
        b'{\n"data": [["x"]]}',
    ],
    ids=repr,
)
def test_the_format_of_standard_input_is_detected_from_its_content(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, content)
    assert [(item.id, item.prompt) for item in read_requests("-")] == [("stdin-00000000", "x")]


def test_plain_prompts_on_standard_input_are_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"a red circle\na blue square\n")
    assert refusal_of("-") == (
        "stdin has no column 'prompt'; standard input is read as CSV, and its first line is 'a red circle': "
        "plain prompts need a .txt file (or the first line 'prompt', if no prompt contains a comma)"
    )


def test_a_broken_first_line_of_json_lines_makes_only_its_row_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b'{"prompt": "a red\n{"prompt": "b"}\n')
    bad, good = read("-")
    assert isinstance(bad, ResultRow)
    assert good.prompt == "b"
    pipe(monkeypatch, b'{\n"input_data": {\n"data": ["x"]}}\n')
    assert [item.prompt for item in read_requests("-")] == ["x"]


def test_an_unreadable_file_may_have_the_stem_of_another() -> None:
    write_csv(Path("a.csv"), [["prompt"], ["x"]])
    write_bytes(Path("elsewhere/a.csv"), b"caption\nx\n")
    good, bad = read("a.csv", "elsewhere")
    assert good.id == "a-00000000"
    assert isinstance(bad, ResultRow)
    assert "elsewhere/a.csv has no column 'prompt'" in (bad.error or "")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "stdin is empty"),
        (b"\x1f\x8b", "stdin cannot be read: the gzip stream is cut off"),
        (b"\x1f\x8bxxxxxxxxxxxxxxx", "stdin cannot be read: "),
        (b"PAR1", "stdin cannot be read: "),
        (b"{", "stdin cannot be read: it ends in the middle"),
        ("prompt\nx".encode("utf-16"), "stdin is UTF-16"),
    ],
)
def test_unreadable_standard_input(content: bytes, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, content)
    assert refusal_of("-").startswith(sentence)


def test_a_system_error_on_standard_input_is_a_storage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

    pipe(monkeypatch, b"")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Failing())))
    with pytest.raises(StorageError, match="cannot read standard input: Input/output error; run the same"):
        open_tables("-")


def test_a_terminal_as_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert refusal_of("-").startswith("-: standard input is a terminal; pipe a table in")
    monkeypatch.setattr("sys.stdin", None)
    assert refusal_of("-") == "-: there is no standard input to read"


# URLs


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("suffix", FORMATS)
def test_any_format_can_be_read_from_a_url(suffix: str, memory: Any, temporary: Path, tmp_path: Path) -> None:
    content = in_format(suffix, ROWS)
    memory.pipe(f"/there/t.{suffix}", content)
    write_bytes(tmp_path / "here" / f"t.{suffix}", content)
    for url in (f"memory://there/t.{suffix}", f"file://{tmp_path}/here/t.{suffix}"):
        with open_tables(url) as tables:
            assert tables.files == [url]
            assert tables.locations == [url]
            rows = [item for item in tables.read_rows(RULES) if isinstance(item, PromptRequest)]
        assert comparable_rows(rows) == expected()
        assert {item.source.file for item in rows} == {url}
        assert not list(temporary.iterdir())


def test_a_folder_and_a_glob_behind_a_url(memory: Any) -> None:
    for name in ("a.csv", "deep/er/b.txt", ".hidden.csv", "_temporary/c.csv", "notes.md"):
        memory.pipe(f"/t/{name}", b"prompt\n" if name.endswith("csv") else b"x\n")
    for name in ("run.json", "results.csv", "images/a.txt", "manifest/a.csv"):
        memory.pipe(f"/t/out/{name}", b"prompt\na result\n")
    with open_tables("memory://t/") as tables:
        assert tables.files == ["memory://t/a.csv", "memory://t/deep/er/b.txt"]
        assert [item.id for item in tables.read_rows(RULES)] == ["deep-er-b-00000000"]
    with open_tables("memory://t/**/*.*") as tables:
        assert tables.files == ["memory://t/a.csv", "memory://t/deep/er/b.txt"]
    with open_tables("memory://t/deep/*/b.txt") as tables:
        assert [item.id for item in tables.read_rows(RULES)] == ["er-b-00000000"]
    with open_tables("memory://t/out/results.csv") as tables:
        assert len(list(tables.read_rows(RULES))) == 1, "a file that the user names is read"


def test_a_file_behind_a_url_is_read_once(memory: Any) -> None:
    memory.pipe("/t/a[1].csv", b"prompt\nx\n")
    assert len(read_requests("memory://t/a[1].csv", "memory://t/", "memory://t/*.csv")) == 1


def test_a_file_in_an_archive_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile("t.zip", "w") as archive:
        archive.writestr("in/a.csv", "prompt\nx\n")
        archive.writestr("in/b.csv", "prompt\ny\n")
    assert [item.prompt for item in read_requests(f"zip://in/a.csv::file://{tmp_path}/t.zip")] == ["x"]
    with open_tables(f"zip://in::file://{tmp_path}/t.zip") as tables:
        assert tables.files == [f"zip://in/{name}.csv::file://{tmp_path}/t.zip" for name in "ab"]
        assert [item.id for item in tables.read_rows(RULES)] == ["a-00000000", "b-00000000"]


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("memory://t/missing.csv", "memory://t/missing.csv: no such file or folder"),
        ("memory://t/*.tsv", "memory://t/*.tsv: the glob matches no table (.csv, "),
        ("memory://t/empty", "memory://t/empty: the folder contains no table (.csv, "),
        ("memory://t/notes.md", "memory://t/notes.md: unknown file extension .md; a table ends in .csv"),
        ("nothing://t/a.csv", "nothing://t/a.csv cannot be opened: Protocol not known: nothing"),
        ("s3://bucket/a.csv", "s3://bucket/a.csv: reading s3:// needs s3fs: pip install s3fs"),
        ("gs://bucket/a.csv", "gs://bucket/a.csv: reading gs:// needs gcsfs: pip install gcsfs"),
        (
            "abfss://c@account/a.csv",
            "abfss://c@account/a.csv: reading abfss:// needs adlfs: pip install adlfs",
        ),
        ("https://", "https://: unknown file extension (none)"),
        ("https://user:secret@/a.csv?sig=secret", "https:///a.csv cannot be opened: "),
    ],
)
def test_urls_without_a_table(url: str, sentence: str, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("s3fs", "gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, package, None)
    memory.pipe("/t/notes.md", b"")
    memory.makedirs("/t/empty")
    refusal = refusal_of(url)
    assert refusal.startswith(sentence)
    assert "secret" not in refusal
    write_csv(Path("good.csv"), [["prompt"], ["x"]])
    assert refusal_of("good.csv", url) == refusal


class FailingFileSystem:
    """A file system whose only method raises an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def info(self, path: str) -> dict[str, str]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "error_type", "sentence"),
    [
        (PermissionError(13, "Forbidden"), TableError, "x://a.csv: no permission to read it: "),
        (NotImplementedError("no listing"), TableError, "x://a.csv cannot be opened: no listing"),
        (ConnectionResetError("gone"), RetryableError, "could not fetch x://a.csv: gone; run again"),
        (TimeoutError(), RetryableError, "could not fetch x://a.csv: TimeoutError; run again"),
        (ftplib.error_temp("421 busy"), RetryableError, "could not fetch x://a.csv: 421 busy; run again"),
        (ftplib.error_perm("550 no"), TableError, "x://a.csv: the server refuses it: 550 no"),
        (EOFError(), TableError, "x://a.csv cannot be opened: EOFError"),
        (KeyError("size"), TableError, "x://a.csv cannot be opened: KeyError: 'size'"),
        (AssertionError(), TableError, "x://a.csv cannot be opened: AssertionError"),
        (type("OfNoKind", (Exception,), {})("secret?"), TableError, "x://a.csv cannot be opened: OfNoKind"),
    ],
)
def test_client_errors_are_attributed_to_the_user_or_the_service(
    error: Exception, error_type: type[Exception], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsspec, "url_to_fs", lambda url, **options: (FailingFileSystem(error), url))
    with pytest.raises(error_type) as exc_info:
        open_tables("x://a.csv")
    assert str(exc_info.value).startswith(sentence)


@pytest.mark.parametrize(
    ("answers", "error_type", "sentence"),
    [
        ({"": "220 ready"}, ServiceError, "could not fetch {url}: EOFError; run again"),
        ({"": "421 too many"}, ServiceError, "could not fetch {url}: 421 too many; run again"),
        ({"": "hello"}, ServiceError, "could not fetch {url}: hello; run again"),
        (
            {"": "220 ready", "USER": "331 go on", "PASS": "530 Login incorrect."},
            TableError,
            "{url}: the server refuses it: 530 Login incorrect.",
        ),
        (
            {"": "220 ready", "USER": "331 go on", "PASS": "230 in"},
            ServiceError,
            "could not fetch {url}: EOFError; run again",
        ),
    ],
)
def test_answers_of_an_ftp_server(answers: dict[str, str], error_type: type[Exception], sentence: str) -> None:
    with answer_ftp(answers) as address, pytest.raises(error_type) as exc_info:
        open_tables(f"ftp://me:SECRET@{address}/t.csv")
    assert str(exc_info.value).startswith(sentence.format(url=f"ftp://me@{address}/t.csv"))
    assert "SECRET" not in str(exc_info.value)


def test_a_folder_that_a_glob_matches_is_read_as_a_folder(memory: Any) -> None:
    names = ["lang=en/a.csv", "lang=de/deep/b.csv", "c.csv", "_tmp/d.csv", "lang=en/.hidden.csv", "lang=en/notes.md"]
    for name in names:
        content = f"prompt\n{name}\n".encode()
        write_bytes(Path("ds", name), content)
        memory.pipe(f"/ds/{name}", content)
    for base in ("ds", "memory://ds"):
        for pattern in ("*", "**", "**/*"):
            with open_tables(f"{base}/{pattern}") as tables:
                requests = [item for item in tables.read_rows(RULES) if isinstance(item, PromptRequest)]
                assert tables.files == [f"{base}/{name}" for name in ("c.csv", "lang=de/deep/b.csv", "lang=en/a.csv")]
                assert {"_tmp/", ".hidden.csv", "notes.md"} == {
                    Path(name).name + "/" * name.endswith("/")
                    for items in tables.ignored_files.group().values()
                    for name in items
                }
            assert [item.id for item in requests] == ["c-00000000", "lang=de-deep-b-00000000", "lang=en-a-00000000"]
            assert [item.carried.get("lang") for item in requests] == [None, "de", "en"]
        assert [item.id for item in read_requests(f"{base}/lang=*")] == [item.id for item in requests[1:]]
        with open_tables(base) as tables:
            assert tables.files == [item.source.file for item in requests]


def test_unreadable_links_and_folders_that_a_glob_matches_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(Path("ds/a/t.csv"), [["prompt"], ["x"]])
    write_csv(Path("elsewhere/b.csv"), [["prompt"], ["x"]])
    Path("ds/link").symlink_to(Path("elsewhere").resolve())
    Path("ds/closed").mkdir()
    refuse_to_list("closed", monkeypatch)
    with open_tables("ds/*") as tables:
        assert tables.unreadable_files == {"ds/closed": "ds/closed: Permission denied"}
        assert str(tables.ignored_files) == "as links to folders: ds/link/"
        assert tables.files == ["ds/a/t.csv", "ds/closed"]
    for pattern in ("ds/*/*.csv", "ds/**/t.csv"):
        with open_tables(pattern) as tables:
            assert tables.unreadable_files == {"ds/closed": "ds/closed: Permission denied"}
            assert "ds/a/t.csv" in tables.files


def test_a_forbidden_file_in_a_folder_is_one_invalid_result(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe({"/t/a.txt": b"x", "/t/b.txt": b"y"})
    get_file = type(memory).get_file

    def get_or_refuse(self: Any, path: str, *rest: Any, **options: Any) -> Any:
        if path.endswith("a.txt"):
            raise PermissionError(13, "Forbidden")
        return get_file(self, path, *rest, **options)

    monkeypatch.setattr(type(memory), "get_file", get_or_refuse)
    bad, good = read("memory://t")
    assert isinstance(bad, ResultRow)
    assert (bad.id, bad.source_file) == ("a-00000000", "memory://t/a.txt")
    assert "no permission to read it" in (bad.error or "")
    assert good.prompt == "y"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://TOKEN@host/t.csv?sig=S&x=1#S", "https://host/t.csv"),
        ("HTTPS://u:S@h@ost:1/t.csv?a=b::c", "HTTPS://ost:1/t.csv"),
        ("zip://p.csv::https://TOKEN@host/x.zip?sig=S", "zip://p.csv::https://host/x.zip"),
        ("simplecache::https://u:S@host/t.csv?sig=S", "simplecache::https://host/t.csv"),
        ("zip://a?.csv::simplecache::s3://K:S@bucket/x.zip?sig=S/S", "zip://a?.csv::simplecache::s3://bucket/x.zip"),
        (
            "abfss://container@account.dfs.core.windows.net/t.csv?sv=1&sig=S",
            "abfss://container@account.dfs.core.windows.net/t.csv",
        ),
        ("sftp://me:S@host/t.csv", "sftp://me@host/t.csv"),
        ("github://org:S@main/t.csv", "github://main/t.csv"),
        ("memory://t/a?[0-9]/key=?/x?.csv", "memory://t/a?[0-9]/key=?/x?.csv"),
        ("file:///a@b/t.csv", "file:///a@b/t.csv"),
        ("local/a@b?c=d.csv", "local/a@b?c=d.csv"),
    ],
)
def test_secrets_are_removed_from_a_url_and_from_every_url_in_a_chain(url: str, name: str) -> None:
    assert redact_url(url) == name


def test_secrets_are_removed_from_a_library_message() -> None:
    text = "cannot open 'https://TOKEN@host/x?sig=S', tried zip://a.csv::https://h/x.zip?sig=S again"
    assert redact_urls(text) == "cannot open 'https://host/x', tried zip://a.csv::https://h/x.zip again"


# HTTP, with a real server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "served").mkdir()
    with serve_folder(tmp_path / "served") as address:
        yield address


@pytest.mark.parametrize("suffix", FORMATS)
def test_any_format_can_be_read_over_http(suffix: str, server: str, temporary: Path) -> None:
    write_bytes(Path(f"served/t.{suffix}"), in_format(suffix, ROWS))
    with open_tables(f"{server}/t.{suffix}?sig=secret#part") as tables:
        assert tables.files == [f"{server}/t.{suffix}"]
        rows = [item for item in tables.read_rows(RULES) if isinstance(item, PromptRequest)]
    assert comparable_rows(rows) == expected()
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("chain", "answer"),
    [
        ("{}/t.csv", None),
        ("simplecache::{}/t.csv", None),
        ("zip://in/t.csv::simplecache::{}/x.zip", None),
        ("zip://in::simplecache::{}/x.zip", None),
        ("zip://in/*.csv::simplecache::{}/x.zip", None),
        ("simplecache::{}/missing.csv", "no such file"),
        ("{}/403/t.csv", "HTTP 403"),
        ("simplecache::{}/500/t.csv", "HTTP 500"),
        ("simplecache::{}/short/t.csv", "could not fetch"),
        ("zip://t.csv::simplecache::{}/t.csv", "not a zip file"),
        ("zip://in/t.csv::{}/x.zip", "range requests"),
    ],
)
def test_secrets_in_a_chain_are_used_and_not_shown(
    chain: str, answer: str | None, server: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    write_bytes(Path("served/t.csv"), b"prompt\nx\n")
    with zipfile.ZipFile("served/x.zip", "w") as archive:
        archive.writestr("in/t.csv", "prompt\nx\n")
    url = f"{chain.format(server.replace('://', '://me:TOP-SECRET@'))}?sig=TOP-SECRET"
    if answer is None:
        (row,) = read_requests(url)
        assert (row.id, row.prompt) == ("t-00000000", "x")
        text = row.source.file
    else:
        with pytest.raises((TableError, RetryableError), match=answer) as exc_info:
            open_tables(url)
        text = str(exc_info.value)
    assert server in text
    text += "".join(record.getMessage() for record in caplog.records if record.name.startswith("batch_infer"))
    assert "SECRET" not in text + "".join(capfd.readouterr())


def test_urls_with_different_queries_are_different_files(server: str) -> None:
    write_bytes(Path("served/t.csv"), b"id,prompt\na,x\n")
    rows = read(f"{server}/t.csv?part=1", f"{server}/t.csv?part=2", f"{server}/t.csv?part=1")
    assert [item.id for item in rows] == ["a", "t-00000000"]
    assert isinstance(rows[1], ResultRow)
    assert rows[1].error == "duplicate id 'a'"


@pytest.mark.parametrize("chain", ["{}/t.csv?in={}", "simplecache::{}/t.csv.gz?in={}", "{}/t.csv?sig=SECRET&in={}"])
def test_urls_that_differ_in_secret_parts_are_different_files(chain: str, server: str) -> None:
    for name in "ab":
        write_bytes(Path(f"served/{name}/t.csv"), f"id,prompt\n{name},in {name}\n".encode())
        write_bytes(Path(f"served/{name}/t.csv.gz"), compress("gz", f"id,prompt\n{name},in {name}\n".encode()))
    urls = [chain.format(server, name) for name in "aba"]
    rows = read_requests(*urls)
    assert [item.prompt for item in rows] == ["in a", "in b"]
    assert [item.source.file for item in rows] == [redact_url(urls[0]), f"{redact_url(urls[0])}#2"]
    assert {item.source.stem for item in rows} == {"t"}
    assert "SECRET" not in str(rows)
    with open_tables(*urls) as tables:
        assert tables.files == [item.source.file for item in rows]
    assert [item.id for item in read_requests(*urls, columns={"id": ""}, id_from="content")] == [
        item.id for item in read_requests(urls[1], urls[0], columns={"id": ""}, id_from="content")
    ][::-1]
    refusal = refusal_of(*urls, columns={"id": ""})
    assert refusal.startswith(
        f"{redact_url(urls[0])} and {redact_url(urls[0])}#2 would give their rows the same ids (t-00000000"
    )
    assert "--id-from content" in refusal


def test_unreadable_urls_that_differ_in_secret_parts_are_reported_once(server: str) -> None:
    url = f"{server}/missing.csv"
    assert refusal_of(f"{url}?id=1", f"{url}?id=2") == f"{url}: no such file or folder"


def test_a_folder_and_a_file_in_it_are_identified_by_the_whole_url(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/t/a.csv", b"prompt\nx\n")
    with monkeypatch.context() as patched:
        patched.setattr(fsspec, "url_to_fs", lambda url, **options: (memory, re.sub("memory:/|[?].*", "", url)))
        assert len(read_requests("memory://t?v=1", "memory://t/a.csv?v=1", "memory://t/*.csv?v=1")) == 1
        with open_tables("memory://t?v=1", "memory://t/a.csv?v=2", id_from="content") as tables:
            assert tables.files == ["memory://t/a.csv", "memory://t/a.csv#2"]


def test_file_names_that_are_not_utf_8_are_different_files() -> None:
    for name in (b"caf\xe8.csv", b"caf\xe9.csv"):
        write_csv(Path(os.fsdecode(name)), [["id", "prompt"], [name.hex(), "x"]])
    assert {item.source.file for item in read_requests(".")} == {"caf\ufffd.csv", "caf\ufffd.csv#2"}


@pytest.mark.parametrize(
    ("path", "error_type", "sentence"),
    [
        ("missing.csv", TableError, "{url}: no such file or folder"),
        ("403/t.csv", TableError, "{url}: the server refuses it: HTTP 403 Forbidden"),
        ("500/t.csv", RetryableError, "could not fetch {url}: HTTP 500 Internal Server Error; run again"),
        ("429/t.csv", RetryableError, "could not fetch {url}: HTTP 429 Too Many Requests; run again"),
        ("short/t.csv", RetryableError, "could not fetch {url}: "),
        ("folder/", TableError, "{url}: unknown file extension (none)"),
        ("*.csv", TableError, "{url}: no such file or folder"),
    ],
)
def test_answers_of_an_http_server(
    path: str, error_type: type[Exception], sentence: str, server: str, temporary: Path
) -> None:
    with pytest.raises(error_type) as exc_info:
        open_tables(f"{server}/{path}?sig=secret")
    assert str(exc_info.value).startswith(sentence.format(url=f"{server}/{path}"))
    assert "secret" not in str(exc_info.value)
    assert not list(temporary.iterdir())


def test_a_service_that_is_down_ends_the_run_temporarily(temporary: Path) -> None:
    """Its rows are not invalid, since the same command can read them later."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # without listening, so connections to this port fail
        port = unused.getsockname()[1]
        write_csv(Path("good.csv"), [["prompt"], ["x"]])
        with pytest.raises(RetryableError, match=rf"could not fetch http://127.0.0.1:{port}/t.csv: .*; run again"):
            open_tables("good.csv", f"http://127.0.0.1:{port}/t.csv")
    assert not list(temporary.iterdir())


def test_the_missing_extra_for_http_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert refusal_of("https://host/t.csv?sig=secret") == (
        "https://host/t.csv: reading https:// needs aiohttp: pip install aiohttp"
    )


def test_local_tables_do_not_import_fsspec() -> None:
    script = "import sys, batch_infer.table; print('fsspec' in sys.modules)"
    output = subprocess.check_output([sys.executable, "-c", script], text=True, stderr=subprocess.PIPE)
    assert output == "False\n"
