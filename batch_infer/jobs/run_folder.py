"""OUT during a run: its manifest, run.json while it runs, and what --overwrite removes first."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from batch_infer.errors import DamagedPart, Interrupted, UsageError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.job import Job
from batch_infer.jobs.recovery import remove_leftovers, set_aside
from batch_infer.manifest import Manifest, ManifestIndex, read_part
from batch_infer.sinks import IMAGE_FOLDERS, make_sink, resolve_path
from batch_infer.store import PinnedFolder, fsync_folder, is_folder, is_link, list_names, path_exists, write_errors


class RunFolder:
    """OUT, locked by a run.

    With --overwrite, what it holds is removed once the first worker is ready, since a model that does not load must
    cost no images. Until then (`is_cleared`) nothing is written.
    """

    def __init__(self, job: Job, stop: Callable[[], bool]) -> None:
        self.out = job.settings.out
        self.pinned = PinnedFolder.of(self.out)
        self.manifest = Manifest(self.pinned)
        self.is_cleared = not (job.settings.overwrite and path_exists(self.out / "run.json"))
        self._stop = stop
        self._record: Mapping[str, Any] = job.record
        self._earlier = job.earlier

    def index(self) -> ManifestIndex:
        """Return the index of what a run can continue. Damaged parts are set aside."""
        return self.manifest.index(damaged=set_aside) if self.is_cleared else ManifestIndex(())

    def update_record(self, **entries: Any) -> None:
        """Add entries to run.json, which stays as it was until OUT is cleared."""
        self._record = {**self._record, **entries}
        if self.is_cleared:
            outdir.write_run(self.out, self._record)

    @contextmanager
    def restored_on_usage_error(self, has_commits: Callable[[], bool]) -> Iterator[None]:
        """Restore run.json after a UsageError before the first commit: these settings must not refuse others."""
        try:
            yield
        except UsageError:
            if self.is_cleared and not has_commits():
                remove_leftovers(self.out)
                outdir.restore_run(self.out, self._earlier)
            raise

    def clear(self) -> None:
        """Remove what OUT held, for --overwrite. Raises Interrupted, StorageError."""
        if self.is_cleared:
            return
        if self._stop():
            raise Interrupted(f"stopped before --overwrite removed what {self.out} holds; run the same command again")
        clear(self.out, self._stop)
        remove_leftovers(self.out)
        self.is_cleared = True
        self.update_record()


def clear(out: Path, stop: Callable[[], bool] = lambda: False) -> None:
    """Remove what earlier runs made in OUT except logs/, and nothing else.

    run.json is first replaced by one that says so: after a kill at any moment OUT holds no results for any command, and
    the next run continues. If images/ or quarantine/ is a link to a larger disk, the link stays, and only the files
    that the manifest names are removed behind it. Raises UsageError where OUT is not a run's, StorageError, and
    Interrupted once `stop` returns True.
    """
    outdir.refuse_to_clear(out)
    if not path_exists(out / "run.json"):
        return
    outdir.mark_clearing(out)
    linked = [name for name in IMAGE_FOLDERS if is_link(out / name)]
    if linked:
        _remove_named_images(out)
    names = [name for name in outdir.OWN_NAMES if name not in ("manifest", "logs", "run.json", *linked)]
    for path in (out / name for name in ("manifest", *names)):
        children = list_names(path) if is_folder(path) else []
        for target in (*filter(is_folder, (path / child for child in children)), path):
            if stop():
                raise Interrupted(f"stopped while --overwrite removed what {out} held; run again to continue")
            with write_errors(target):
                shutil.rmtree(target) if is_folder(target) else target.unlink(missing_ok=True)
    with write_errors(out):
        fsync_folder(out)


def _remove_named_images(out: Path) -> None:
    """Remove the images that the manifest names, and the folders that are then empty."""
    sink, folders = make_sink(out), set()
    for part in Manifest(out).parts():
        try:
            paths = read_part(part, ("generated_image",))["generated_image"].drop_null().to_pylist()
        except (DamagedPart, UsageError):
            continue
        for path in paths:
            sink.remove(path)
            if (image := resolve_path(out, path)) is not None:
                folders.add(image.parent)
    for folder in folders:
        if folder.parent.parent == out and not is_link(folder):
            with suppress(OSError):  # not empty
                folder.rmdir()
