"""Manage OUT during a run: open its manifest, update run.json, and remove old files for --overwrite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from batch_infer import __version__
from batch_infer.errors import DamagedPartError, StoppedError, UsageError
from batch_infer.galleries import is_gallery
from batch_infer.jobs import out as outdir
from batch_infer.jobs.checksums import ROOT_DIGEST, add_root_digest, find_results
from batch_infer.jobs.job import Job
from batch_infer.jobs.recovery import remove_leftovers, remove_unnamed_images, set_aside
from batch_infer.jobs.results import remove_other_results
from batch_infer.jobs.run_json import ended_cleanly
from batch_infer.jobs.summary import Counts
from batch_infer.manifest import Manifest, ManifestIndex, read_part, run_number
from batch_infer.records import ResultRow
from batch_infer.settings import SHARED_NAMES
from batch_infer.sinks import is_image_path, make_sink, parse_member
from batch_infer.store import IMAGE_FOLDERS, Store


class RunFolder:
    """OUT during a run, which holds its lock.

    With --overwrite, old files are removed only when the first worker is ready or nothing is left to render, so that no
    images are lost if the model fails to load. Until then, `is_cleared` is false, and neither run.json nor the manifest
    is written.
    """

    def __init__(self, job: Job, stop: Callable[[], bool]) -> None:
        self.store, self.manifest = job.store, Manifest(job.store)
        self.is_cleared = not (job.settings.overwrite and self.store.exists(outdir.RUN_JSON))
        self._stop = stop
        self._shards = set[str]()
        self._output, self._old_results = job.settings.output, find_results(self.store)
        self._record: dict[str, Any] = dict(job.record)
        self._earlier, self._number = job.earlier, job.number

    def index(self) -> ManifestIndex:
        """Return the index of the results from which the run continues: none until OUT is cleared.

        Set damaged parts aside.
        """
        return self.manifest.index(on_damage=partial(set_aside, self.store)) if self.is_cleared else ManifestIndex(())

    def update_record(self, **entries: Any) -> None:
        """Add entries to run.json, which is not written until OUT is cleared.

        A summary replaces the progress, and also adds the root digest.
        """
        self._record = {**self._record, **entries}
        if "summary" in entries:
            self._record.pop("progress", None)
            self._record = add_root_digest(self.store, self._record)
        if self.is_cleared:
            outdir.write_run(self.store, self._record)

    def restore_record(self) -> None:
        """Remove leftovers, and undo this run's changes of run.json, so that later runs need not match its settings."""
        if self.is_cleared:
            remove_leftovers(self.store)
            if self._earlier is not None:
                record = dict(self._earlier)
                if any(run_number(part) == self._number for part in self.manifest.parts()):
                    record.pop(ROOT_DIGEST, None)  # SHA256SUMS lacks the invalid rows that this run committed
                outdir.write_run(self.store, record)
            else:
                self.store.remove([outdir.RUN_JSON])

    def count_shards(self, rows: Sequence[ResultRow]) -> None:
        """Remember the shards of rows that were committed."""
        members = (parse_member(row.generated_image or "") for row in rows)
        self._shards.update(member.shard for member in members if member is not None)

    def remove_old_files(self, counts: Counts, *, has_committed: bool) -> None:
        """After a merge with these counts, remove what results no longer need.

        These are images in shards that no result names, and results files in formats that are no longer requested.
        """
        self.store.check()
        if has_committed or not ended_cleanly(self._earlier):
            remove_unnamed_images(self.store, self._record, counts, self._shards)
        remove_other_results(self.store, self._old_results, self._output)

    def clear(self) -> None:
        """For --overwrite, remove the old files. Raises StoppedError, StorageError, UsageError."""
        if self.is_cleared:
            return
        if self._stop():
            location = self.store.location
            raise StoppedError(f"stopped before --overwrite removed old files from {location}; run again to continue")
        clear(self.store, self._stop)
        remove_leftovers(self.store)
        self.is_cleared = True
        self.update_record()


def clear(store: Store, stop: Callable[[], bool] = lambda: False) -> None:
    """Remove the files and folders of earlier runs from OUT, except logs/. Files under other names are kept.

    First mark OUT as being cleared in run.json: after a kill, no command reads results from OUT, and the next run
    continues to clear it. If images/ or quarantine/ is a link, keep the link, and remove from its target only the files
    that the manifest names. Without run.json, remove nothing. Raises UsageError, for example if the files may belong to
    another program, StorageError, and StoppedError once `stop` returns True.
    """
    outdir.refuse_to_clear(store)
    if not store.exists(outdir.RUN_JSON):
        return
    shared = [name for name in find_results(store) if name in SHARED_NAMES]  # before SHA256SUMS is removed
    outdir.write_run(store, {"batch_infer": __version__, "identity": {}, outdir.CLEARING: True})
    linked = [name for name in IMAGE_FOLDERS if store.is_link(name)]
    if linked:
        _remove_named_images(store)
    names = [name for name in outdir.OWN_NAMES if name not in ("manifest", "logs", outdir.RUN_JSON, *linked)]
    if not store.is_link(outdir.GALLERY_FOLDER) and is_gallery(store, f"{outdir.GALLERY_FOLDER}/"):
        names.append(outdir.GALLERY_FOLDER)  # a folder of the user's own with that name is kept
    for name in (*shared, "manifest", *names):
        try:
            store.remove_folder(name, stop)
        except StoppedError as error:
            raise StoppedError(
                f"stopped while --overwrite removed old files from {store.location}; run again to continue"
            ) from error


def _remove_named_images(store: Store) -> None:
    """Remove the images that the manifest names, then those of their folders that are empty."""
    sink, folders = make_sink(store), set()
    for part in Manifest(store).parts():
        try:
            paths = read_part(part, ("generated_image",))["generated_image"].drop_null().to_pylist()
        except (DamagedPartError, UsageError):
            continue
        sink.remove(*paths)
        folders |= {path.rpartition("/")[0] for path in paths if is_image_path(path)}
    for folder in folders:
        if folder.count("/") == 1:
            store.remove_empty_folder(folder)
