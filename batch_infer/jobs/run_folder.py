"""Manage OUT during a run: its manifest, its run.json, and the removal of old files for --overwrite."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from batch_infer.errors import DamagedPartError, StoppedError, UsageError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.job import Job
from batch_infer.jobs.recovery import remove_leftovers, set_aside
from batch_infer.manifest import Manifest, ManifestIndex, read_part
from batch_infer.sinks import IMAGE_FOLDERS, make_sink, resolve_path
from batch_infer.store import PinnedFolder, fsync_folder, is_folder, is_link, list_names, path_exists, write_errors


class RunFolder:
    """OUT, locked by a run.

    With --overwrite, old files are removed only once the first worker is ready, so that a model that fails to load
    costs no images. Until then `is_cleared` is false and nothing is written.
    """

    def __init__(self, job: Job, stop: Callable[[], bool]) -> None:
        self.out = job.settings.out
        self.pinned = PinnedFolder.pin(self.out)
        self.manifest = Manifest(self.pinned)
        self.is_cleared = not (job.settings.overwrite and path_exists(self.out / "run.json"))
        self._stop = stop
        self._record: Mapping[str, Any] = job.record
        self._earlier = job.earlier

    def index(self) -> ManifestIndex:
        """Return the index of the results that a run can continue. Sets damaged parts aside."""
        return self.manifest.index(on_damage=set_aside) if self.is_cleared else ManifestIndex(())

    def update_record(self, **entries: Any) -> None:
        """Add entries to run.json, which is not written until OUT is cleared."""
        self._record = {**self._record, **entries}
        if self.is_cleared:
            outdir.write_run(self.out, self._record)

    @contextmanager
    def restored_on_usage_error(self, has_commits: Callable[[], bool]) -> Iterator[None]:
        """Restore run.json after a UsageError before the first commit, so that its settings do not bind later runs."""
        try:
            yield
        except UsageError:
            if self.is_cleared and not has_commits():
                remove_leftovers(self.out)
                outdir.restore_run(self.out, self._earlier)
            raise

    def clear(self) -> None:
        """For --overwrite, remove the old files. Raises StoppedError, StorageError."""
        if self.is_cleared:
            return
        if self._stop():
            raise StoppedError(f"stopped before --overwrite removed what {self.out} holds; run the same command again")
        clear(self.out, self._stop)
        remove_leftovers(self.out)
        self.is_cleared = True
        self.update_record()


def clear(out: Path, stop: Callable[[], bool] = lambda: False) -> None:
    """Remove only what earlier runs wrote to OUT, except logs/.

    First, run.json marks OUT as being cleared: after a kill at any time, no command sees results in OUT, and the next
    run continues. If images/ or quarantine/ is a link to a larger disk, the link stays, and only files named in the
    manifest are removed behind it. Raises UsageError if OUT is not a run's, StorageError, and StoppedError once `stop`
    returns True.
    """
    outdir.refuse_to_clear(out)
    if not path_exists(out / "run.json"):
        return
    outdir.mark_clearing(out)
    linked = [name for name in IMAGE_FOLDERS if is_link(out / name)]
    if linked:
        _remove_named_images(out)
    names = [name for name in outdir.OWN_NAMES if name not in ("manifest", "logs", "run.json", *linked)]
    for name in ("manifest", *names):
        path = out / name
        children = [path / child for child in list_names(path)] if is_folder(path) else []
        for target in (*filter(is_folder, children), path):
            if stop():
                raise StoppedError(f"stopped while --overwrite removed what {out} held; run again to continue")
            with write_errors(target):
                shutil.rmtree(target) if is_folder(target) else target.unlink(missing_ok=True)
    with write_errors(out):
        fsync_folder(out)


def _remove_named_images(out: Path) -> None:
    """Remove the images named in the manifest, and then their empty folders."""
    sink, folders = make_sink(out), set()
    for part in Manifest(out).parts():
        try:
            paths = read_part(part, ("generated_image",))["generated_image"].drop_null().to_pylist()
        except (DamagedPartError, UsageError):
            continue
        for path in paths:
            sink.remove(path)
            image = resolve_path(out, path)
            if image is not None:
                folders.add(image.parent)
    for folder in folders:
        if folder.parent.parent == out and not is_link(folder):
            with suppress(OSError):  # not empty
                folder.rmdir()
