"""OUT: one run at a time holds its lock, and only files that runs wrote are removed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from filelock import FileLock

from batch_infer.errors import LockedError, SettingsError, StoppedError, StorageError, UsageError
from batch_infer.jobs import out as outdir
from batch_infer.jobs import recovery, run_folder
from batch_infer.manifest import Manifest
from batch_infer.records import ResultRow, utc_now
from batch_infer.sinks.folder import FolderSink
from batch_infer.store import IMAGE_FOLDERS, LocalStore, open_store
from batch_infer.store import folder as store_folder
from batch_infer.store.folder import find_holder
from tests.runs import command, run, run_json
from tests.storage import no_rows
from tests.tables import write_csv

HOLDER = """
import pathlib, sys
from batch_infer.jobs import out as outdir
with outdir.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


@pytest.fixture
def holder(out: Path) -> Iterator[subprocess.Popen[str]]:
    """Start another process that holds the lock of OUT."""
    line = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_names_the_holder_of_the_lock(out: Path, holder: subprocess.Popen[str]) -> None:
    sentence = rf"deep/out is locked by another command \(.*process {holder.pid}, since .* UTC\)"
    with pytest.raises(LockedError, match=sentence), outdir.locked(out):
        pytest.fail("held twice")
    assert LockedError.exit_code == 75


def test_a_lock_is_released_when_its_holder_dies(out: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with outdir.locked(out):
        assert f"process {os.getpid()}," in (out / ".holder").read_text()


def test_a_lock_is_released_on_any_error(out: Path) -> None:
    out.mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), outdir.locked(out):
            raise KeyboardInterrupt
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_folders_that_a_refused_run_created_are_removed(tmp_path: Path) -> None:
    table, out = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]]), tmp_path / "new" / "out"
    assert run(table, out, "--height", "63").code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
    out.parent.mkdir()
    assert run(table, out, "--height", "63").code == 2
    assert list(out.parent.iterdir()) == [], "only the folders that it created"
    out.mkdir()
    assert run(table, out, "--height", "63").code == 2
    assert [path.name for path in out.iterdir()] == [".lock"], "a user's folder is kept"
    with outdir.locked(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    assert {path.name for path in (tmp_path / "used").iterdir()} == {"file", ".lock"}


@pytest.mark.parametrize("step", ["fsync_folder", "_is_locked", "FileLock"])
def test_a_run_waits_for_a_folder_that_another_run_removes(
    out: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """It creates the folder again, whenever the other run removes it."""
    original: Callable[..., Any] = getattr(store_folder, step)

    def remove_once(*arguments: Any) -> Any:
        monkeypatch.setattr(store_folder, step, original)
        shutil.rmtree(out.parent)
        return original(*arguments)

    monkeypatch.setattr(store_folder, step, remove_once)
    with outdir.locked(out):
        assert find_holder(out) is not None


def test_the_lock_of_a_removed_file_does_not_count(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may remove the lock file, and a third one may create and lock a new file."""

    class LateLock(FileLock):
        def acquire(self, *arguments: Any, **options: Any) -> Any:
            acquired = super().acquire(*arguments, **options)
            monkeypatch.setattr(store_folder, "FileLock", FileLock)
            (out / ".lock").unlink()
            (out / ".lock").touch()
            return acquired

    monkeypatch.setattr(store_folder, "FileLock", LateLock)
    with outdir.locked(out):
        assert find_holder(out) is not None


def test_mounts_with_changing_inode_numbers_can_be_locked(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    with outdir.locked(out):
        assert find_holder(out) is not None


def test_a_process_cannot_lock_twice(out: Path) -> None:
    with outdir.locked(out), pytest.raises(LockedError), outdir.locked(out):
        pytest.fail("held twice")


@pytest.mark.parametrize("place", ["file", "file/out"])
def test_a_file_in_place_of_out_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=f"cannot write to .*{place}: "), outdir.locked(tmp_path / place):
        pytest.fail("held a file")


def test_run_json_is_read_as_written(tmp_path: Path) -> None:
    assert outdir.read_run(LocalStore(tmp_path)) is None
    outdir.write_run(
        LocalStore(tmp_path), {"tables": ["größe.csv", os.fsdecode(b"caf\xe9.csv")], "out": tmp_path, "summary": None}
    )
    record = outdir.read_run(LocalStore(tmp_path))
    assert record == {"tables": ["größe.csv", os.fsdecode(b"caf\xe9.csv")], "out": str(tmp_path), "summary": None}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_run_json_is_named_with_a_remedy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    sentence = r"run.json .*; restore it from a copy, or remove it to continue .*, or start anew in another --out"
    with pytest.raises(UsageError, match=sentence):
        outdir.read_run(LocalStore(tmp_path))


def fill(out: Path) -> list[Path]:
    """Create every kind of file that runs write to OUT, and files of other programs."""
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
    others = fill(out)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    (out / "logs" / "link").symlink_to(tmp_path / "elsewhere")
    run_folder.clear(LocalStore(out))
    remaining = [*others, out / "logs" / "worker-0.log", out / "run.json"]  # the log of this run is already open
    assert [path for path in sorted(out.rglob("*")) if path.is_file()] == sorted(remaining)
    assert (tmp_path / "elsewhere" / "precious").exists()


def link_images(out: Path, disk: Path) -> None:
    (out / "images").rename(disk)
    (out / "images").symlink_to(disk)


def commit_image(out: Path, name: str) -> Path:
    sink = FolderSink(out)
    stored = sink.write(f"images/t-00000/{name}-0.png", b"x")
    sink.publish([stored.path], no_rows)
    (out / "manifest" / "part-1.parquet").unlink(missing_ok=True)
    row = ResultRow(id=name, image_index=0, prompt="x", generated_image=stored.path, status="ok", finished_at=utc_now(),
                    source_file="t.csv", source_row=0, fingerprint="f")  # fmt: skip
    Manifest(out).commit([row], pa.schema([]))
    return out / stored.path


def test_clearing_keeps_links_and_removes_only_named_images_from_their_targets(out: Path, tmp_path: Path) -> None:
    fill(out)
    link_images(out, tmp_path / "big disk")
    image = commit_image(out, "b")
    (tmp_path / "big disk" / "t-00001").mkdir()
    empty = commit_image(out, "c").with_name("only")
    run_folder.clear(LocalStore(out))
    assert (out / "images").is_symlink()
    assert not image.exists()
    assert not empty.exists()
    assert (tmp_path / "big disk" / "t-00000" / "a-0.png").exists(), "no part names it"
    assert (tmp_path / "big disk" / "t-00001").exists()
    assert outdir.CLEARING in (outdir.read_run(LocalStore(out)) or {})
    assert not (out / "manifest").exists()


@pytest.mark.parametrize("linked", [False, True])
def test_a_killed_overwrite_is_finished_by_the_next_run(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    """No command reads the remaining files as results, whichever removal was interrupted."""
    for step in range(1, 20):
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(tmp_path / "big disk", ignore_errors=True)
        fill(out)
        commit_image(out, "b")
        if linked:
            link_images(out, tmp_path / "big disk")
        left = [step]
        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, dying(getattr(os, name), left))
            try:
                run_folder.clear(LocalStore(out))
                break
            except KeyboardInterrupt:
                pass
        assert outdir.CLEARING in (outdir.read_run(LocalStore(out)) or {})
        with pytest.raises(UsageError, match="run --overwrite` was stopped .* run again"):
            outdir.read_existing_run(LocalStore(out))
        run_folder.clear(LocalStore(out))
        assert not (out / "images" / "t-00000" / "b-0.png").exists()
    assert step > 5


def test_clearing_stops_on_request(out: Path) -> None:
    fill(out)
    with pytest.raises(StoppedError, match="run again"):
        run_folder.clear(LocalStore(out), lambda: not (out / "manifest").exists())
    assert outdir.CLEARING in (outdir.read_run(LocalStore(out)) or {})
    assert (out / "images" / "t-00000" / "a-0.png").exists()


def dying(real: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] <= 0:
            raise KeyboardInterrupt
        return real(*args, **options)

    return call


def test_a_folder_of_another_program_is_not_cleared(out: Path) -> None:
    fill(out)
    (out / "run.json").unlink()
    with pytest.raises(SettingsError, match="has no run.json written by batch-infer, so its files may"):
        run_folder.clear(LocalStore(out))
    assert (out / "images/t-00000/a-0.png").exists()


def test_clearing_an_empty_folder_does_nothing(tmp_path: Path) -> None:
    run_folder.clear(LocalStore(tmp_path))
    run_folder.clear(LocalStore(tmp_path / "missing"))


def test_only_leftovers_of_killed_runs_are_removed(out: Path, tmp_path: Path) -> None:
    fill(out)
    ours = [
        *(
            out / ".tmp-0a1b2c3d-1-0123456789ab-run.json",
            out / "images/t-00000/.tmp-0a1b2c3d-1-0123456789ab-a-0.png",
            out / "manifest/.tmp-0a1b2c3d-1-0123456789ab-part.parquet",
        ),
        *(
            out / "quarantine/t/.tmp-0a1b2c3d-1-0123456789ab-b-0.png",
            out / "logs/.tmp-0a1b2c3d-1-0123456789ab-x",
        ),
    ]
    (tmp_path / "elsewhere").mkdir()
    (out / "images" / "link").symlink_to(tmp_path / "elsewhere")
    others = [
        out / "my images" / ".tmp-0a1b2c3d-1-0123456789ab-a.png",
        tmp_path / "elsewhere" / ".tmp-0a1b2c3d-1-0123456789ab-a.png",
    ]
    for path in (*ours, *others):
        path.touch()
    recovery.remove_leftovers(out)
    assert [path for path in (*ours, *others) if path.exists()] == others
    assert (out / "images/t-00000/a-0.png").exists()


def test_leftovers_on_a_larger_disk_are_removed_too(out: Path, tmp_path: Path) -> None:
    fill(out)
    (out / "images").rename(tmp_path / "big disk")
    (out / "images").symlink_to(tmp_path / "big disk")
    leftover = tmp_path / "big disk" / "t-00000" / ".tmp-0a1b2c3d-1-0123456789ab-a-0.png"
    leftover.touch()
    recovery.remove_leftovers(out)
    assert not leftover.exists()


def test_the_name_of_the_current_holder_is_kept(out: Path, holder: subprocess.Popen[str]) -> None:
    recovery.remove_leftovers(out)
    assert f"process {holder.pid}," in (find_holder(out) or "")
    holder.kill()
    holder.wait()
    assert find_holder(out) is None
    with outdir.locked(out):
        recovery.remove_leftovers(out)
        assert f"process {os.getpid()}," in (out / ".holder").read_text()
    assert not (out / ".holder").exists()


def test_sweeping_does_not_stat_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be a million files on a network disk."""
    for name in ("a", "b", "c"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(100):
            (folder / f"{number}.png").touch()
    calls = []
    real = os.stat

    def stat(path: Any, *args: Any, **options: Any) -> os.stat_result:
        calls.append(path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", stat)
    recovery.remove_leftovers(tmp_path)
    assert len(calls) < 20


def replaced(out: Path) -> None:
    out.rename(out.with_name("elsewhere"))
    out.mkdir()


def removed_and_recreated(out: Path) -> None:
    """Remove the folder and recreate it at once, since file systems may then reuse its inode."""
    shutil.rmtree(out)
    out.mkdir()


@pytest.mark.parametrize("vanish", [replaced, shutil.rmtree, removed_and_recreated])
def test_a_replaced_folder_is_recognised(out: Path, vanish: Callable[[Path], None]) -> None:
    with outdir.locked(out) as folder:
        folder.check()
        vanish(out)
        there = out.exists()
        if there:
            (out / ".holder").write_text("another")
        with pytest.raises(StorageError, match="has disappeared since the run began"):
            folder.check()
        if not there:
            with pytest.raises(StorageError, match=r"cannot write .*run.json"):
                outdir.write_run(LocalStore(out), {})
    assert out.exists() == there
    assert not there or (out / ".holder").read_text() == "another"


@pytest.mark.parametrize(
    ("fault", "error", "way_out"),
    [
        (
            errno.ENOSYS,
            SettingsError,
            "mount its file system with support for flock .* or give an --out on a local disk",
        ),
        (errno.EOPNOTSUPP, SettingsError, "support for flock"),
        (errno.ENOLCK, StorageError, "check that the lock service of its file system is running"),
        (errno.EIO, StorageError, "lock service"),
    ],
)
def test_a_file_system_without_locks_is_named_with_a_remedy(
    out: Path, monkeypatch: pytest.MonkeyPatch, fault: int, error: type[Exception], way_out: str
) -> None:
    def flock(*_: object) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(fcntl, "flock", flock)
    sentence = rf"deep/out/.lock cannot be locked: {os.strerror(fault)}; .*{way_out}"
    with pytest.raises(error, match=sentence), outdir.locked(out):
        pytest.fail("held without a lock")


def as_another_user(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python code under another user id, which only root can do."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    script = f"import os, sys, pathlib\nos.setgroups([]); os.setgid(65534); os.setuid(65534)\n{script}"
    # Import libraries first: the other user may not be allowed to read them.
    loaded = "import batch_infer.jobs, zoneinfo\n"
    return subprocess.run([sys.executable, "-c", loaded + script, *map(str, arguments)], capture_output=True, text=True)


SHOW = """
from batch_infer.store.folder import find_holder
print(find_holder(pathlib.Path(sys.argv[1])))
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """Create an OUT that other users can read. It is not in pytest's folder, which they cannot enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        out = Path(folder) / "out"
        out.mkdir()
        yield out


def test_another_user_can_read_the_holder(shared: Path) -> None:
    with outdir.locked(shared):
        assert f"process {os.getpid()}," in as_another_user(SHOW, shared).stdout
    assert as_another_user(SHOW, shared).stdout == "None\n"


def test_an_unreadable_lock_is_an_error(shared: Path) -> None:
    (shared / ".lock").touch()
    (shared / ".lock").chmod(0o600)
    done = as_another_user(SHOW, shared)
    assert f"StorageError: cannot read {shared}/.lock: Permission denied" in done.stderr


def test_status_is_unknown_if_the_lock_is_unreadable(shared: Path) -> None:
    table = write_csv(shared.parent / "t.csv", [["prompt"], ["a red circle"]])
    assert run(table, shared).code == 0
    (shared / "run.json").write_text(json.dumps({**run_json(shared), "summary": None}))
    for path in (shared, *shared.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    script = "from batch_infer.jobs import read_status\nprint(read_status(pathlib.Path(sys.argv[1])))"
    assert "state='stopped'" in as_another_user(script, shared).stdout
    (shared / ".lock").chmod(0o600)
    done = as_another_user(script, shared)
    assert "state='unknown', holder=None" in done.stdout, done.stderr
    assert "remaining=0" in done.stdout


def test_an_unreadable_manifest_is_an_error(shared: Path) -> None:
    commit_image(shared, "a")
    (shared / "manifest").chmod(0o700)
    script = "from batch_infer.manifest import Manifest\nprint(Manifest(pathlib.Path(sys.argv[1])).parts())"
    done = as_another_user(script, shared)
    assert f"StorageError: cannot read {shared}/manifest: Permission denied" in done.stderr


@pytest.mark.parametrize("name", [*outdir.FOLDERS, *outdir.RESULTS, "run.json"])
def test_files_of_the_wrong_kind_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch() if name in outdir.FOLDERS else path.mkdir()
    with pytest.raises(SettingsError, match=rf"{name} is not a f\w+, but a run needs one: remove it"):
        outdir.refuse_foreign_files(LocalStore(tmp_path), [], {"identity": {}})


@pytest.mark.parametrize("name", outdir.FOLDERS)
def test_only_image_folders_may_be_links(tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    if name in IMAGE_FOLDERS:
        outdir.refuse_foreign_files(LocalStore(tmp_path), [], None)
        return
    with pytest.raises(SettingsError, match=f"{name} is a link; in OUT only images/ and quarantine/ may be links"):
        outdir.refuse_foreign_files(LocalStore(tmp_path), [], None)


def test_a_path_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"caf\xe9")
    for look in (open_store, lambda path: outdir.locked(path).__enter__()):
        with pytest.raises(SettingsError, match=r"the path of OUT is not UTF-8: b'.*caf\\xe9'; give another --out"):
            look(out)
    assert not out.exists()


def test_the_next_holder_removes_partial_results(out: Path) -> None:
    """Temporary files of other processes are kept, because workers of an endpoint share OUT with a merge."""
    out.mkdir(parents=True)
    token = ".tmp-0a1b2c3d-1-0123456789ab-"
    for name in (f"{token}results.parquet", f"{token}results.csv", f"{token}run.json", ".tmp-mine-results.csv"):
        (out / name).touch()
    with outdir.locked(out):
        assert not list(out.glob(f"{token}results.*"))
        assert (out / f"{token}run.json").exists()
        assert (out / ".tmp-mine-results.csv").exists()


def refuse_to_unlink(path: Path, *_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_losing_write_access_is_a_storage_error(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This includes errors of the cleanup, which must not hide the error that ends the run."""
    with (
        monkeypatch.context() as patch,
        pytest.raises(StorageError, match=r"cannot write .*out/x: Permission denied"),
        outdir.locked(out),
    ):
        patch.setattr(Path, "unlink", refuse_to_unlink)
        (out / "x").unlink()
    with pytest.raises(OSError, match="elsewhere"), outdir.locked(out):
        raise OSError(errno.EACCES, "no", "/elsewhere")


def test_a_failed_cleanup_releases_the_lock_and_is_left_to_the_next_holder(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="what ended the run"), outdir.locked(out):
        left = {path.name for path in out.iterdir()}
        patch.setattr(Path, "unlink", refuse_to_unlink)
        raise UsageError("what ended the run")
    assert {path.name for path in out.iterdir()} == left > {".lock", ".holder"}
    assert find_holder(out) is None
    with outdir.locked(out):
        pass
    assert {path.name for path in out.iterdir()} == {".lock"}


def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", fill)
        with pytest.raises(StorageError, match="No space left"), outdir.locked(tmp_path / "out"):
            pytest.fail("not reached")
    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(StorageError, match="No space left"):
        outdir.create_run_json(LocalStore(tmp_path), {"identity": {}})
    assert list(tmp_path.iterdir()) == []


def test_the_first_run_json_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    for folder in (tmp_path / "linked", tmp_path / "unlinked"):
        folder.mkdir()
        for identity in ("first", "second"):
            outdir.create_run_json(LocalStore(folder), {"identity": {"model": identity}})
        assert outdir.read_existing_run(LocalStore(folder))["identity"] == {"model": "first"}
        assert [path.name for path in folder.iterdir()] == ["run.json"]
        monkeypatch.setattr(Path, "hardlink_to", refuse)


@pytest.mark.usefixtures("probe_here")
@pytest.mark.parametrize("folder", ["images", "quarantine", "shards", "manifest"])
def test_a_first_run_refuses_folders_with_files_of_other_programs(tmp_path: Path, folder: str) -> None:
    """Otherwise a later --overwrite would remove them."""
    table, out = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]]), tmp_path / "out"
    file = out / folder / "holiday.png"
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    done = run(table, out)
    assert (done.code, done.stdout) == (2, "")
    assert f"{file.parent} contains files, but {out} contains no run: move them away" in done.stderr
    planned = command("plan", table, "--out", out)
    assert (planned.code, "contains files" in planned.stderr) == (2, True)
    assert (file.read_text(), (out / "run.json").exists()) == ("mine", False)


def test_a_first_run_accepts_empty_folders_and_linked_ones(tmp_path: Path) -> None:
    table, out = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]]), tmp_path / "out"
    (out / "quarantine" / "empty").mkdir(parents=True)
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "holiday.png").write_text("mine")
    (out / "images").symlink_to(disk)
    assert run(table, out).code == 0
    assert run(table, out, "--overwrite").code == 0
    assert (disk / "holiday.png").read_text() == "mine"
