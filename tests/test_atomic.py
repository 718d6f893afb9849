"""Test atomic writes, names that are unique to a process, and pinned folders."""

from __future__ import annotations

import errno
import os
import pickle
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from batch_infer.errors import StorageError
from batch_infer.store import (
    TEMPORARY_PREFIX,
    atomic_write,
    files,
    host_id,
    is_temporary,
    temporary_path,
)
from batch_infer.store.files import is_case_sensitive, path_exists
from batch_infer.store.folder import PinnedFolder


@pytest.mark.parametrize("flush", [True, False])
def test_a_file_is_renamed_when_it_is_complete(tmp_path: Path, flush: bool) -> None:
    path = tmp_path / "deep" / "file"
    for content in ("first", "second"):
        with atomic_write(path, flush=flush) as temporary:
            temporary.write_text(content)
            assert not path.exists() or path.read_text() == "first"
            assert temporary.parent == path.parent
            assert temporary.name.startswith(TEMPORARY_PREFIX)
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, end: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(end), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise end
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["a file/file", "a folder"])
def test_the_error_names_a_path_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "a folder" / "inner").mkdir(parents=True)
    with (
        pytest.raises(StorageError, match=f"cannot write {re.escape(str(tmp_path / place))}: "),
        atomic_write(tmp_path / place) as temporary,
    ):
        temporary.write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {"a file", "a folder"}


def test_the_file_is_fsynced_before_the_rename_and_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    seen = []

    def sync(synced: Path) -> None:
        seen.append((synced.is_dir(), path.exists()))

    monkeypatch.setattr(files, "fsync", sync)
    with atomic_write(path) as temporary:
        temporary.write_text("x")
    assert seen == [(False, False), (True, True)]


def test_a_file_system_that_cannot_fsync_folders_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(faults[-1], "of a folder")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    faults = [errno.EIO, errno.EINVAL, errno.EBADF]
    for _ in range(2):
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("x")
        faults.pop()
    sentence = "cannot write .*file: Input/output error"
    with pytest.raises(StorageError, match=sentence), atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("x")


def test_without_parents_no_folder_is_created(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="cannot write .*gone/file: No such file"),
        atomic_write(tmp_path / "gone" / "file", parents=False) as temporary,
    ):
        temporary.write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_a_pinned_folder_is_recognised_until_another_replaces_it(tmp_path: Path) -> None:
    """Another process that receives the pinned folder recognises it too."""
    folder = tmp_path / "out"
    assert_gone(PinnedFolder.pin(folder))
    folder.mkdir()
    pinned = pickle.loads(pickle.dumps(PinnedFolder.pin(folder)))
    pinned.check()
    folder.rename(tmp_path / "renamed")
    assert_gone(pinned)
    folder.mkdir()
    assert_gone(pinned)
    folder.rmdir()
    (tmp_path / "renamed").rename(folder)
    pinned.check()
    assert PinnedFolder.pin(pinned) is pinned


def assert_gone(pinned: PinnedFolder, name: str = "out") -> None:
    with pytest.raises(StorageError, match=f"{name} has disappeared since the run began: .* put it back and run again"):
        pinned.check()


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    script = """
import sys, pathlib
from batch_infer.store.files import atomic_write
with atomic_write(pathlib.Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout
        writer.stdout.readline()
        writer.kill()
    assert writer.returncode == -signal.SIGKILL
    assert path.read_text() == "before"


def test_no_two_processes_share_a_temporary_name() -> None:
    """Not even after a fork. One process always uses the same name."""
    script = """
import os, pathlib
from batch_infer.store.files import temporary_path
reading, writing = os.pipe()
if os.fork() == 0:
    os.write(writing, str(temporary_path(pathlib.Path("file"))).encode())
    os._exit(0)
print(os.read(reading, 100).decode(), temporary_path(pathlib.Path("file")))
"""
    command = [sys.executable, "-c", script]
    names = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    here = {str(temporary_path(Path("file"))) for _ in range(2)}
    assert len({*names[0], *names[1], *here}) == 5


def test_a_folder_whose_inode_changes_is_recognised_by_its_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FUSE mounts change inode numbers. Only then is the marker read."""
    pinned = PinnedFolder.pin(tmp_path)
    marked = pinned.with_marker()
    assert PinnedFolder.pin(tmp_path) == marked
    assert pickle.loads(pickle.dumps(marked)) == marked
    with monkeypatch.context() as patch:
        patch.setattr("batch_infer.store.folder._identity", lambda _: (1, 2))
        marked.check()
        assert_gone(pinned, tmp_path.name)
        marked.remove_markers(())
        assert_gone(marked, tmp_path.name)
    marked.check()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_read_does_not_count_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = PinnedFolder.pin(tmp_path)

    def stat(path: Path, **_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(Path, "lstat", stat)
    for check in (pinned.check, lambda: path_exists(tmp_path / "x")):
        with pytest.raises(StorageError, match=f"cannot read {tmp_path}.*: Input/output error"):
            check()


def test_host_ids_of_containers_with_equal_names_differ_by_boot_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = set()
    for boot in ("a", "b", "a"):
        monkeypatch.setattr(files, "_BOOT_ID", tmp_path / "boot_id")
        (tmp_path / "boot_id").write_text(boot)
        ids.add(host_id.__wrapped__())
    assert len(ids) == 2


def test_only_our_own_names_are_temporary() -> None:
    assert is_temporary(temporary_path(Path("x")).name)
    assert not any(map(is_temporary, (".tmp-x", ".tmp-0a1b2c3d-x", "x", ".tmp-0a1b2c3d-1-0123456789ab-")))


def test_case_sensitivity_is_probed_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "A").touch()
    assert is_case_sensitive(tmp_path) == (not (tmp_path / "a").exists())
    assert [path.name for path in tmp_path.iterdir()] == ["A"]
    monkeypatch.setattr(files, "path_exists", lambda path: (path.parent / path.name.lower()).exists())
    assert not is_case_sensitive(tmp_path)
    with pytest.raises(StorageError, match="cannot write .*missing"):
        is_case_sensitive(tmp_path / "missing")
