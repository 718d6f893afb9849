"""OUT: one run at a time holds it, and only what runs made there is removed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_infer.errors import LockedError, SettingsError, StorageError, UsageError
from batch_infer.jobs import out as outdir

HOLDER = """
import pathlib, sys, time
from batch_infer.jobs.out import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


@pytest.fixture
def holder(out: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds OUT."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, out], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_told_who_holds_out(out: Path, holder: subprocess.Popen[str]) -> None:
    sentence = rf"deep/out is held by another run \(.*process {holder.pid}, since .* UTC\)"
    with pytest.raises(LockedError, match=sentence), outdir.locked(out):
        pytest.fail("held twice")
    assert LockedError.exit_code == 75


def test_a_lock_dies_with_its_holder(out: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with outdir.locked(out):
        assert f"process {os.getpid()}," in (out / ".holder").read_text()


def test_a_lock_ends_with_its_run_whatever_happens(out: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), outdir.locked(out):
            raise KeyboardInterrupt
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_a_process_locks_itself_out_too(out: Path) -> None:
    with outdir.locked(out), pytest.raises(LockedError), outdir.locked(out):
        pytest.fail("held twice")


@pytest.mark.parametrize("place", ["file", "file/out"])
def test_a_file_where_out_should_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=f"cannot write to .*{place}: "), outdir.locked(tmp_path / place):
        pytest.fail("held a file")


def test_run_json_comes_back(tmp_path: Path) -> None:
    assert outdir.read_run(tmp_path) is None
    outdir.write_run(tmp_path, {"tables": ["größe.csv", os.fsdecode(b"caf\xe9.csv")], "out": tmp_path, "summary": None})
    found = outdir.read_run(tmp_path)
    assert found == {"tables": ["größe.csv", os.fsdecode(b"caf\xe9.csv")], "out": str(tmp_path), "summary": None}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_run_json_is_named_with_the_way_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"run.json .*; remove it to go on .*, or start anew in another --out"):
        outdir.read_run(tmp_path)


def full(out: Path) -> list[Path]:
    """An OUT with something of every kind that runs make, and things of others."""
    for name in ("images/t-00000/a-0.png", "quarantine/t/b-0.png", "manifest/part-1.parquet", "logs/worker-0.log"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    for name in ("results.parquet", "results.csv", "results.jsonl"):
        (out / name).touch()
    (out / "run.json").write_text(json.dumps({"identity": {}}))
    others = [out / "notes.txt", out / "my images" / "a.png"]
    others[1].parent.mkdir()
    for path in others:
        path.touch()
    return others


def test_clearing_removes_what_runs_made_and_nothing_else(out: Path, tmp_path: Path) -> None:
    others = full(out)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    (out / "logs" / "link").symlink_to(tmp_path / "elsewhere")
    outdir.clear(out)
    assert [path for path in sorted(out.rglob("*")) if path.is_file()] == sorted(others)
    assert (tmp_path / "elsewhere" / "precious").exists()


def test_a_linked_folder_is_let_go_and_not_emptied(out: Path, tmp_path: Path) -> None:
    full(out)
    (out / "images").rename(tmp_path / "big disk")
    (out / "images").symlink_to(tmp_path / "big disk")
    outdir.clear(out)
    assert not (out / "images").exists()
    assert len(list((tmp_path / "big disk").iterdir())) == 1


def test_a_folder_that_no_run_made_is_not_cleared(out: Path) -> None:
    full(out)
    (out / "run.json").unlink()
    with pytest.raises(SettingsError, match="has no run.json of ours, so what it holds may be somebody"):
        outdir.clear(out)
    assert (out / "images/t-00000/a-0.png").exists()


def test_an_empty_folder_is_as_good_as_cleared(tmp_path: Path) -> None:
    outdir.clear(tmp_path)
    outdir.clear(tmp_path / "missing")


def test_leftovers_of_a_killed_run_are_removed_and_no_others(out: Path, tmp_path: Path) -> None:
    full(out)
    ours = [
        *(out / ".tmp-1-run.json", out / "images/t-00000/.tmp-1-a-0.png", out / "manifest/.tmp-1-part.parquet"),
        *(out / "quarantine/t/.tmp-1-b-0.png", out / "logs/.tmp-1-x", out / ".holder"),
    ]
    (tmp_path / "elsewhere").mkdir()
    (out / "images" / "link").symlink_to(tmp_path / "elsewhere")
    others = [out / "my images" / ".tmp-1-a.png", tmp_path / "elsewhere" / ".tmp-1-a.png"]
    for path in (*ours, *others):
        path.touch()
    outdir.remove_leftovers(out)
    assert [path for path in (*ours, *others) if path.exists()] == others
    assert (out / "images/t-00000/a-0.png").exists()


def test_leftovers_on_a_larger_disk_are_removed_too(out: Path, tmp_path: Path) -> None:
    full(out)
    (out / "images").rename(tmp_path / "big disk")
    (out / "images").symlink_to(tmp_path / "big disk")
    leftover = tmp_path / "big disk" / "t-00000" / ".tmp-1-a-0.png"
    leftover.touch()
    outdir.remove_leftovers(out)
    assert not leftover.exists()


def test_the_word_of_who_holds_out_stays(out: Path, holder: subprocess.Popen[str]) -> None:
    outdir.remove_leftovers(out)
    assert f"process {holder.pid}," in (outdir.holder(out) or "")
    holder.kill()
    holder.wait()
    outdir.remove_leftovers(out)
    assert not (out / ".holder").exists()
    with outdir.locked(out):
        outdir.remove_leftovers(out)
        assert (out / ".holder").exists()


def test_files_are_swept_without_asking_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be a million of them, on a disk in a network."""
    for name in ("a", "b", "c"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(100):
            (folder / f"{number}.png").touch()
    asked = []
    real = os.stat

    def stat(path: Any, *args: Any, **options: Any) -> os.stat_result:
        asked.append(path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", stat)
    outdir.remove_leftovers(tmp_path)
    assert len(asked) < 20


def replaced(out: Path) -> None:
    out.rename(out.with_name("elsewhere"))
    out.mkdir()


def removed_and_made_again(out: Path) -> None:
    """At once: a file system is quick to give the inode of the old folder to the new one."""
    shutil.rmtree(out)
    out.mkdir()


@pytest.mark.parametrize("vanish", [replaced, shutil.rmtree, removed_and_made_again])
def test_a_held_folder_is_not_mistaken_for_another(out: Path, vanish: Callable[[Path], None]) -> None:
    with outdir.locked(out) as held:
        held.check()
        vanish(out)
        there = out.exists()
        if there:
            (out / ".holder").write_text("another")
        with pytest.raises(StorageError, match="has gone since the run began"):
            held.check()
        if not there:
            with pytest.raises(StorageError, match=r"cannot write .*run.json"):
                outdir.write_run(out, {})
    assert out.exists() == there
    assert not there or (out / ".holder").read_text() == "another"
