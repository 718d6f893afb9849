"""Score mini-batches of table files in one worker, although Azure may deliver a mini-batch more than once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from batch_infer.azureml.deployment import AzureDeployment, read_cached_run
from batch_infer.azureml.folders import CommittedId, FolderFiles, IdOwnership, group_by_folder
from batch_infer.azureml.rendering import MiniBatchRenderer
from batch_infer.errors import DamagedPartError, SettingsError, StorageError, TableError
from batch_infer.jobs import (
    Counts,
    Job,
    RowSelection,
    check_identity,
    create_run_json,
    make_results_schema,
    read_results,
    refuse_foreign_files,
    remove_temporary_files,
    restore_images,
    retry_without_damaged_parts,
    scan_tables,
    set_aside,
)
from batch_infer.manifest import FOLDER as MANIFEST_FOLDER
from batch_infer.manifest import SCHEMA, Manifest, ManifestIndex, cast_table, to_table
from batch_infer.planning import Item, ManifestEntry, get_source, is_finished, select_pending
from batch_infer.sinks import BACKUP_PREFIX, make_sink
from batch_infer.store import LocalStore, StoredFile, is_abandoned, unless_removed
from batch_infer.table import SharedFolder, Tables

MAX_PASSES = 5
"""Maximum number of passes over a folder's files. Other workers' commits and damaged parts require another pass."""


class MiniBatchScorer:
    """Scores mini-batches with a loaded model. Several workers may write to the same OUT.

    Workers do not lock OUT: the image of a row, its file name and its key in the manifest depend only on the row, so
    two workers can render the same row. A row that any worker has finished is skipped, unless the manifest has its id
    for a row of another existing file.
    """

    def __init__(self, deployment: AzureDeployment) -> None:
        """Load the model, and create OUT and its run.json if they do not exist. Raises UsageError, StorageError."""
        self._deployment, path = deployment, Path(deployment.settings.out)
        refuse_foreign_files(LocalStore(path), (), deployment.earlier)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"cannot write to {path}: {error.strerror or error}") from error
        create_run_json(LocalStore(path), deployment.record)
        # run.json marks the folder: a separate marker would remain if a worker were killed.
        self._store = LocalStore(replace(LocalStore(path).address, marker="run.json"))
        self._check_identity()
        self._manifest, self._renderer = Manifest(self._store), MiniBatchRenderer(deployment, self._store)
        self._index, self._ids = ManifestIndex(()), IdOwnership()
        self._read_new_parts()

    def score(self, files: Sequence[str]) -> pa.Table:
        """Render the pending rows of files and return the results of all their rows.

        Results are grouped by folder, in the order of the folder's files. A file that cannot be read has one invalid
        result, and an ignored file has none. A file with the name of an earlier file counts as unreadable, and its
        result is at the end. Raises TableError after committing these results if no file can be read, UsageError if OUT
        belongs to other workers or its run.json is invalid, ServiceError if a safety service does not answer,
        StorageError.
        """
        self._check_identity()
        folders, refused = group_by_folder(files)
        scored = [self._score_folder(folder) for folder in folders]
        if new := [row for row in refused if not is_finished(row, self._index.find(row.key))]:
            self._manifest.commit(new, pa.schema([]))
            self._read_new_parts()
        self._renderer.markers.remove_settled(self._index)
        self._check_identity()
        errors = [error for _, unreadable in scored for error in unreadable.values()]
        errors += [row.error or "" for row in refused]
        if errors and len(errors) == sum(len(folder.files) for folder in folders) + len(refused):
            raise TableError(" · ".join(errors))
        tables = [*(results for results, _ in scored), to_table(refused, pa.schema([]))]
        schema = make_results_schema(table.schema for table in tables)
        return pa.concat_tables([cast_table(table, schema) for table in tables])

    def close(self) -> None:
        self._read_new_parts()
        self._renderer.markers.remove_settled(self._index)
        self._index.close()
        self._ids.close()
        self._renderer.close()

    def _check_identity(self) -> None:
        """Raise SettingsError if OUT belongs to workers with another model, scheduler, dtype or safety policy.

        The check is repeated before and after every mini-batch: on file systems without hard links, two workers that
        start at the same moment may both write run.json. One of them is refused by a later check.
        """
        if (record := read_cached_run(self._store)) is None:
            return
        try:
            check_identity(record, self._deployment.record, self._store.location)
        except SettingsError as error:
            raise SettingsError(f"{str(error).rpartition(': ')[0]}: give the job another output path") from error

    def _score_folder(self, folder: FolderFiles) -> tuple[pa.Table, dict[str, str]]:
        """Return the results of a folder's files, and an error message for each file that cannot be read."""
        files = sorted(folder.files)  # so that the first file by name owns an id that several files contain
        # Remove temporary files of dead workers, and restore images whose replacements were never committed.
        folders = ["", MANIFEST_FOLDER, *make_sink(self._store).folders_of(files)]
        if originals := remove_temporary_files(self._store, self._store.find_direct(folders, _is_abandoned)):
            retry_without_damaged_parts(
                lambda: restore_images(self._store, originals, self._update_index()), self._set_aside
            )
        with self._open_job(folder, files) as job:
            for _ in range(MAX_PASSES):
                try:
                    results = self._try_pass(job, folder)
                except DamagedPartError as damage:
                    self._set_aside(damage)
                    continue
                if results is not None:
                    positions = pc.index_in(results["source_file"], value_set=pa.array(folder.files, pa.string()))
                    return results.take(pc.sort_indices(positions)), job.tables.unreadable_files
        raise StorageError(
            f"{', '.join(files)}: {self._store.locate(MANIFEST_FOLDER)} does not have a result of every row, because"
            " other workers rendered the same rows or parts were damaged; committed rows are kept, try again"
        )

    def _try_pass(self, job: Job, folder: FolderFiles) -> pa.Table | None:
        """Return the results of all rows, or None if commits by other workers require another pass."""
        self._read_new_parts()
        conflicts_before = self._ids.find_conflicts(folder)
        self._commit_pending(job, folder)
        conflicts = self._ids.find_conflicts(folder)
        if conflicts != conflicts_before:
            return None  # an id may have a new owner, so the ids of rows may change
        self._settle_conflicts(conflicts, folder)
        counts = Counts()
        batches = list(read_results(job.items(self._index), self._index, job.tables.carried, counts))
        empty = pa.schema([*SCHEMA, *job.tables.carried]).empty_table()
        return None if counts.remaining else pa.concat_tables([empty, *batches])

    def _commit_pending(
        self, job: Job, folder: FolderFiles, sources: Collection[tuple[str, int]] | None = None
    ) -> None:
        """Render and commit all pending rows or, with `sources` (file name, row number), only the pending rows there.

        The ids of the rows depend only on the parts that were read before this call.
        """

        def is_skipped(item: Item, entry: ManifestEntry | None) -> bool:
            source = get_source(item)
            if sources is not None and source not in sources:
                return True
            owner = getattr(entry, "source_file", source[0])
            return is_finished(item, entry) and (owner == source[0] or owner not in folder.existing)

        scan_tables(job, self._index, RowSelection(is_skipped))
        self._update_index()
        pending = select_pending(job.items(self._index), self._index, is_skipped)
        self._renderer.render(job, pending, self._index)
        self._read_new_parts()

    def _settle_conflicts(self, conflicts: frozenset[CommittedId], folder: FolderFiles) -> None:
        """Commit results for conflicting rows of other files, and remove images that lost their id."""
        for file in sorted({conflict.source_file for conflict in conflicts} - set(folder.files)):
            with self._open_job(folder, [file]) as job:
                sources = {(file, conflict.source_row) for conflict in conflicts if conflict.source_file == file}
                self._commit_pending(job, folder, sources)
        sink = make_sink(self._store)
        for conflict in conflicts:
            entry = self._index.find((conflict.id, conflict.image_index))
            if conflict.generated_image and entry and entry.path != conflict.generated_image:
                sink.remove(conflict.generated_image)

    @contextmanager
    def _open_job(self, folder: FolderFiles, names: Sequence[str]) -> Iterator[Job]:
        deployment = self._deployment
        settings = replace(deployment.settings.table, tables=tuple(f"./{name}" for name in names), folder=folder.path)
        shared = SharedFolder(folder.existing, lambda name, file: self._ids.has_earlier_owner(name, file, folder))
        with Tables(settings, SCHEMA.names, shared, deployment.find_lora) as tables:
            yield Job(
                deployment.settings, self._store, tables, deployment.card, deployment.compute, deployment.record,
                deployment.earlier, deployment.rules,
            )  # fmt: skip

    def _read_new_parts(self) -> None:
        """Read the results and ids that workers have committed since the last call."""
        self._update_index()
        self._ids.add(self._manifest.parts())

    def _update_index(self) -> ManifestIndex:
        parts = self._manifest.parts()
        if self._index.parts.keys() - {part.name for part in parts}:  # rows of a part that was set aside are pending
            self._index.close()
            self._index = ManifestIndex(())
        self._index.add(parts, self._set_aside)
        return self._index

    def _set_aside(self, damage: DamagedPartError) -> None:
        """Set a damaged part aside, unless another worker does so first."""
        with unless_removed(StoredFile(self._store, f"{MANIFEST_FOLDER}/{Path(damage.part).name}")):
            set_aside(self._store, damage)


def _is_abandoned(name: str) -> bool:
    """Return whether a name is that of a dead process's temporary file or image backup."""
    return is_abandoned(name) or is_abandoned(name, BACKUP_PREFIX)
