"""Test log files in OUT: a full disk loses lines, but never masks an error."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from batch_infer.errors import StorageError
from batch_infer.store import log_handler
from batch_infer.store.logfile import open_log


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("batch_infer", logging.INFO, "", 0, message, None, None)


def test_a_log_contains_its_messages_and_the_final_error(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "run.log"
    with pytest.raises(ValueError, match="odd"), open_log(path) as file:
        log_handler(file).handle(record("began"))
        raise ValueError("odd")
    lines = path.read_text().splitlines()
    assert lines[0].endswith("Z INFO began")
    assert lines[-1] == "ValueError: odd"


def test_a_full_disk_masks_no_error_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StorageError, match="full"), open_log(Path("/dev/full")) as file:
        log_handler(file).handle(record("began"))
        raise StorageError("the disk is full")
    assert capfd.readouterr() == ("", "")


def test_a_log_that_cannot_be_opened_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError), open_log(tmp_path / "gone" / "logs" / "run.log"):
        raise AssertionError("it was opened")


@pytest.mark.parametrize("linked", ["logs", "logs/run.log"])
def test_links_are_not_followed(tmp_path: Path, linked: str) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir() if linked == "logs" else target.touch()
    link = tmp_path / linked
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target)
    with pytest.raises(StorageError, match=r"cannot write .*run\.log: "), open_log(tmp_path / "logs" / "run.log"):
        raise AssertionError("it was opened")
    assert not list(target.iterdir()) if linked == "logs" else not target.read_bytes()
