"""The run: find out what is not done, have it rendered, merge, sum up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from batch_infer.errors import ModelError, SettingsError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.merge import Counts, merge
from batch_infer.jobs.record import choose_compute, describe, refuse_other
from batch_infer.jobs.summary import Summary, peak_memory
from batch_infer.manifest import SCHEMA, Index, Manifest
from batch_infer.models import ModelCard, read_card
from batch_infer.planning import chunks, is_done, pending
from batch_infer.records import PromptRequest, ResultRow, digest, now
from batch_infer.settings import RowDefaults, RunSettings
from batch_infer.sinks import FolderSink
from batch_infer.table import RowRules, Tables

if TYPE_CHECKING:
    from batch_infer.worker import WorkerSettings

INVALID_BATCH = 1024
INVALID_SHOWN = 20
"""Invalid rows that are logged; the results name them all."""

log = logging.getLogger("batch_infer")


class Progress(Protocol):
    """Who is told how a run goes."""

    def start(self, survey: Survey) -> None: ...
    def committed(self, rows: Sequence[ResultRow]) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Survey:
    """What a walk over the tables found before anything is rendered, in results (a row has one for each image)."""

    total: int = 0
    done: int = 0
    invalid: int = 0
    pending: int = 0


def run(settings: RunSettings, progress: Progress, stop: Callable[[], bool] = lambda: False) -> Summary:
    """Score the tables into OUT, going on where an earlier run ended. Raises the errors of `batch_infer.errors`."""
    # Absolute: Arrow takes a relative path with a colon in it for a URI.
    settings = replace(settings, out=settings.out.absolute())
    tables = Tables(settings.table, SCHEMA.names)
    card = read_card(settings.model)
    if settings.model.name is None:
        log.info("no --model given: the built-in demo model draws one coloured shape at 64x64 pixels")
    _check_safety(settings, card)
    with outdir.locked(settings.out):
        found = outdir.read_run(settings.out)
        outdir.refuse_foreign(settings.out, tables.files, found)
        earlier = None if settings.overwrite else found
        job = _Run(settings, tables, card, earlier)
        if settings.overwrite:
            outdir.clear(settings.out)
        elif earlier is not None and earlier.get("summary") is None:
            outdir.remove_leftovers(settings.out)
        with _logged(settings.out):
            return job.go(progress, stop)


class _Run:
    """One run on an OUT that it holds the lock of."""

    def __init__(self, settings: RunSettings, tables: Tables, card: ModelCard, earlier: dict[str, Any] | None) -> None:
        self._settings, self._tables, self._card, self._earlier = settings, tables, card, earlier
        self._compute = choose_compute(settings, earlier)
        self._record = describe(settings, card, self._compute, tables.files)
        if earlier is not None and Manifest(settings.out).parts():
            refuse_other(earlier, self._record, settings.out)
        self._rules = RowRules(_fill(settings.defaults, card), card.sizes, digest(self._record["identity"]))
        self._rules.check()

    def go(self, progress: Progress, stop: Callable[[], bool]) -> Summary:
        out = self._settings.out
        outdir.write_run(out, self._record)
        started = time.monotonic()
        manifest = Manifest(out)
        summary = Summary()
        with manifest.index() as index:
            survey = self._survey(manifest, index)
            if survey.pending and not stop():
                with closing(progress):
                    progress.start(survey)
                    self._render(index, progress, stop, summary)
        with manifest.index() as index:
            counts = merge(self._items(), index, self._tables.carried, out, self._settings.output)
        self._sum_up(summary, counts, time.monotonic() - started)
        outdir.write_run(out, {**self._record, "finished_at": now(), "summary": summary.as_dict()})
        return summary

    def _items(self) -> Iterator[PromptRequest | ResultRow]:
        return self._tables.rows(self._rules)

    def _survey(self, manifest: Manifest, index: Index) -> Survey:
        """Count what there is to do, and commit the invalid rows: they wait for no device."""
        survey = Survey()
        invalid: list[ResultRow] = []
        fresh = 0
        for item in self._items():
            survey.total += 1
            found = index.find(item.key)
            done = is_done(item, found)
            if isinstance(item, PromptRequest):
                survey.done += done
                survey.pending += not done
                continue
            survey.invalid += 1
            if not done:
                fresh += 1
                level = logging.WARNING if fresh <= INVALID_SHOWN else logging.DEBUG
                log.log(level, "%s, row %d (%s): %s", item.source_file, item.source_row, item.id, item.error)
                invalid.append(replace(item, attempt=found.attempt + 1 if found else 1, worker="table"))
                if len(invalid) == INVALID_BATCH:
                    self._commit_invalid(manifest, index, invalid)
        self._commit_invalid(manifest, index, invalid)
        if survey.invalid > min(fresh, INVALID_SHOWN):
            log.warning("%d invalid rows in all; results.parquet names each with its error", survey.invalid)
        return survey

    def _commit_invalid(self, manifest: Manifest, index: Index, rows: list[ResultRow]) -> None:
        """Commit invalid rows, and let go of the images that they had while they were valid."""
        if not rows:
            return
        manifest.commit(rows, self._tables.carried)
        sink = FolderSink(self._settings.out)
        for row in rows:
            for path in index.paths(row.id):
                sink.remove(path)
        rows.clear()

    def _render(self, index: Index, progress: Progress, stop: Callable[[], bool], summary: Summary) -> None:
        from batch_infer.engines import local

        def committed(rows: Sequence[ResultRow]) -> None:
            summary.rendered += sum(row.status in ("ok", "flagged") for row in rows)
            progress.committed(rows)

        try:
            stages = local.render(chunks(pending(self._items(), index)), self._worker(), committed, stop)
        except ModelError:
            # Nothing was rendered with this model: it must not stand in the way of another.
            outdir.restore_run(self._settings.out, self._earlier)
            raise
        summary.add_stages(stages)

    def _worker(self) -> WorkerSettings:
        from batch_infer.chain import ChainShape
        from batch_infer.worker import WorkerSettings, worker_name

        compute, settings = self._compute, self._settings
        return WorkerSettings(
            name=worker_name(0),
            card=self._card,
            device=compute.device,
            dtype=compute.dtype,
            shape=ChainShape(compute.slots, compute.decode_batch),
            threads=compute.threads,
            safety=settings.safety,
            output=settings.output,
            out=settings.out,
            carried=self._tables.carried,
        )

    def _sum_up(self, summary: Summary, counts: Counts, seconds: float) -> None:
        summary.counts = counts
        summary.seconds = seconds
        summary.peak_memory = peak_memory(self._compute.device)


def _fill(defaults: RowDefaults, card: ModelCard) -> RowDefaults:
    """The defaults of rows, option over model."""
    own: dict[str, Any] = {
        "num_inference_steps": card.num_inference_steps,
        "guidance_scale": card.guidance_scale,
        "guidance_rescale": card.guidance_rescale,
        "height": card.sizes.native_height,
        "width": card.sizes.native_width,
    }
    missing: dict[str, Any] = {name: value for name, value in own.items() if getattr(defaults, name) is None}
    return replace(defaults, **missing)


def _check_safety(settings: RunSettings, card: ModelCard) -> None:
    if settings.safety.mode == "none":
        if settings.safety.required:
            raise SettingsError("--require-safety and --safety none do not go together")
        return
    if card.has_checker:
        return
    if settings.safety.required or settings.safety.mode == "checker":
        raise SettingsError(f"{card.name} has no safety checker, and this run asks for one; images would go unjudged")
    log.warning("%s has no safety checker: nsfw_content_detected will be null, nobody is asked", card.name)


@contextmanager
def _logged(out: Path) -> Iterator[None]:
    """Keep what is logged in OUT too."""
    (out / "logs").mkdir(exist_ok=True)
    handler = logging.FileHandler(out / "logs" / "worker-0.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
