"""A path that cannot be read may exist, so failing to read OUT is a StorageError and changes nothing."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_infer.azureml.rendering import ProgressMarkers
from batch_infer.errors import StorageError
from batch_infer.jobs import recovery, run_folder
from batch_infer.sinks.folder import FolderSink
from batch_infer.store import LocalStore, unique_name
from batch_infer.store.files import is_folder, is_link, path_exists
from tests.storage import fail_at, no_rows

MARKER = ".begun-elsewhere-1-0123456789ab-x"
"""A marker of a process on another machine, which may have died."""


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOTCONN])
@pytest.mark.parametrize("name", ["", MARKER])
def test_an_unreadable_marker_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    (tmp_path / MARKER).write_text(json.dumps({"alone": True, "keys": [["a", 0]]}))
    assert ProgressMarkers(tmp_path).read_crashes().alone == {("a", 0)}
    index: Any = SimpleNamespace(find=lambda key: key)
    with monkeypatch.context() as patch:
        fail_at(patch, tmp_path / name, number)
        with pytest.raises(StorageError, match="cannot read"):
            ProgressMarkers(tmp_path).read_crashes()
        with pytest.raises(StorageError, match="cannot read"):
            ProgressMarkers(tmp_path).remove_settled(index)
    ProgressMarkers(tmp_path).remove_settled(index)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "[", "[]", '{"alone": 1}', "[" * 100_000])
def test_files_that_are_not_markers_are_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / MARKER).write_text(content)
    assert not ProgressMarkers(tmp_path).read_crashes().counts


@pytest.mark.parametrize("name", ["images", "manifest", "logs"])
def test_leftovers_are_kept_if_a_folder_is_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for folder in ("images", "manifest", "logs"):
        (tmp_path / folder).mkdir()
    left = tmp_path / "images" / unique_name(".tmp-", "a.png")
    left.touch()
    (tmp_path / ".holder").touch()
    with monkeypatch.context() as patch:
        fail_at(patch, tmp_path / name, errno.EACCES)
        with pytest.raises(StorageError, match=name):
            recovery.remove_leftovers(tmp_path)
        if name == "manifest":
            with pytest.raises(StorageError, match=name):
                recovery.recover(tmp_path)
    recovery.remove_leftovers(tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("name", ["images", "quarantine"])
def test_images_are_kept_if_their_folder_is_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "run.json").write_text('{"identity": {}}')
    (tmp_path / name).mkdir()
    image = FolderSink(tmp_path).write(f"{name}/t-00000/a.png", b"x")
    FolderSink(tmp_path).publish([image.path], no_rows)
    with monkeypatch.context() as patch:
        fail_at(patch, tmp_path / name, errno.EACCES)
        with pytest.raises(StorageError, match=f"cannot read {tmp_path / name}"):
            run_folder.clear(LocalStore(tmp_path))
    assert (tmp_path / image.path).exists()
    run_folder.clear(LocalStore(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_links_and_folders_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    names = ("folder", "file", "link", "dangling", "gone", "file/x")
    assert [name for name in names if path_exists(tmp_path / name)] == ["folder", "file", "link", "dangling"]
    assert [name for name in names if is_link(tmp_path / name)] == ["link", "dangling"]
    assert [name for name in names if is_folder(tmp_path / name)] == ["folder"]
    assert [name for name in names if is_folder(tmp_path / name, follow=True)] == ["folder", "link"]
