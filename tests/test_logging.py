"""Test the log on stderr: JSON lines alone with --log-format json, and nothing on success with -q."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from batch_infer.cli import commands, logs, progress
from batch_infer.cli.logs import set_log_format, set_up_logging
from batch_infer.cli.progress import ProgressBar, ProgressLog, make_progress
from batch_infer.cli.report import stoppable
from batch_infer.jobs.scan import ScanResult
from batch_infer.models import DEMO_MODEL
from batch_infer.stopping import deferred
from tests.runs import command, run
from tests.tables import write_csv


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"], ["a green star"], [""]])


def objects(text: str) -> list[dict[str, Any]]:
    """Parse a JSON log and check that each line has a current time, level, logger and message."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        logged_at = datetime.fromisoformat(line["time"])
        assert logged_at.utcoffset() == timedelta(0)
        assert abs(datetime.now(timezone.utc) - logged_at) < timedelta(minutes=5)
        assert line["level"] in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
        assert line["logger"]
        assert line["message"]
    return lines


def messages(text: str) -> list[str]:
    return [line["message"] for line in objects(text)]


# JSON lines


def test_a_run_logs_json_lines(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.0)
    done = run(table, tmp_path / "out", "--log-format", "json", "--json")
    assert done.code == 3
    assert json.loads(done.stdout)["ok"] + json.loads(done.stdout)["flagged"] == 2, "the result is on stdout, as always"
    lines = objects(done.stderr)
    assert {line["logger"] for line in lines} == {"batch_infer"}
    start = next(line for line in lines if "pending" in line)
    assert (start["message"], start["pending"], start["invalid"]) == ("2 to render, 0 already done, 1 invalid", 2, 1)
    assert [line for line in lines if line["level"] == "WARNING"][0]["message"].endswith("the prompt is empty")
    last = [line for line in lines if "images_per_second" in line][-1]
    assert (last["done"], last["total"], last["seconds_left"]) == (3, 3, 0)
    assert last["images_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("run", "missing.csv"), 2, "missing.csv: no such file or folder"),
        (("run", "missing.csv", "--bogus"), 2, "run has no option --bogus."),
        (("run", "missing.csv", "--steps", "ten"), 2, "'--num-inference-steps': 'ten' is not a valid integer."),
        (("run",), 2, "Missing argument 'TABLE...'."),
        (("status", "nowhere"), 2, "nowhere contains no run"),
        (("retry", "nowhere", "--status", "failed"), 2, "nowhere contains no run"),
        (("merge", "nowhere"), 2, "nothing to merge"),
        (("plan", "missing.csv"), 2, "missing.csv: no such file or folder"),
        (("bench", "--steps", "x"), 2, "--steps x"),
        (("stattus", "nowhere"), 2, "No such command 'stattus'."),
    ],
)
@pytest.mark.parametrize("way", ["flag", "joined", "variable"])
def test_an_error_is_one_json_object(
    arguments: tuple[str, ...], code: int, sentence: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "variable":
        monkeypatch.setenv("BATCH_INFER_LOG_FORMAT", "json")
    flag = {"flag": ("--log-format", "json"), "joined": ("--log-format=json",), "variable": ()}[way]
    done = command(*arguments, *flag)
    last = objects(done.stderr)[-1]
    assert (done.code, done.stdout) == (code, "")
    assert sentence in last["message"]
    assert (last["level"], last["logger"], last["exit_code"]) == ("ERROR", "batch_infer", code)


@pytest.mark.parametrize("more", ["steps = 'ten'", "stepps = 3", "limit = 1"])
@pytest.mark.parametrize("way", ["flag", "variable"])
def test_the_config_file_sets_the_log_format(
    tmp_path: Path, more: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "job.toml"
    config.write_text(f"log-format = 'json'\n{more}\n")
    if way == "variable":
        monkeypatch.setenv("BATCH_INFER_CONFIG", str(config))
    flag = ("--config", config) if way == "flag" else ()
    for arguments in (("missing.csv",), (), ("missing.csv", "--bogus")):
        assert objects(command("run", *arguments, *flag).stderr), "errors of the parser too"
    for flags in (("--log-format", "text", "--config", config), ("--config", config, "--log-format", "text")):
        stderr = command("run", "missing.csv", *flags).stderr
        assert stderr.startswith(("batch-infer: ", "Usage: "))


@pytest.mark.parametrize("option", ["log_format", "quiet", "verbose"])
def test_every_command_has_the_logging_options(option: str) -> None:
    assert [name for name, each in commands.commands.items() if option not in {p.name for p in each.params}] == []


def test_an_unknown_log_format_is_refused(tmp_path: Path) -> None:
    done = command("run", "t.csv", "-o", tmp_path / "out", "--log-format", "xml")
    assert (done.code, "'xml' is not one of 'text', 'json'" in done.stderr) == (2, True)


def test_extra_fields_and_exceptions_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    set_log_format("json")
    set_up_logging()
    try:
        raise ValueError("of\ntwo lines")
    except ValueError:
        logs.log.exception("it %s", "broke", extra={"path": Path("a/b"), "many": {"x": 1}, "odd": float("inf")})
    (line,) = objects(capsys.readouterr().err)
    assert (line["message"], line["level"], line["many"]) == ("it broke", "ERROR", {"x": 1})
    assert "a/b" in line["path"]
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: of\ntwo lines")


def test_a_signal_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    set_log_format("json")
    set_up_logging(quiet=True)
    with stoppable() as stop, deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
    (line,) = objects(capsys.readouterr().err)
    assert (line["level"], line["message"].split(";")[0]) == ("WARNING", "stopping")


def test_json_lines_replace_the_progress_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert isinstance(make_progress(shown=True), ProgressBar)
    set_log_format("json")
    lines = make_progress(shown=True)
    assert isinstance(lines, ProgressLog)
    set_up_logging()
    lines.start(ScanResult(total=1, pending=1))
    assert messages(capsys.readouterr().err) == ["1 to render, 0 already done", "loading model"]


FAULTY_SCRIPT = """
import gc, logging, sys, threading, types, warnings
from batch_infer.__main__ import main

def score(*_):
    handler = logging.StreamHandler()  # libraries create their own handlers
    logging.getLogger("library").addHandler(handler)
    logging.getLogger("library").warning("from a library\\nin two lines")
    warnings.warn("old\\n  and tired", FutureWarning)
    for percent in range(0, 101, 20):
        print(f"\\rloading {percent}%", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    class Grave:
        def __del__(self):
            raise LookupError("too late")
    Grave()
    gc.collect()
    print("not ended", end="", file=sys.stderr)
    raise ArithmeticError("a bug")

sys.modules["batch_infer.jobs"] = types.SimpleNamespace(render_tables=score, join_run=lambda *_: False)
main()
"""


def test_stderr_of_libraries_and_tracebacks_are_objects() -> None:
    """In its own process, because the hooks are global."""
    line = [sys.executable, "-c", FAULTY_SCRIPT, "run", "t.csv", "--log-format", "json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stdout) == (1, "")
    logged = [(line["logger"], line["level"], line["message"]) for line in objects(done.stderr)]
    assert logged == [
        ("stderr", "WARNING", "from a library"),
        ("stderr", "WARNING", "in two lines"),
        ("py.warnings", "WARNING", "<string>:9: FutureWarning: old and tired"),
        ("stderr", "WARNING", "loading 100%"),
        ("batch_infer", "CRITICAL", "ZeroDivisionError: division by zero"),
        ("batch_infer", "CRITICAL", "LookupError: too late"),
        ("stderr", "WARNING", "not ended"),
        ("batch_infer", "CRITICAL", "ArithmeticError: a bug"),
    ]
    assert objects(done.stderr)[-1]["exception"].count("Traceback") == 1
    quiet = subprocess.run([*line, "-q"], capture_output=True, text=True, check=False, timeout=600)
    assert [line["level"] for line in objects(quiet.stderr)] == ["CRITICAL"] * 3, "bugs are logged with -q too"


STUB = """
import sys, types
from batch_infer.__main__ import main
from batch_infer.cli.logs import log
from batch_infer.jobs.summary import Counts, Summary

def score(*_):
    log.info("rendering")
    return Summary(Counts(rows=2, images=2, ok=2), unfinished=int("--seed" in sys.argv))

sys.modules["batch_infer.jobs"] = types.SimpleNamespace(
    render_tables=score, join_run=lambda *_: False, find_gallery=lambda _: None
)
main()
"""


def run_in_shell(streams: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command without rendering, with streams redirected by a shell. The code is its own, even in a pipe."""
    script = f'"$@" {streams}'
    line = ["bash", "-o", "pipefail", "-c", script, "-", sys.executable, "-c", STUB, "run", "t.csv", *options]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.parametrize(("options", "code"), [((), 0), (("--seed", "1"), 75)])
@pytest.mark.parametrize(
    ("streams", "reason"),
    [("| sleep 0 <&-", "stdout is closed"), (">/dev/full", "No space left on device"), (">&-", None)],
)
def test_a_closed_stdout_does_not_fail_a_run(
    streams: str, reason: str | None, options: tuple[str, ...], code: int
) -> None:
    done = run_in_shell(streams, *options)
    logged = [f"batch-infer: the result is not printed: {reason}"] if reason else []
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.splitlines() == ["batch-infer: rendering", *logged]


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full", "2> >(sleep 0 <&-)", "<&- 2>&-"])
def test_a_closed_stderr_drops_the_log(streams: str, log_format: str) -> None:
    done = run_in_shell(streams, "--log-format", log_format)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("2 rows · 2 ok · ")
    assert "rendering" not in done.stdout


# Warnings, and quiet


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_python_warning_is_one_line_and_hidden_by_quiet(capsys: pytest.CaptureFixture[str], log_format: str) -> None:
    set_log_format(log_format)
    warning = 'a "b".py:3: FutureWarning: in two lines with a %'
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        set_up_logging()
        warnings.warn_explicit("in two\n  lines with a %", FutureWarning, 'a "b".py', 3)
        written = capsys.readouterr().err
        set_up_logging(quiet=True)
        warnings.warn_explicit("again", FutureWarning, "a.py", 3)
    assert (messages(written) if log_format == "json" else written.splitlines()) == [
        warning if log_format == "json" else f"batch-infer: {warning}"
    ]
    assert capsys.readouterr().err == ""


def test_a_warning_of_a_worker_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    text = warnings.formatwarning("old\nand tired", FutureWarning, "/a.py", 7, "code(here)")
    logging.getLogger("py.warnings").handle(logging.LogRecord("py.warnings", 30, "", 0, text, (), None))
    assert capsys.readouterr().err == "batch-infer: /a.py:7: FutureWarning: old and tired code(here)\n"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_quiet_hides_warnings_of_diffusers(tmp_path: Path, log_format: str) -> None:
    """The model has the outdated scheduler config of the first Stable Diffusion."""
    model = tmp_path / "old"
    shutil.copytree(DEMO_MODEL, model)
    config = model / "scheduler" / "scheduler_config.json"
    current = json.loads(config.read_text())
    config.write_text(
        json.dumps({**current, "steps_offset": 0, "predict_epsilon": True, "variance_type": "fixed_small"})
    )
    table = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]])
    options = ("--model", str(model), "--log-format", log_format)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        loud = run(table, tmp_path / "loud", *options)
        quiet = run(table, tmp_path / "quiet", *options, "-q")
    assert (loud.code, quiet.code, quiet.stdout, quiet.stderr) == (0, 0, "", "")
    assert loud.stderr.count("FutureWarning: ") == 1
    if log_format == "json":
        assert objects(loud.stderr)
    else:
        assert all(line.startswith("batch-infer: ") for line in loud.stderr.splitlines())


def test_quiet_prints_the_summary_on_failure(table: Path, tmp_path: Path) -> None:
    done = run(table, tmp_path / "out", "-q")
    assert (done.code, done.stderr) == (3, "")
    assert done.stdout.startswith("3 rows · ")
    assert "1 invalid" in done.stdout
    assert "1 invalid" in command("status", tmp_path / "out", "-v").stdout
    status = command("status", tmp_path / "out", "-q")
    assert (status.code, status.stdout, status.stderr) == (0, "", "")
    assert command("status", tmp_path, "-q").stderr.startswith("batch-infer: ")
    assert command("run", table, "--model", "/nowhere", "-q").stderr.startswith("batch-infer: ")
