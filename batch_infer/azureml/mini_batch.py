"""Mini-batches of table files on one worker: each rendered, committed and given back, however often it comes."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from batch_infer.atomic import KnownFolder
from batch_infer.azureml.deployment import Deployment
from batch_infer.errors import DamagedPart, SettingsError, StorageError, TableError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.job import Job
from batch_infer.jobs.merge import Counts, results_of
from batch_infer.jobs.record import refuse_other
from batch_infer.jobs.recovery import set_aside
from batch_infer.jobs.survey import look_through
from batch_infer.manifest import SCHEMA, Manifest
from batch_infer.planning import in_order, is_done, pending
from batch_infer.records import Source
from batch_infer.sinks import plain_name
from batch_infer.table import Others, Tables
from batch_infer.worker import WorkerSettings
from batch_infer.worker.device import Worker
from batch_infer.worker.loading import load_chain
from batch_infer.worker.rows import worker_name


class MiniBatches:
    """A worker among others that write into the same OUT, with its model loaded.

    None of them holds OUT: a row's image, its name and its key in the manifest follow from the row, so that two who
    do the same row do each other no harm. What a mini-batch that comes again needs no rendering for is taken from the
    manifest, also where another worker has committed it.
    """

    def __init__(self, deployment: Deployment) -> None:
        """Makes OUT, and its run.json where there is none. Raises UsageError, StorageError."""
        self._deployment, self._out = deployment, deployment.settings.out
        self._begin()
        self._held = KnownFolder.of(self._out)
        self._chain = load_chain(deployment.card, deployment.compute, deployment.settings.safety)
        self._manifest = Manifest(self._held)
        self._index = self._manifest.index(damaged=_set_aside)

    def score(self, files: Sequence[str]) -> pa.Table:
        """Render what is not done of these files and return all their results, in their order.

        A file that cannot be read is one invalid result. Raises TableError where none can be read, once that is
        committed; ServiceError where a safety service does not answer, StorageError.
        """
        by_folder: dict[Path, list[str]] = {}
        for file in map(Path, files):
            by_folder.setdefault(file.parent, []).append(file.name)
        parts = [self._score(folder, names) for folder, names in by_folder.items()]
        faults = {name: fault for _, found in parts for name, fault in found.items()}
        if parts and len(faults) == len(files):
            raise TableError("\n".join(faults.values()))
        return pa.concat_tables((table for table, _ in parts), promote_options="permissive")

    def close(self) -> None:
        self._index.close()

    def _begin(self) -> None:
        """Leave a run.json for those who merge, or go on with that of a worker who was here before."""
        deployment = self._deployment
        outdir.refuse_foreign(self._out, (), deployment.earlier)
        if deployment.earlier is not None:
            refuse_other(deployment.earlier, deployment.record, self._out)
            return
        try:
            self._out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"cannot write to {self._out}: {error.strerror or error}") from error
        outdir.write_run(self._out, deployment.record)

    def _score(self, folder: Path, names: Sequence[str]) -> tuple[pa.Table, dict[str, str]]:
        """The results of files in one folder, and why some cannot be read."""
        deployment = self._deployment
        settings = replace(deployment.settings.table, tables=tuple(f"./{name}" for name in names), folder=folder)
        with Tables(settings, SCHEMA.names, self._others(folder, names)) as tables:
            job = Job(
                deployment.settings,
                tables,
                deployment.card,
                deployment.compute,
                deployment.record,
                deployment.earlier,
                deployment.rules,
            )
            self._sweep(names)
            self._catch_up()
            look_through(job, self._index, is_done)
            self._catch_up()
            self._render(job)
            self._catch_up()
            batches = results_of(job.items(), self._index, tables.carried, Counts())
            return pa.concat_tables([pa.schema([*SCHEMA, *tables.carried]).empty_table(), *batches]), tables.faults

    def _others(self, folder: Path, names: Sequence[str]) -> Others:
        """What stands in the folder, and who has committed an id. A file that has gone since has left its ids."""
        try:
            found = {path.name for path in folder.iterdir()}
        except OSError:
            found = set()

        def have_id(name: str, file: str) -> bool:
            committed = self._index.find((name, 0))
            return committed is not None and committed.source_file != file and committed.source_file in found

        return Others(found | set(names), have_id)

    def _render(self, job: Job) -> None:
        """Render and commit what is not done. Raises ServiceError, StorageError."""
        compute = job.compute
        slots_of = None if job.card.driven else lambda size: compute.shape_of(*size).slots
        settings = WorkerSettings(
            job.card, compute, job.settings.safety, job.settings.output, self._held, job.tables.carried
        )
        worker = Worker(settings, worker_name(0), lambda *_: self._chain)
        worker.work(in_order(pending(job.items(), self._index), slots_of), lambda rows: None)

    def _sweep(self, names: Sequence[str]) -> None:
        """Remove what a worker has left that died over these files."""
        stems = {plain_name(Source(name, 0).stem) for name in names}
        folders = [path for kind in ("images", "quarantine") for stem in stems for path in self._folders(kind, stem)]
        outdir.remove_abandoned([self._out, self._manifest.folder, *folders])

    def _folders(self, kind: str, stem: str) -> Iterator[Path]:
        return (self._out / kind).glob(f"{glob.escape(stem)}-[0-9]*")

    def _catch_up(self) -> None:
        """Take in what has been committed since, by whoever."""
        self._index.add(self._manifest.parts(), _set_aside)


def _set_aside(damage: DamagedPart) -> None:
    """As a run does; of several workers who find it at once, one does it."""
    try:
        set_aside(damage)
    except StorageError:
        if damage.part.exists():
            raise
