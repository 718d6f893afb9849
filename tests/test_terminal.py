"""Test output to terminals and text logs: control characters are escaped, and no encoding fails."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batch_infer.engines import inline
from batch_infer.engines.worker_process import leave_removed_folder
from batch_infer.jobs import execution, scan
from batch_infer.store import log_handler
from batch_infer.store.logfile import open_log
from batch_infer.terminal import escape_controls, never_fail_to_encode
from batch_infer.worker import loading
from tests.runs import QUICK, command, results, run
from tests.tables import write_csv

TITLE = "\x1b]0;all ok\x07"
FORGED = "x\nbatch-infer: forged"
BAD = [
    ["prompt", "id", "steps"],
    ["a red circle", "whole", ""],
    ["", f"{TITLE}", ""],
    ["", FORGED, ""],
    ["", "\u202egnp", ""],
]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, 'é' and 日本 👩‍🚀", "plain, 'é' and 日本 👩‍🚀"),
        (TITLE, r"\x1b]0;all ok\x07"),
        ("a\r\nb\tc\x9b", r"a\r\nb\tc\x9b"),
        ("\u2028\u2066\udcff", r"\u2028\u2066\udcff"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert escape_controls(text) == shown


def assert_clean(*texts: str) -> None:
    for text in texts:
        assert not [line for line in text.splitlines() if line != escape_controls(line)]
        assert not [line for line in text.splitlines() if line.startswith("batch-infer: forged")]


@pytest.mark.usefixtures("probe_here")
def test_a_table_sends_no_control_character_to_a_terminal_or_a_text_log(tmp_path: Path, out: Path) -> None:
    table = write_csv(tmp_path / f"{TITLE}t.csv", BAD)
    done = run(table, out)
    planned = command("plan", table, "--out", tmp_path / "other", *QUICK)
    assert (done.code, planned.code) == (3, 3)
    for text in (done.stderr, planned.stdout, (out / "logs" / "run.log").read_text("utf-8")):
        assert r"\x1b]0;all ok\x07" in text
    assert_clean(
        done.stdout, done.stderr, planned.stdout, planned.stderr, (out / "logs" / "run.log").read_text("utf-8")
    )
    assert FORGED in [row["id"] for row in results(out)], "results keep what the table says"


def test_json_escapes_control_characters(tmp_path: Path, out: Path) -> None:
    done = run(write_csv(tmp_path / "t.csv", BAD), out, "--log-format", "json", "--json")
    assert FORGED in " ".join(json.loads(line)["message"] for line in done.stderr.splitlines())


@pytest.mark.parametrize("arguments", [("run", "--no-such\x1b]0;x\x07"), ("status", "no\x1b[31m")])
def test_an_error_message_sends_no_control_character(arguments: tuple[str, ...]) -> None:
    done = command(*arguments)
    assert done.code == 2
    assert r"\x1b" in done.stderr
    assert_clean(done.stderr)


def test_a_traceback_in_a_log_keeps_only_its_own_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "run.log"
    with pytest.raises(ValueError, match="odd"), open_log(path) as file:
        try:
            raise KeyError(TITLE)
        except KeyError:
            logger = logging.getLogger("test_terminal")
            log_handler(file).handle(logger.makeRecord("x", 40, "", 0, "broke", (), sys.exc_info()))
        raise ValueError(f"odd \udcff{TITLE}")
    text = path.read_text("utf-8")
    assert len(text.splitlines()) > 5
    assert r"ValueError: odd \udcff\x1b]0;all ok\x07" in text
    assert_clean(text)


# Encodings and folders


def test_a_stream_replaces_what_its_encoding_lacks() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    never_fail_to_encode(stream)
    stream.write("4 rows · é")
    stream.flush()
    assert raw.getvalue() == rb"4 rows - \xe9"


def in_a_process(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": root, **environment},
    )  # fmt: skip


MERGE = "import sys; from batch_infer.__main__ import main; sys.argv[1:] = ['merge', {out!r}]; main()"


@pytest.mark.parametrize(("encoding", "mark"), [("iso8859-5", "-"), ("shift_jis", "-"), ("ascii", "·")])
def test_reports_can_be_written_in_any_encoding(tmp_path: Path, out: Path, encoding: str, mark: str) -> None:
    """If the encoding is ASCII, click assumes a mistake and writes UTF-8."""
    run(write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]]), out)
    done = in_a_process(MERGE.format(out=str(out)), tmp_path, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"1 row {mark} 1 ok {mark} 0 flagged\n")


@pytest.mark.skipif(os.name == "nt", reason="a current folder cannot be removed there")
def test_a_removed_current_folder_is_a_clear_error(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    removed = f"import os; os.rmdir({str(folder)!r}); "
    done = in_a_process(removed + MERGE.format(out=str(out)), folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.splitlines()[-1]
        == "batch-infer: the current folder was removed: change to one that exists, and run again"
    )


@pytest.mark.skipif(os.name == "nt", reason="a current folder cannot be removed there")
def test_a_worker_can_be_started_after_the_current_folder_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    leave_removed_folder()
    assert Path.cwd() == folder, "a folder that exists is kept"
    folder.rmdir()
    leave_removed_folder()
    assert Path.cwd() == Path("/")
    monkeypatch.chdir(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="a current folder cannot be removed there")
@pytest.mark.parametrize("moment", ["before", "meanwhile", "after"])
def test_the_current_folder_may_be_removed_during_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """OUT is in another folder, under a path relative to the removed one."""
    folder, load, walk = tmp_path / "gone", loading.load_chain, scan.scan_tables
    folder.mkdir()
    table = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]])
    monkeypatch.chdir(folder)

    def load_chain(*arguments: Any) -> Any:
        if moment == "meanwhile":
            folder.rmdir()
            os.getcwd()  # torch calls it on import  # noqa: PTH109
        chain = load(*arguments)
        if moment == "after":
            folder.rmdir()
        return chain

    def scan_tables(*arguments: Any, **more: Any) -> Any:
        result = walk(*arguments, **more)
        if moment == "before":
            folder.rmdir()
        return result

    monkeypatch.setattr(inline, "load_chain", load_chain)
    monkeypatch.setattr(execution, "scan_tables", scan_tables)
    done = run(table, Path("../out"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    if moment == "meanwhile":
        assert done.code == 75
        assert "the current folder was removed while the model was loaded: change to one that" in done.stderr
        assert run(table, Path("out")).code == 0
    assert done.code == 0 or moment == "meanwhile", done.stderr
    assert [row["status"] for row in results(tmp_path / "out")] == ["ok"]


@pytest.mark.skipif(os.name == "nt", reason="a current folder cannot be removed there")
@pytest.mark.parametrize("name", ["run", "plan", "status", "merge", "retry", "rescore", "bench"])
def test_a_command_in_a_removed_folder_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    done = command(name, "t.csv")
    monkeypatch.chdir(tmp_path)
    assert (done.code, done.stdout) == (2, "")
    assert "the current folder was removed: change to one that exists, and run again" in done.stderr
    assert "Traceback" not in done.stderr
