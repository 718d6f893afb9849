"""Check the stored images of OUT again with other checkers or thresholds, without rendering."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import msgspec

from batch_infer.errors import SettingsError, StoppedError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.checksums import ROOT_DIGEST, add_root_digest
from batch_infer.jobs.compaction import COMPACTION_PARTS
from batch_infer.jobs.description import describe_safety
from batch_infer.jobs.job import find_model, open_tables, use_signer
from batch_infer.jobs.merge import merge
from batch_infer.jobs.recovery import (
    remove_leftovers,
    remove_unnamed_images,
    retry_without_damaged_parts,
    set_aside,
)
from batch_infer.jobs.rescorer import RescoreCounts, Rescorer, StoredResult
from batch_infer.jobs.run_json import (
    add_counts,
    count_scanned_results,
    ended_cleanly,
    read_rules,
    read_settings,
    refuse_unrepeatable_tables,
    without_tables_digest,
)
from batch_infer.jobs.summary import Counts
from batch_infer.manifest import CommittedImage, Manifest, ManifestIndex, to_arguments
from batch_infer.models import ModelCard
from batch_infer.planning import Item, make_finished_check
from batch_infer.records import FINAL_STATUSES, PromptRequest, ResultRow, digest, utc_now
from batch_infer.settings import C2paSigner, OnFlagged, RunSettings, SafetySettings
from batch_infer.stopping import GRACE_SECONDS, deferred
from batch_infer.store import Out, Store, open_store, to_absolute
from batch_infer.table import Tables

BATCH = 64
"""Maximum number of results to check and commit together, since all their pixels are in memory."""
DISCARDING_POLICIES: Mapping[OnFlagged, str] = {
    "blank": "replaced by a black image",
    "blur": "replaced by a blurred image",
    "drop": "removed",
}
"""What happens to the original of a flagged image under these policies. Other policies keep the original."""

log = logging.getLogger("batch_infer")


def rescore_images(
    out: Out,
    tables: Sequence[str],
    safety: SafetySettings,
    report: Callable[[RescoreCounts], None],
    stop: Callable[[], bool] = lambda: False,
    signer: C2paSigner | None = None,
) -> tuple[RescoreCounts, Counts]:
    """Check the stored images of OUT with the checkers in `safety`, and merge.

    `tables` replaces the run's tables unless it is empty. If `safety` has no policy for flagged images, the run's
    policy applies. If the policy discards originals, a warning is logged before the first check. Until the rescore
    finishes, run.json marks it as unfinished, and `run` without --overwrite, `retry` and `merge` refuse OUT. A call
    with the same arguments continues it. `report` receives the counts after each batch. `signer` signs new image files
    if the run signs its images. Raises UsageError, LockedError, ServiceError, StorageError, StoppedError.
    """
    unlocked_store = open_store(to_absolute(out))
    settings = _read_settings(outdir.read_existing_run(unlocked_store), unlocked_store.location, tables, safety)
    with open_tables(settings) as opened_tables:
        card = find_model(settings)
        if safety.service is None and not safety.uses_checker(has_checker=card.has_checker):
            raise SettingsError(f"--safety {safety.mode}: no safety checker is available; use checker, azure or both")
        with outdir.locked(unlocked_store) as store:
            record = outdir.read_existing_run(store)  # it may have changed before OUT was locked
            settings = _read_settings(record, store.location, tables, safety)
            execution = _RescoreExecution(record, use_signer(settings, signer), store, opened_tables, card)
            if tables:
                execution.refuse_missing_tables()
            return execution.execute(report, stop)


def _read_settings(record: Mapping[str, Any], out: str, tables: Sequence[str], safety: SafetySettings) -> RunSettings:
    if not tables:
        refuse_unrepeatable_tables(record, out)
    settings = read_settings(record, out, tables)
    return replace(settings, safety=safety.with_policy_of(settings.safety))


class _RescoreExecution:
    """Rescores a locked OUT.

    Until the rescore finishes, OUT contains results under the rules of the run and of stopped rescores. `_sources` maps
    the fingerprints of these rules, except those of this rescore, to their policies.
    """

    def __init__(
        self, record: Mapping[str, Any], settings: RunSettings, store: Store, tables: Tables, card: ModelCard
    ) -> None:
        self._store, self._on_damage = store, partial(set_aside, store)
        self._settings, self._tables, self._card = settings, tables, card
        rules = read_rules(record, settings.out)
        identity = {**record["identity"], "safety": describe_safety(settings.safety, card)}
        self._rules = replace(rules, fingerprint=digest(identity))
        unfinished = record.get("rescoring", {})
        self._is_resumed = bool(unfinished)
        sources = {**unfinished, rules.fingerprint: read_settings(record, settings.out).safety.policy}
        self._sources = {name: policy for name, policy in sources.items() if name != self._rules.fingerprint}
        self._record = {
            **record,
            "settings": {**record["settings"], "safety": msgspec.to_builtins(settings.safety)},
            "identity": identity,
            "rules": {**record["rules"], "fingerprint": self._rules.fingerprint},
        }

    def refuse_missing_tables(self) -> None:
        """Raise SettingsError if these tables have fewer results than the run's, since results.* would lose some."""
        results = sum(1 for _ in self._tables.read_rows(self._rules, lambda _: True))
        total = count_scanned_results(self._record)
        if results < total:
            raise SettingsError(
                f"these tables have {results} results and those of the run had {total}: name all tables of the run"
            )

    def execute(
        self, report: Callable[[RescoreCounts], None], stop: Callable[[], bool]
    ) -> tuple[RescoreCounts, Counts]:
        """Check results, merge, and store the new settings in run.json.

        Raises UsageError, StorageError, ServiceError, StoppedError.
        """
        store, on_damage = self._store, self._on_damage
        if self._is_resumed or not ended_cleanly(self._record):
            retry_without_damaged_parts(lambda: remove_leftovers(store), on_damage)
        with closing(Rescorer(self._settings, store, self._card, self._record, stop)) as rescorer:
            self._record.pop(ROOT_DIGEST, None)  # a kill while results.* are replaced would leave it wrong
            outdir.write_run(store, {**self._record, "rescoring": self._sources})
            retry_without_damaged_parts(lambda: self._check(rescorer, report, stop), on_damage)
        counts = retry_without_damaged_parts(self._merge, on_damage)
        record = without_tables_digest({name: self._record[name] for name in self._record if name != "rescoring"})
        outdir.write_run(store, add_root_digest(store, {**add_counts(record, counts), "rescored_at": utc_now()}))
        return rescorer.counts, counts

    def _check(self, rescorer: Rescorer, report: Callable[[RescoreCounts], None], stop: Callable[[], bool]) -> None:
        """Check all results that were not stored under the new rules."""
        policy = self._settings.safety.policy
        with Manifest(self._store).index() as index:
            pending = self._pending_results(index, rescorer)
            for number, batch in enumerate(iter(lambda: list(islice(pending, BATCH)), [])):
                if number == 0 and policy in DISCARDING_POLICIES:
                    log.warning(
                        "originals of images that are flagged now will be %s (--on-flagged %s) and can only be rendered"
                        " again; --on-flagged quarantine or keep would keep them",
                        DISCARDING_POLICIES[policy],
                        policy,
                    )
                if stop():
                    raise StoppedError("stopped; results so far are kept, and the same command continues")
                with deferred(GRACE_SECONDS):
                    rescorer.rescore(batch, self._tables.carried)
                if number % COMPACTION_PARTS == COMPACTION_PARTS - 1:
                    rescorer.compact(excluded=index.parts)  # the index reads its own parts until the end
                report(rescorer.counts)

    def _pending_results(self, index: ManifestIndex, rescorer: Rescorer) -> Iterator[StoredResult]:
        """Yield the results of current rows that were not stored under the new rules.

        If the rescore is resumed, also remove duplicate files of the results that were.
        """
        items, collisions = self._items(index), rescorer.sink.collisions(index)
        while batch := list(islice(items, BATCH)):
            matches: list[tuple[PromptRequest, CommittedImage, OnFlagged]] = []
            for new, *old in batch:
                committed = index.find(new.key)
                if committed is None or not isinstance(new, PromptRequest):
                    continue
                if committed.fingerprint == new.fingerprint:
                    if self._is_resumed:
                        rescorer.remove_duplicates(collisions.mark(new, committed.path), committed)
                    continue
                policies = {item.fingerprint: policy for item, policy in zip(old, self._sources.values(), strict=True)}
                if committed.fingerprint in policies:
                    matches.append((new, committed, policies[committed.fingerprint]))
            rows = to_arguments(index.read_results([committed for _, committed, _ in matches]))
            for (new, _, policy), row in zip(matches, rows, strict=True):
                yield StoredResult(new, ResultRow(**row, carried=new.carried), policy)

    def _items(self, index: ManifestIndex) -> Iterator[tuple[Item, ...]]:
        """Yield each item as read by the new rules, followed by its versions as read by the rules of each source."""

        def is_finished(request: PromptRequest) -> bool:
            """Ignore the fingerprint, so that all scans yield the same number of items."""
            return (committed := index.find(request.key)) is not None and committed.status in FINAL_STATUSES

        fingerprints = (self._rules.fingerprint, *self._sources)
        scans = [self._tables.read_rows(replace(self._rules, fingerprint=name), is_finished) for name in fingerprints]
        return zip(*scans, strict=True)

    def _merge(self) -> Counts:
        tables = self._tables
        with Manifest(self._store).index() as index:
            items = tables.read_rows(self._rules, make_finished_check(index))
            counts = merge(items, index, tables.carried, self._store, self._settings.output)
        remove_unnamed_images(self._store, self._record, counts, committed=())
        return counts
