"""Replacing images: a kill before the new images are committed loses none of the old ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batch_infer.errors import SettingsError, StorageError
from batch_infer.jobs import recovery
from batch_infer.manifest import Manifest
from batch_infer.sinks import BACKUP_PREFIX
from batch_infer.sinks.folder import FolderSink
from batch_infer.store import LocalStore, is_abandoned, unique_name
from tests import runs
from tests.storage import no_rows
from tests.tables import write_csv

OTHER = ("--steps", "3", "--rerender-changed")
METHODS = [(FolderSink, "back_up"), (FolderSink, "publish"), (Manifest, "commit"), (FolderSink, "remove")]
every_method = pytest.mark.parametrize(("owner", "method"), METHODS, ids=[method for _, method in METHODS])


class Killed(BaseException):
    """Simulates a kill, since no code handles it."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a table and the OUT of a finished run. Tests must copy it."""
    folder = tmp_path_factory.mktemp("finished")
    write_csv(folder / "t.csv", [["id", "prompt"], *([f"row-{k}", f"a large red disc {k}"] for k in range(3))])
    assert runs.run(folder / "t.csv", folder / "out").code == 0
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "folder"))


def files(out: Path) -> dict[str, bytes]:
    return {path: (out / path).read_bytes() for path in runs.images(out)}


def rendered(done: runs.CommandResult) -> int:
    assert done.code == 0, done.stderr
    return int(json.loads(done.stdout)["rendered"])


def die(owner: Any, method: str, *, after: bool) -> Callable[..., Any]:
    """Return a method that raises Killed before or after it calls the real one."""
    real = getattr(owner, method)

    def dying(self: Any, *arguments: Any) -> None:
        if after:
            real(self, *arguments)
        raise Killed

    return dying


def killed_while_replacing(folder: Path, owner: Any, method: str, *, after: bool) -> dict[str, bytes]:
    """Kill a run with other options during its only commit. Return the images from before the run."""
    before = files(folder / "out")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, method, die(owner, method, after=after))
        runs.run(folder / "t.csv", folder / "out", *OTHER)
    assert runs.run_json(folder / "out")["summary"] is None
    return before


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@every_method
def test_a_run_killed_while_replacing_images_can_be_undone(folder: Path, owner: Any, method: str, after: bool) -> None:
    """A run with the old options renders nothing, and every image is the old one unless the new ones were committed."""
    out = folder / "out"
    before = killed_while_replacing(folder, owner, method, after=after)
    committed = method == "remove" or (method == "commit" and after)
    again = runs.run(folder / "t.csv", out, "--json", *(OTHER if committed else ()))
    assert rendered(again) == 0
    assert (files(out) == before) is not committed
    assert "failed" not in {row["status"] for row in runs.results(out)}
    runs.assert_whole(out)


@pytest.mark.parametrize("line", [("merge",), ("rescore", "--safety", "checker"), ("retry", "--status", "missing")])
def test_every_command_that_works_in_out_restores_the_images(folder: Path, line: tuple[str, ...]) -> None:
    out = folder / "out"
    before = killed_while_replacing(folder, Manifest, "commit", after=False)
    name, *options = line
    done = runs.command(name, out, *options, "--json")
    assert done.code == 0, done.stderr
    assert files(out) == before
    assert not list(out.rglob(".original-*"))


def test_repeating_the_options_renders_the_images_again(folder: Path, tmp_path: Path) -> None:
    killed_while_replacing(folder, Manifest, "commit", after=False)
    assert rendered(runs.run(folder / "t.csv", folder / "out", "--json", *OTHER)) == 3
    runs.assert_whole(folder / "out")
    assert runs.run(folder / "t.csv", tmp_path / "once", "--steps", "3").code == 0
    assert files(folder / "out") == files(tmp_path / "once")


def test_a_disk_that_is_full_while_rows_are_committed_loses_no_image(folder: Path) -> None:
    before = files(folder / "out")

    def commit(*_: Any) -> None:
        raise StorageError("cannot write: no space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "commit", commit)
        assert runs.run(folder / "t.csv", folder / "out", *OTHER).code == 75
    assert rendered(runs.run(folder / "t.csv", folder / "out", "--json")) == 0
    assert files(folder / "out") == before


def test_replacing_a_missing_image_works(folder: Path) -> None:
    out = folder / "out"
    first, *_ = sorted(runs.images(out))
    (out / first).unlink()
    assert rendered(runs.run(folder / "t.csv", out, "--json", *OTHER)) == 3
    runs.assert_whole(out)


def test_a_second_attempt_keeps_the_backup_of_the_committed_image(tmp_path: Path) -> None:
    """A worker died in the first attempt: the image that it published was never committed."""
    sink = FolderSink(tmp_path)
    for content in (b"old", b"first", b"second"):
        path = sink.write("images/t-00000/a-0.png", content).path
        sink.back_up([path])
        sink.publish([path], no_rows)
    assert (tmp_path / FolderSink(tmp_path).backup_path(path)).read_bytes() == b"old"
    assert (tmp_path / path).read_bytes() == b"second"


def test_a_backup_of_an_uncommitted_image_is_removed(folder: Path) -> None:
    """This includes backups of images that no row names. Files outside image folders are kept."""
    out = folder / "out"
    first, *_ = sorted(runs.images(out))
    strangers = [out / ".original-mine.png", out / "logs" / ".original-log"]
    for path in (
        out / FolderSink(out).backup_path(first),
        (out / first).with_name(unique_name(BACKUP_PREFIX, "gone-0.png")),
        *strangers,
    ):
        path.write_bytes(b"of an earlier attempt")
    before = files(out)
    recovery.remove_leftovers(out)
    assert {path for path in before if "/.original-" not in path} == runs.images(out)
    assert all(path.exists() for path in strangers)


def assign_to_dead_process(backup: Path) -> Path:
    """Rename a backup of this process so that it seems to come from a dead process. Return its new path."""
    _, folder, number, *rest = backup.name.split("-")
    assert int(number) == os.getpid()
    return backup.rename(backup.with_name("-".join([".original", folder, "99999999", *rest])))


def test_the_committed_one_of_several_backups_is_restored(folder: Path) -> None:
    """Two workers died one after the other while they replaced the same image."""
    out = folder / "out"
    before = killed_while_replacing(folder, Manifest, "commit", after=False)
    for path in out.rglob(".original-*"):
        assign_to_dead_process(path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Manifest, "commit", die(Manifest, "commit", after=False))
        patch.setattr(recovery, "restore_images", lambda *_: None)
        runs.run(folder / "t.csv", out, *OTHER)
    assert len(list(out.rglob(".original-*"))) == 2 * len(before)
    assert rendered(runs.run(folder / "t.csv", out, "--json")) == 0
    assert files(out) == before


def find_abandoned(out: Path, folder: Path) -> list[str]:
    """Return the backups in a folder that a worker of an endpoint would restore or remove."""
    store = LocalStore(out)
    names = store.find_direct([folder.relative_to(out).as_posix()], lambda name: is_abandoned(name, BACKUP_PREFIX))
    return recovery.remove_temporary_files(store, names)


def test_backups_of_live_workers_are_not_leftovers(folder: Path) -> None:
    """Workers of an endpoint share OUT, and each removes only the files of dead workers."""
    out = folder / "out"
    first, *_ = sorted(runs.images(out))
    FolderSink(out).back_up([first])
    (backup,) = out.rglob(".original-*")
    assert find_abandoned(out, backup.parent) == []
    backup = assign_to_dead_process(backup)
    assert find_abandoned(out, backup.parent) == [backup.relative_to(out).as_posix()]


def test_a_run_with_a_lost_remote_worker_is_recovered_by_the_next(folder: Path) -> None:
    """The run ended cleanly, except that a worker on another machine may have been about to commit."""
    out = folder / "out"
    before = files(out)
    FolderSink(out).back_up(before)
    (out / "run.json").write_text(json.dumps({**runs.run_json(out), "has_strays": True}))
    assert rendered(runs.run(folder / "t.csv", out, "--json")) == 0
    assert files(out) == before
    assert not runs.run_json(out).get("has_strays")


def test_a_run_that_is_refused_while_it_commits_restores_the_images(folder: Path) -> None:
    """For example, a service refuses the key. run.json is then that of the earlier run, which ended cleanly."""
    out = folder / "out"
    before = files(out)

    def commit(*_: Any) -> None:
        raise SettingsError("the key is refused")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "commit", commit)
        assert runs.run(folder / "t.csv", out, *OTHER).code == 2
    assert files(out) == before
    assert rendered(runs.run(folder / "t.csv", out, "--json")) == 0


@pytest.mark.parametrize("line", [("run",), ("rescore", "--safety", "checker")])
def test_images_are_restored_despite_a_damaged_part(folder: Path, line: tuple[str, ...]) -> None:
    """The damage may be in columns that only restoring reads. The rows of the part are rendered again."""
    out = folder / "out"
    killed_while_replacing(folder, Manifest, "commit", after=False)
    (part,) = (out / "manifest").glob("part-*.parquet")
    metadata = pq.read_metadata(part)
    place = metadata.schema.to_arrow_schema().names.index("sha256")
    start = metadata.row_group(0).column(place).dictionary_page_offset
    damaged = bytearray(part.read_bytes())
    damaged[start : start + 60] = b"\xff" * 60
    part.write_bytes(damaged)
    name, *options = line
    if name == "rescore":
        assert runs.command("rescore", out, *options).code in (0, 75)
    done = runs.run(folder / "t.csv", out)
    assert done.code == 0, done.stderr
    runs.assert_whole(out)
    assert not list(out.rglob(".original-*"))


DYING = """
import os, signal
from batch_infer.__main__ import main
from batch_infer.manifest import Manifest
from batch_infer.sinks.folder import FolderSink

{owner}.{method} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main()
"""


@pytest.mark.promises
@every_method
def test_a_process_killed_while_replacing_images_can_be_undone(folder: Path, owner: Any, method: str) -> None:
    out, program = folder / "out", DYING.format(owner=owner.__name__, method=method)
    before = files(out)
    line = [sys.executable, "-c", program, "run", str(folder / "t.csv"), "-o", str(out), *runs.QUICK, *OTHER]
    assert subprocess.run(line, capture_output=True).returncode == -signal.SIGKILL
    committed = method == "remove"
    assert rendered(runs.run(folder / "t.csv", out, "--json", *(OTHER if committed else ()))) == 0
    assert (files(out) == before) is not committed
    runs.assert_whole(out)
