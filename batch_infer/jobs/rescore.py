"""Judging stored images again, by other judges or other thresholds, with nothing rendered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from batch_infer.errors import Interrupted, SettingsError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.job import find_model, open_tables, refuse_unrepeatable, rules_of, settings_of
from batch_infer.jobs.merge import Counts, merge
from batch_infer.jobs.record import policy_of
from batch_infer.jobs.rejudging import NOT_KEPT, Rejudging, Rescored, Stored
from batch_infer.manifest import Index, Manifest
from batch_infer.models import ModelCard
from batch_infer.records import PromptRequest, ResultRow, digest, now
from batch_infer.settings import RunSettings, SafetySettings
from batch_infer.table import Tables

BATCH = 256
"""Results that are read, judged and committed together."""
ORIGINAL = frozenset({"keep", "quarantine"})
"""What --on-flagged leaves as it was rendered."""


def rescore(
    out: Path,
    tables: Sequence[str],
    safety: SafetySettings,
    tell: Callable[[Rescored], None],
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Rescored, Counts]:
    """Have the images of OUT judged as `safety` says, and merge. Prompts are not asked about: they were rendered.

    What has no image that could be judged keeps what was said of it, with a word on that. Where it was stopped, or a
    service was down, the same call goes on. `tell` is told how it goes. Raises UsageError, LockedError, ServiceError,
    StorageError, Interrupted.
    """
    out = out.absolute()
    record = outdir.known_run(out)
    before = settings_of(record, out, tables)
    if not tables:
        refuse_unrepeatable(record, out)
    settings = replace(before, safety=safety)
    with open_tables(settings) as opened:
        card = find_model(settings)
        if safety.service is None and not safety.asks_checker(has_checker=card.has_checker):
            raise SettingsError(f"--safety {safety.mode}: nobody would be asked; say checker, azure, or both")
        with outdir.locked(out):
            work = _Rescoring(outdir.known_run(out), settings, opened, card)
            rescored = work.judge(before.safety, tell, stop)
            return rescored, work.conclude()


class _Rescoring:
    """The results of an OUT that is held, under other rules of safety."""

    def __init__(self, record: Mapping[str, Any], settings: RunSettings, tables: Tables, card: ModelCard) -> None:
        self._settings, self._tables, self._card = settings, tables, card
        self._old = rules_of(record, settings.out)
        identity = {**record["identity"], "safety": policy_of(settings.safety, card)}
        self._new = replace(self._old, fingerprint=digest(identity))
        told = {"settings": {**record["settings"], "safety": asdict(settings.safety)}, "identity": identity}
        self._record = {**record, **told, "rules": {**record["rules"], "fingerprint": self._new.fingerprint}}

    def judge(self, before: SafetySettings, tell: Callable[[Rescored], None], stop: Callable[[], bool]) -> Rescored:
        """Judge all that was not judged by these rules yet."""
        rejudging = Rejudging(self._settings, self._card, self._record, stop)
        with closing(rejudging), Manifest(self._settings.out).index() as index:
            todo = self._todo(index)
            while batch := list(islice(todo, BATCH)):
                if stop():
                    raise Interrupted("stopped; what is judged is kept, the same command goes on")
                rejudging.judge([entry for entry in batch if _has_original(entry, before)])
                rejudging.leave([entry for entry in batch if not _has_original(entry, before)])
                rejudging.commit(self._tables.carried)
                tell(rejudging.rescored)
        return rejudging.rescored

    def _todo(self, index: Index) -> Iterator[Stored]:
        """The results of the rows as the tables have them, but for those that these rules know."""
        pairs = zip(self._tables.rows(self._old), self._tables.rows(self._new), strict=True)
        while batch := list(islice(pairs, BATCH)):
            known = [(old, new, index.find(new.key)) for old, new in batch if old.fingerprint != new.fingerprint]
            found = [(new, kept) for old, new, kept in known if kept and kept.fingerprint == old.fingerprint]
            rows = index.take([kept for _, kept in found]).to_pylist(maps_as_pydicts="strict")
            for (new, _), row in zip(found, rows, strict=True):
                if isinstance(new, PromptRequest):
                    yield Stored(new, ResultRow(**row, carried=new.carried))

    def conclude(self) -> Counts:
        """Have run.json say who has judged the images, and write results.*. Raises StorageError."""
        out = self._settings.out
        with Manifest(out).index() as index:
            counts = merge(self._tables.rows(self._new), index, self._tables.carried, out, self._settings.output)
        summary = self._record.get("summary")
        summary = None if summary is None else {**summary, **asdict(counts)}
        outdir.write_run(out, {**self._record, "summary": summary, "rescored_at": now()})
        return counts


def _has_original(entry: Stored, before: SafetySettings) -> bool:
    """Whether the image is stored as it was rendered; one that was left at an earlier judging is not."""
    row = entry.row
    kept = row.status == "ok" or (before.on_flagged in ORIGINAL and NOT_KEPT not in (row.error or ""))
    return kept and row.generated_image is not None
