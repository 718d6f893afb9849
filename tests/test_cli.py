"""Test progress, help, signals and exit codes of the command line."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click import Context, Option

from batch_infer import stopping
from batch_infer.cli import commands, logs
from batch_infer.cli.logs import set_up_logging
from batch_infer.cli.progress import ProgressBar, ProgressGroup, ProgressLog, make_progress
from batch_infer.cli.report import NOTHING_KEPT, stoppable
from batch_infer.errors import StoppedError
from batch_infer.jobs.scan import ScanResult
from batch_infer.records import ResultRow, utc_now
from batch_infer.stopping import STOP_SIGNALS, deferred
from tests import runs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def rows(*statuses: Any) -> list[ResultRow]:
    return [
        ResultRow(id=f"{i}", image_index=0, prompt="x", status=status, finished_at=utc_now(), source_file="t.csv",
                  source_row=i, fingerprint="f") for i, status in enumerate(statuses)
    ]  # fmt: skip


# Progress


def test_progress_is_a_bar_on_a_terminal_and_log_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_progress(shown=True), ProgressLog)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(make_progress(shown=True), ProgressBar)
    assert isinstance(make_progress(shown=False), ProgressGroup)


def test_bar_counts_finished_rows_of_earlier_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = make_progress(shown=True)
    bar.start(ScanResult(total=10, finished=5, invalid=1, pending=4))
    bar.committed(rows("ok", "flagged", "failed", "ok"))
    bar.close()
    last = terminal.getvalue().strip().split("\r")[-1]
    assert last.startswith("100%")
    assert "10/10" in last
    assert "1 flagged, 1 failed, 1 invalid" in last


@pytest.mark.parametrize(
    ("quiet", "verbose", "levels"),
    [(False, False, ["info", "warning", "error"]), (True, False, ["error"]),
     (False, True, ["debug", "info", "warning", "error"])],
)  # fmt: skip
def test_log_levels(capsys: pytest.CaptureFixture[str], quiet: bool, verbose: bool, levels: list[str]) -> None:
    set_up_logging(quiet=quiet, verbose=verbose)
    for level in ("debug", "info", "warning", "error"):
        getattr(logs.log, level)(level)
    assert capsys.readouterr().err.split() == [word for level in levels for word in ("batch-infer:", level)]


# Help


@pytest.mark.parametrize("name", commands.commands)
def test_help_does_not_break_words(name: str) -> None:
    """On a terminal of 80 columns, words that a reader may copy are split only after a hyphen."""
    command = commands.commands[name]
    with Context(command, info_name=name, terminal_width=80) as context:
        words = re.sub(r"(?<=\w-)\s+", "", command.get_help(context)).split()
    for option in command.params:
        for word in (getattr(option, "help", None) or "").split():
            assert word in words, f"{option.name}: {word}"


def test_help_groups_the_options_of_a_run() -> None:
    command = commands.commands["run"]
    with Context(command, info_name="run", terminal_width=80) as context:
        sections = dict(re.findall(r"^(\w.*):\n((?:  .*\n|\n)+)", command.get_help(context) + "\n", re.MULTILINE))
    assert list(sections) == [
        *("Tables and OUT", "Defaults for rows", "Model", "Devices and speed", "Safety", "Images and results"),
        *("Run", "Other options"),
    ]
    assert "  --slots, --batch-size" in sections["Devices and speed"]
    assert "--help" in sections["Other options"]
    names = set(re.findall(r"--[a-z0-9-]+", "".join(sections.values())))
    assert {name for option in command.params if isinstance(option, Option) for name in option.opts[-1:]} <= names


# Signals


@pytest.mark.usefixtures("default_hangup")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_interrupts_a_command(number: signal.Signals) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(StoppedError, match=f"stopped by {number.name}; nothing is kept"), stoppable(hint=NOTHING_KEPT):
        os.kill(os.getpid(), number)
        pytest.fail("not reached")
    assert before == [signal.getsignal(number) for number in STOP_SIGNALS]


@pytest.mark.usefixtures("default_hangup")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_second_signal_ends_a_deferred_stop_at_once(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoppedError), stoppable() as stop, deferred():
        os.kill(os.getpid(), number)
        assert stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(), "`timeout` signals the process and then its group, which counts as one signal"
        monkeypatch.setattr(stopping, "REPEAT_SECONDS", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("not reached")


def test_time_limit_interrupts_a_command() -> None:
    with pytest.raises(StoppedError, match="the time limit was reached; what was committed is kept"), stoppable(0.01):
        time.sleep(60)


def test_grace_period_after_a_deferred_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "GRACE_SECONDS", 0.01)
    with pytest.raises(StoppedError), stoppable():
        with deferred():
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    with pytest.raises(StoppedError), stoppable(), deferred(0.01):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def test_hangup_stays_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_handlers_of_an_embedding_program_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """getsignal returns None for a handler that Python did not set, and signal.signal cannot restore it."""
    replaced: list[int] = []

    def replace(number: int, _: object) -> object:
        replaced.append(number)
        return signal.SIG_DFL

    monkeypatch.setattr(signal, "getsignal", lambda number: None if number != signal.SIGINT else signal.SIG_DFL)
    monkeypatch.setattr(signal, "signal", replace)
    monkeypatch.setattr(signal, "setitimer", lambda *_: pytest.fail("the handler of SIGALRM is not ours"))
    with stoppable(60.0) as stop, deferred(60.0):
        stop.reason = "the time limit"
    assert replaced == [signal.SIGINT, signal.SIGINT]


# Exit codes


def test_interrupt_ends_with_a_message_and_75(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("batch_infer.jobs.render_tables", interrupt)
    done = runs.run(tmp_path / "t.csv", tmp_path / "out")
    assert done.code == 75
    assert done.stderr.strip() == "batch-infer: interrupted. Run the same command again to continue"


def test_bug_ends_with_a_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("batch_infer.jobs.render_tables", fail)
    with pytest.raises(ZeroDivisionError):
        runs.run(tmp_path / "t.csv", tmp_path / "out")
