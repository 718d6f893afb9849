"""Mini-batches of table files on one worker: each rendered, committed and given back, however often it comes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pyarrow as pa

from batch_infer.azureml.claims import Claim, Claims
from batch_infer.azureml.deployment import AzureDeployment, read_cached_run
from batch_infer.azureml.folders import Folder, by_folder, joined
from batch_infer.azureml.rendering import Rendering
from batch_infer.errors import DamagedPart, SettingsError, StorageError, TableError
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
from batch_infer.planning import Item, ManifestEntry, is_done, select_pending, source_of
from batch_infer.sinks import make_sink
from batch_infer.store import PinnedFolder, path_exists
from batch_infer.table import OtherTables, Tables

TURNS = 5
"""How often files are gone over in one delivery, where others have claimed their ids or parts are damaged."""
Place = tuple[str, int]
"""A row of a table: the file's name, and the row's number."""


class MiniBatches:
    """A worker among others that write into the same OUT, with its model loaded.

    None of them holds OUT: a row's image, its name and its key in the manifest follow from the row, so that two who
    do the same row do each other no harm. What a mini-batch that comes again needs no rendering for is taken from the
    manifest, also where another worker has committed it.
    """

    def __init__(self, deployment: AzureDeployment) -> None:
        """Makes OUT, and its run.json where there is none. Raises UsageError, StorageError."""
        self._deployment, self._out = deployment, deployment.settings.out
        self._begin()
        # run.json marks the folder: a separate marker would remain where a worker is killed.
        self._held = replace(PinnedFolder.of(self._out), marker="run.json")
        self._manifest, self._rendering = Manifest(self._held), Rendering(deployment, self._held)
        self._index, self._claims = ManifestIndex(()), Claims()
        self._known: set[str] = set()
        self._catch_up()

    def score(self, files: Sequence[str]) -> pa.Table:
        """Render what is not done of these files and return all their results, in their order.

        A file that cannot be read is one invalid result, and one that is no table by its name is none. Raises
        TableError where no file can be read, once that is committed; ServiceError where a safety service does not
        answer, StorageError.
        """
        self._refuse_mixed()
        folders, twins = by_folder(files)
        scored = [self._score(folder) for folder in folders]
        if new := [row for row in twins if not is_done(row, self._index.find(row.key))]:
            self._manifest.commit(new, pa.schema([]))
            self._catch_up()
        self._rendering.clear(self._is_known)
        self._refuse_mixed()
        faults = [fault for _, found in scored for fault in found.values()] + [row.error or "" for row in twins]
        if faults and len(faults) == sum(len(folder.came) for folder in folders) + len(twins):
            raise TableError(" · ".join(faults))
        return joined([table for table, _ in scored], twins)

    def close(self) -> None:
        self._catch_up()
        self._rendering.clear(self._is_known)
        self._index.close()
        self._claims.close()
        self._rendering.close()

    def _begin(self) -> None:
        """Leave a run.json for those who merge, or go on with that of a worker who was here before."""
        refuse_foreign_files(self._out, (), self._deployment.earlier)
        try:
            self._out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"cannot write to {self._out}: {error.strerror or error}") from error
        create_run_json(self._out, self._deployment.record)
        self._refuse_mixed()

    def _refuse_mixed(self) -> None:
        """Raise SettingsError where OUT belongs to workers of another model, scheduler, dtype or safety policy.

        This is checked for every mini-batch too: on file systems without hard links, two workers that start at the same
        moment may both write run.json, and then one of them is refused here.
        """
        if (found := read_cached_run(self._out)) is None:
            return
        try:
            check_identity(found, self._deployment.record, self._out)
        except SettingsError as error:
            raise SettingsError(f"{str(error).rpartition(': ')[0]}: give the job another output path") from error

    def _score(self, folder: Folder) -> tuple[pa.Table, dict[str, str]]:
        """The results of files in one folder, and why some cannot be read."""
        self._sweep(folder.names)
        with self._tables(folder, folder.names) as tables:
            job = self._job(tables)
            for _ in range(TURNS):
                try:
                    results = self._turn(job, folder)
                except DamagedPart as damage:
                    _set_aside(damage)
                    continue
                if results is not None:
                    return folder.in_order(results), tables.unreadable_files
        raise StorageError(
            f"{', '.join(folder.names)}: not every row came to a result that {self._manifest.folder} holds, since"
            " other workers were at the same rows or parts were damaged; what is done stays done, try again"
        )

    def _turn(self, job: Job, folder: Folder) -> pa.Table | None:
        """Go over these files once: their results, or None where somebody else's commits ask for another turn."""
        self._catch_up()
        before = self._disputed(folder)
        self._go_over(job, folder)
        disputed = self._disputed(folder)
        if disputed != before:
            return None  # the ids of these rows are others now
        self._settle(disputed, folder)
        counts = Counts()
        batches = list(read_results(job.items(self._index), self._index, job.tables.carried, counts))
        empty = pa.schema([*SCHEMA, *job.tables.carried]).empty_table()
        return None if counts.left else pa.concat_tables([empty, *batches])

    def _go_over(self, job: Job, folder: Folder) -> None:
        """Commit what is not done. No verdict on an id changes on the way: they follow from the claims alone."""

        def leaves_alone(item: Item, found: ManifestEntry | None) -> bool:
            file, _ = source_of(item)
            other = getattr(found, "source_file", file)
            return is_done(item, found) and (other == file or other not in folder.standing)

        scan_tables(job, self._index, leaves_alone)
        self._catch_up_with_results()
        self._rendering.render(job, select_pending(job.items(self._index), self._index, leaves_alone), self._index)
        self._catch_up()

    # Ids that more than one file's rows have

    def _disputed(self, folder: Folder) -> frozenset[Claim]:
        return self._claims.disputed(folder.names, folder.standing)

    def _settle(self, disputed: frozenset[Claim], folder: Folder) -> None:
        """Have each row of other files that has claimed an id of these rows its result, and no image left behind."""
        for file in sorted({claim.file for claim in disputed} - set(folder.names)):
            with self._tables(folder, [file]) as tables:
                places = {(claim.file, claim.row) for claim in disputed if claim.file == file}
                self._go_over(self._job(tables, places), folder)
        sink = make_sink(self._held)
        for claim in disputed:
            kept = self._index.find((claim.id, claim.image_index))
            if claim.path and kept and kept.path != claim.path:
                sink.remove(claim.path)

    def _tables(self, folder: Folder, names: Sequence[str]) -> Tables:
        settings = self._deployment.settings.table
        settings = replace(settings, tables=tuple(f"./{name}" for name in names), folder=folder.path)

        def has_id(name: str, file: str) -> bool:
            return self._claims.has_before(name, file, folder.standing)

        return Tables(settings, SCHEMA.names, OtherTables(folder.standing, has_id))

    def _job(self, tables: Tables, places: Collection[Place] | None = None) -> Job:
        known = self._deployment
        told = (known.settings, tables, known.card, known.compute, known.record, known.earlier, known.rules)
        return Job(*told) if places is None else _Rows(*told, places)

    # What the manifest has

    def _sweep(self, names: Sequence[str]) -> None:
        """Remove what a worker has left that died over these files."""
        everywhere = [self._out, self._manifest.folder, *make_sink(self._held).folders_of(names)]
        originals = remove_abandoned(self._out, everywhere)
        restore_images(self._out, originals, self._caught_up_index, _set_aside)

    @contextmanager
    def _caught_up_index(self) -> Iterator[ManifestIndex]:
        self._catch_up_with_results()
        yield self._index

    def _catch_up(self) -> None:
        """Take in what has been committed since, by whoever, and what ids were claimed."""
        self._catch_up_with_results()
        self._claims.add(self._manifest.parts())

    def _catch_up_with_results(self) -> None:
        parts = self._manifest.parts()
        names = {part.name for part in parts}
        if not self._known <= names:  # somebody has set one aside, and its rows are as if they had never been rendered
            self._index.close()
            self._index = ManifestIndex(())
        self._index.add(parts, _set_aside)
        self._known = names

    def _is_known(self, key: tuple[str, int]) -> bool:
        return self._index.find(key) is not None


@dataclass(frozen=True, slots=True)
class _Rows(Job):
    """A job of which only the rows at these places are done."""

    places: Collection[Place]

    def items(self, index: ManifestIndex) -> Iterator[Item]:
        return (item for item in super(_Rows, self).items(index) if source_of(item) in self.places)


def _set_aside(damage: DamagedPart) -> None:
    """As a run does; of several workers who find it at once, one does it."""
    try:
        set_aside(damage)
    except StorageError:
        if path_exists(damage.part):
            raise
