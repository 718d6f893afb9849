"""Manage OUT during a run: open its manifest, update run.json, and remove old files for --overwrite."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from batch_infer import __version__
from batch_infer.errors import DamagedPartError, StoppedError, UsageError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.job import Job
from batch_infer.jobs.recovery import remove_leftovers, set_aside
from batch_infer.manifest import Manifest, ManifestIndex, read_part
from batch_infer.sinks import IMAGE_FOLDERS, make_sink, resolve_path
from batch_infer.store import PinnedFolder, fsync_folder, is_folder, is_link, list_names, path_exists, write_errors


class RunFolder:
    """OUT during a run, which holds its lock.

    With --overwrite, old files are removed only when the first worker is ready or nothing is left to render, so that no
    images are lost if the model fails to load. Until then, `is_cleared` is false, and neither run.json nor the manifest
    is written.
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
        """Return the index of the results from which the run continues: none until OUT is cleared.

        Set damaged parts aside.
        """
        return self.manifest.index(on_damage=set_aside) if self.is_cleared else ManifestIndex(())

    def update_record(self, **entries: Any) -> None:
        """Add entries to run.json, which is not written until OUT is cleared."""
        self._record = {**self._record, **entries}
        if self.is_cleared:
            outdir.write_run(self.out, self._record)

    def restore_record(self) -> None:
        """Remove leftovers, and undo this run's changes of run.json, so that later runs need not match its settings."""
        if self.is_cleared:
            remove_leftovers(self.out)
            if self._earlier is not None:
                outdir.write_run(self.out, self._earlier)
            else:
                with write_errors(self.out / "run.json"):
                    (self.out / "run.json").unlink(missing_ok=True)

    def clear(self) -> None:
        """For --overwrite, remove the old files. Raises StoppedError, StorageError, UsageError."""
        if self.is_cleared:
            return
        if self._stop():
            raise StoppedError(f"stopped before --overwrite removed old files from {self.out}; run again to continue")
        clear(self.out, self._stop)
        remove_leftovers(self.out)
        self.is_cleared = True
        self.update_record()


def clear(out: Path, stop: Callable[[], bool] = lambda: False) -> None:
    """Remove the files and folders of earlier runs from OUT, except logs/. Files under other names are kept.

    First mark OUT as being cleared in run.json: after a kill, no command reads results from OUT, and the next run
    continues to clear it. If images/ or quarantine/ is a link, keep the link, and remove from its target only the files
    that the manifest names. Without run.json, remove nothing. Raises UsageError, for example if the files may belong to
    another program, StorageError, and StoppedError once `stop` returns True.
    """
    outdir.refuse_to_clear(out)
    if not path_exists(out / "run.json"):
        return
    outdir.write_run(out, {"batch_infer": __version__, "identity": {}, outdir.CLEARING: True})
    linked = [name for name in IMAGE_FOLDERS if is_link(out / name)]
    if linked:
        _remove_named_images(out)
    names = [name for name in outdir.OWN_NAMES if name not in ("manifest", "logs", "run.json", *linked)]
    for name in ("manifest", *names):
        path = out / name
        children = [path / child for child in list_names(path)] if is_folder(path) else []
        for target in (*filter(is_folder, children), path):
            if stop():
                raise StoppedError(f"stopped while --overwrite removed old files from {out}; run again to continue")
            with write_errors(target):
                shutil.rmtree(target) if is_folder(target) else target.unlink(missing_ok=True)
    with write_errors(out):
        fsync_folder(out)


def _remove_named_images(out: Path) -> None:
    """Remove the images that the manifest names, then those of their folders that are empty."""
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
