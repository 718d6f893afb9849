"""Scoring of mini-batches of table files by one worker, however often each is delivered."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pyarrow as pa

from batch_infer.azureml.deployment import AzureDeployment, read_cached_run
from batch_infer.azureml.folders import FolderFiles, concatenate, group_by_folder
from batch_infer.azureml.id_ownership import IdClaim, IdOwnership
from batch_infer.azureml.rendering import MiniBatchRenderer
from batch_infer.errors import DamagedPartError, SettingsError, StorageError, TableError
from batch_infer.jobs import (
    Counts,
    Job,
    check_identity,
    create_run_json,
    read_results,
    refuse_foreign_files,
    remove_abandoned,
    restore_images,
    scan_tables,
    set_aside,
)
from batch_infer.manifest import SCHEMA, Manifest, ManifestIndex
from batch_infer.planning import Item, ManifestEntry, get_source, is_finished, select_pending
from batch_infer.sinks import make_sink
from batch_infer.store import PinnedFolder, path_exists
from batch_infer.table import SharedFolder, Tables

MAX_PASSES = 5
"""Passes over the files of a delivery, if other workers claim their ids meanwhile or parts are damaged."""


class MiniBatchScorer:
    """One of several workers that write into the same OUT, with its model loaded.

    No worker locks OUT: the image of a row, its file name and its key in the manifest follow from the row, so two
    workers with the same row do no harm. Rows that any worker has committed are not rendered again.
    """

    def __init__(self, deployment: AzureDeployment) -> None:
        """Load the model, and create OUT and its run.json if they do not exist. Raises UsageError, StorageError."""
        self._deployment, self._path = deployment, deployment.settings.out
        self._prepare_out()
        # run.json marks the folder: a separate marker would remain where a worker is killed.
        self._out = replace(PinnedFolder.pin(self._path), marker="run.json")
        self._manifest, self._renderer = Manifest(self._out), MiniBatchRenderer(deployment, self._out)
        self._index, self._ownership = ManifestIndex(()), IdOwnership()
        self._known_parts: set[str] = set()
        self._read_new_parts()

    def score(self, files: Sequence[str]) -> pa.Table:
        """Render the pending rows of these files and return all their results, in the order of the files.

        A file that cannot be read has one invalid result, and one whose name is not that of a table has none. Raises
        TableError where no file can be read, once that is committed, ServiceError where a safety service does not
        answer, StorageError.
        """
        self._check_identity()
        folders, refused = group_by_folder(files)
        scored = [self._score_folder(folder) for folder in folders]
        if new := [row for row in refused if not is_finished(row, self._index.find(row.key))]:
            self._manifest.commit(new, pa.schema([]))
            self._read_new_parts()
        self._renderer.remove_settled_markers(self._is_committed)
        self._check_identity()
        errors = [error for _, unreadable in scored for error in unreadable.values()]
        errors += [row.error or "" for row in refused]
        if errors and len(errors) == sum(len(folder.files) for folder in folders) + len(refused):
            raise TableError(" · ".join(errors))
        return concatenate([table for table, _ in scored], refused)

    def close(self) -> None:
        self._read_new_parts()
        self._renderer.remove_settled_markers(self._is_committed)
        self._index.close()
        self._ownership.close()
        self._renderer.close()

    def _prepare_out(self) -> None:
        refuse_foreign_files(self._path, (), self._deployment.earlier)
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"cannot write to {self._path}: {error.strerror or error}") from error
        create_run_json(self._path, self._deployment.record)
        self._check_identity()

    def _check_identity(self) -> None:
        """Raise SettingsError where OUT belongs to workers with another model, scheduler, dtype or safety policy.

        This is checked for every mini-batch too: on file systems without hard links, two workers that start at the same
        moment may both write run.json, and then one of them is refused here.
        """
        if (record := read_cached_run(self._path)) is None:
            return
        try:
            check_identity(record, self._deployment.record, self._path)
        except SettingsError as error:
            raise SettingsError(f"{str(error).rpartition(': ')[0]}: give the job another output path") from error

    def _score_folder(self, folder: FolderFiles) -> tuple[pa.Table, dict[str, str]]:
        """Return the results of files in one folder, and why some cannot be read."""
        self._remove_leftovers(folder.names)
        with self._open_tables(folder, folder.names) as tables:
            job = self._make_job(tables)
            for _ in range(MAX_PASSES):
                try:
                    results = self._try_pass(job, folder)
                except DamagedPartError as damage:
                    _set_aside(damage)
                    continue
                if results is not None:
                    return folder.restore_order(results), tables.unreadable_files
        raise StorageError(
            f"{', '.join(folder.names)}: {self._manifest.folder} does not have a result of every row, because other"
            " workers rendered the same rows or parts were damaged; committed rows are kept, try again"
        )

    def _try_pass(self, job: Job, folder: FolderFiles) -> pa.Table | None:
        """Return the results of all rows, or None where commits of other workers require another pass."""
        self._read_new_parts()
        before = self._find_conflicts(folder)
        self._commit_pending(job, folder)
        conflicts = self._find_conflicts(folder)
        if conflicts != before:
            return None  # the ids of these rows have changed
        self._settle_conflicts(conflicts, folder)
        counts = Counts()
        batches = list(read_results(job.items(self._index), self._index, job.tables.carried, counts))
        empty = pa.schema([*SCHEMA, *job.tables.carried]).empty_table()
        return None if counts.remaining else pa.concat_tables([empty, *batches])

    def _commit_pending(self, job: Job, folder: FolderFiles) -> None:
        """Render and commit pending rows. The ids of rows do not change meanwhile: they follow from the claims read."""

        def is_skipped(item: Item, entry: ManifestEntry | None) -> bool:
            file, _ = get_source(item)
            other = getattr(entry, "source_file", file)
            return is_finished(item, entry) and (other == file or other not in folder.existing)

        scan_tables(job, self._index, is_skipped)
        self._update_index()
        pending = select_pending(job.items(self._index), self._index, is_skipped)
        self._renderer.render(job, pending, self._index)
        self._read_new_parts()

    # Ids that rows of several files have

    def _find_conflicts(self, folder: FolderFiles) -> frozenset[IdClaim]:
        return self._ownership.find_conflicts(folder.names, folder.existing)

    def _settle_conflicts(self, conflicts: frozenset[IdClaim], folder: FolderFiles) -> None:
        """Commit results of the rows of other files in these conflicts, and remove images that lost their id."""
        for file in sorted({claim.file for claim in conflicts} - set(folder.names)):
            with self._open_tables(folder, [file]) as tables:
                sources = {(claim.file, claim.row) for claim in conflicts if claim.file == file}
                self._commit_pending(self._make_job(tables, sources), folder)
        sink = make_sink(self._out)
        for claim in conflicts:
            entry = self._index.find((claim.id, claim.image_index))
            if claim.path and entry and entry.path != claim.path:
                sink.remove(claim.path)

    def _open_tables(self, folder: FolderFiles, names: Sequence[str]) -> Tables:
        settings = self._deployment.settings.table
        settings = replace(settings, tables=tuple(f"./{name}" for name in names), folder=folder.path)

        def has_id(name: str, file: str) -> bool:
            return self._ownership.has_earlier_owner(name, file, folder.existing)

        return Tables(settings, SCHEMA.names, SharedFolder(folder.existing, has_id))

    def _make_job(self, tables: Tables, sources: Collection[tuple[str, int]] | None = None) -> Job:
        it = self._deployment
        values = (it.settings, tables, it.card, it.compute, it.record, it.earlier, it.rules)
        return Job(*values) if sources is None else RowSelectionJob(*values, sources)

    # The manifest

    def _remove_leftovers(self, names: Sequence[str]) -> None:
        """Remove temporary files of workers that died with these files, and restore the images that they set aside."""
        folders = [self._path, self._manifest.folder, *make_sink(self._out).folders_of(names)]
        restore_images(self._path, remove_abandoned(self._path, folders), self._open_index, _set_aside)

    @contextmanager
    def _open_index(self) -> Iterator[ManifestIndex]:
        self._update_index()
        yield self._index

    def _read_new_parts(self) -> None:
        """Read the results and id claims that any worker has committed since."""
        self._update_index()
        self._ownership.add(self._manifest.parts())

    def _update_index(self) -> None:
        parts = self._manifest.parts()
        names = {part.name for part in parts}
        if not self._known_parts <= names:  # a part was set aside: its rows must be rendered again
            self._index.close()
            self._index = ManifestIndex(())
        self._index.add(parts, _set_aside)
        self._known_parts = names

    def _is_committed(self, key: tuple[str, int]) -> bool:
        return self._index.find(key) is not None


@dataclass(frozen=True, slots=True)
class RowSelectionJob(Job):
    """A job with only the rows of these sources (file name, row number)."""

    sources: Collection[tuple[str, int]]

    def items(self, index: ManifestIndex) -> Iterator[Item]:
        return (item for item in super(RowSelectionJob, self).items(index) if get_source(item) in self.sources)


def _set_aside(damage: DamagedPartError) -> None:
    """Set a damaged part aside, unless another worker does so at the same time."""
    try:
        set_aside(damage)
    except StorageError:
        if path_exists(damage.part):
            raise
