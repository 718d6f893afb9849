"""Judging stored images again, by other judges or other thresholds, with nothing rendered."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from batch_infer.errors import DamagedPart, Interrupted, SettingsError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.job import find_model, open_tables, refuse_unrepeatable, rules_of, settings_of
from batch_infer.jobs.merge import Counts, merge
from batch_infer.jobs.record import policy_of
from batch_infer.jobs.recovery import remove_leftovers, set_aside
from batch_infer.jobs.rejudging import Rejudging, RescoreCounts, Stored
from batch_infer.jobs.run_json import ended_in_order, with_counts
from batch_infer.manifest import CommittedImage, Manifest, ManifestIndex
from batch_infer.models import ModelCard
from batch_infer.planning import make_finished_check
from batch_infer.records import FINAL_STATUSES, PromptRequest, ResultRow, digest, utc_now
from batch_infer.settings import OnFlagged, RunSettings, SafetySettings
from batch_infer.stopping import GRACE_SECONDS, deferred
from batch_infer.table import Tables

BATCH = 64
"""Results that are read, judged and committed together; their pixels are held meanwhile."""
LOSSES: Mapping[OnFlagged, str] = {
    "blank": "replaced by a black image",
    "blur": "replaced by a blurred image",
    "drop": "removed",
}
"""What becomes of the original of a flagged image, by policy; the other policies keep it."""

T = TypeVar("T")

log = logging.getLogger("batch_infer")


def rescore_images(
    out: Path,
    tables: Sequence[str],
    safety: SafetySettings,
    tell: Callable[[RescoreCounts], None],
    stop: Callable[[], bool] = lambda: False,
) -> tuple[RescoreCounts, Counts]:
    """Have the images of OUT judged as `safety` says, and merge.

    Without a policy in `safety`, flagged images are stored as the run did; what is lost by that is logged before.
    Until that is through, run.json says that it is under way, and what else would work in OUT refuses to: the same
    call goes on, where it was stopped or a service was down. `tell` is told how it goes. Raises UsageError,
    LockedError, ServiceError, StorageError, Interrupted.
    """
    out = out.absolute()
    settings = _settings(outdir.known_run(out), out, tables, safety)
    with open_tables(settings) as opened:
        card = find_model(settings)
        if safety.service is None and not safety.uses_checker(has_checker=card.has_checker):
            raise SettingsError(f"--safety {safety.mode}: nobody would be asked; say checker, azure, or both")
        with outdir.locked(out):
            record = outdir.known_run(out)  # another may have been at work until now
            work = _Rescoring(record, _settings(record, out, tables, safety), opened, card)
            if tables:
                work.refuse_fewer_rows()
            rescored = work.judge(tell, stop)
            return rescored, work.conclude()


def _settings(record: Mapping[str, Any], out: Path, tables: Sequence[str], safety: SafetySettings) -> RunSettings:
    if not tables:
        refuse_unrepeatable(record, out)
    settings = settings_of(record, out, tables)
    return replace(settings, safety=safety.with_policy_of(settings.safety))


class _Rescoring:
    """The results of an OUT that is held, under other rules of safety.

    `sources`: the fingerprints of the rules that results may still be of, each with what was then done to what was
    flagged. There are several where a rescoring was not brought to its end.
    """

    def __init__(self, record: Mapping[str, Any], settings: RunSettings, tables: Tables, card: ModelCard) -> None:
        self._settings, self._tables, self._card = settings, tables, card
        rules = rules_of(record, settings.out)
        identity = {**record["identity"], "safety": policy_of(settings.safety, card)}
        self._new = replace(rules, fingerprint=digest(identity))
        before = settings_of(record, settings.out).safety
        self._resumed = bool(record.get("rescoring"))
        sources = {**record.get("rescoring", {}), rules.fingerprint: before.policy}
        self._sources = {name: policy for name, policy in sources.items() if name != self._new.fingerprint}
        told = {"settings": {**record["settings"], "safety": asdict(settings.safety)}, "identity": identity}
        self._record = {**record, **told, "rules": {**record["rules"], "fingerprint": self._new.fingerprint}}
        self._total = (record.get("survey") or {}).get("total", 0)

    def refuse_fewer_rows(self) -> None:
        """Results of tables that are not named would be left out, and be rendered anew. Raises SettingsError."""
        found = sum(1 for _ in self._tables.rows(self._new, lambda _: True))
        if found < self._total:
            raise SettingsError(f"these tables have {found} results to give and the run had {self._total}: name all")

    def judge(self, tell: Callable[[RescoreCounts], None], stop: Callable[[], bool]) -> RescoreCounts:
        """Judge all that was not judged by these rules yet. Raises StorageError, ServiceError, Interrupted."""
        out = self._settings.out
        if self._resumed or not ended_in_order(self._record):
            remove_leftovers(out, Manifest(out), set_aside)
        rejudging = Rejudging(self._settings, self._card, self._record, stop)
        outdir.write_run(out, {**self._record, "rescoring": self._sources})
        with closing(rejudging):
            _without_damaged_parts(lambda: self._judge_all(rejudging, tell, stop))
        return rejudging.rescored

    def _judge_all(self, rejudging: Rejudging, tell: Callable[[RescoreCounts], None], stop: Callable[[], bool]) -> None:
        with Manifest(self._settings.out).index() as index:
            todo = self._todo(index, rejudging)
            if first := next(todo, None):
                self._warn_of_loss()
                todo = chain([first], todo)
            while batch := list(islice(todo, BATCH)):
                if stop():
                    raise Interrupted("stopped; what is judged is kept, the same command goes on")
                with deferred(GRACE_SECONDS):
                    rejudging.judge(batch)
                    rejudging.commit(self._tables.carried)
                tell(rejudging.rescored)

    def _warn_of_loss(self) -> None:
        """Say, before anything is judged, that originals of flagged images will be lost."""
        policy = self._settings.safety.policy
        if policy in LOSSES:
            log.warning(
                "the original of every image that is flagged now will be %s (--on-flagged %s), and only rendering it"
                " again brings it back; --on-flagged quarantine or keep would keep it",
                LOSSES[policy],
                policy,
            )

    def _todo(self, index: ManifestIndex, rejudging: Rejudging) -> Iterator[Stored]:
        """The results of the rows as the tables have them, but for those that these rules know."""

        def is_finished(request: PromptRequest) -> bool:
            """Return whether the row is finished under any rules: every walk yields the same number of items."""
            return (match := index.find(request.key)) is not None and match.status in FINAL_STATUSES

        walks = [
            self._tables.rows(replace(self._new, fingerprint=name), is_finished)
            for name in (self._new.fingerprint, *self._sources)
        ]
        items, collisions = zip(*walks, strict=True), rejudging.sink.collisions(index)
        while batch := list(islice(items, BATCH)):
            found: list[tuple[PromptRequest, CommittedImage, OnFlagged]] = []
            for new, *old in batch:
                kept = index.find(new.key)
                if kept is None or not isinstance(new, PromptRequest):
                    continue
                if kept.fingerprint == new.fingerprint:
                    if self._resumed:
                        rejudging.tidy(collisions.mark(new, kept.path), kept)
                    continue
                known = {item.fingerprint: policy for item, policy in zip(old, self._sources.values(), strict=True)}
                if kept.fingerprint in known:
                    found.append((new, kept, known[kept.fingerprint]))
            rows = index.take([kept for _, kept, _ in found]).to_pylist(maps_as_pydicts="strict")
            for (new, _, policy), row in zip(found, rows, strict=True):
                yield Stored(new, ResultRow(**row, carried=new.carried), policy)

    def conclude(self) -> Counts:
        """Have run.json say who has judged the images, and write results.*. Raises StorageError."""
        out = self._settings.out
        counts = _without_damaged_parts(self._merge)
        record = {name: value for name, value in self._record.items() if name != "rescoring"}
        outdir.write_run(out, {**with_counts(record, asdict(counts)), "rescored_at": utc_now()})
        return counts

    def _merge(self) -> Counts:
        out, tables = self._settings.out, self._tables
        with Manifest(out).index() as index:
            return merge(
                tables.rows(self._new, make_finished_check(index)), index, tables.carried, out, self._settings.output
            )


def _without_damaged_parts(work: Callable[[], T]) -> T:
    """Do work on the manifest, and again after each damaged part is set aside.

    While a rescoring is under way no other command may set it aside. Its rows are left to `run`.
    """
    while True:
        try:
            return work()
        except DamagedPart as damage:
            set_aside(damage)
