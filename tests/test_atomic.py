"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from batch_infer import atomic
from batch_infer.atomic import TEMPORARY, replacing
from batch_infer.errors import StorageError


@pytest.mark.parametrize("flush", [True, False])
def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path, flush: bool) -> None:
    path = tmp_path / "deep" / "file"
    for content in ("first", "second"):
        with replacing(path, flush=flush) as temporary:
            temporary.write_text(content)
            assert not path.exists() or path.read_text() == "first"
            assert temporary.parent == path.parent
            assert temporary.name.startswith(TEMPORARY)
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_breaks_off_leaves_what_was_there(tmp_path: Path, end: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(end), replacing(path) as temporary:
        temporary.write_text("half")
        raise end
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["a file/file", "a folder"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "a folder" / "inner").mkdir(parents=True)
    with (
        pytest.raises(StorageError, match=f"cannot write {re.escape(str(tmp_path / place))}: "),
        replacing(tmp_path / place) as temporary,
    ):
        temporary.write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {"a file", "a folder"}


def test_the_disk_holds_the_bytes_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    seen = []

    def sync(temporary: Path) -> None:
        seen.append((temporary.read_text(), path.exists()))

    monkeypatch.setattr(atomic, "sync", sync)
    with replacing(path) as temporary:
        temporary.write_text("x")
    assert seen == [("x", False)]


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    script = """
import sys, time, pathlib
from batch_infer.atomic import replacing
with replacing(pathlib.Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        writer.stdout.readline()
        writer.kill()
    assert writer.returncode == -signal.SIGKILL
    assert path.read_text() == "before"


def test_two_processes_do_not_share_a_temporary_name(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as temporary:
        temporary.touch()
        assert str(os.getpid()) in temporary.name
