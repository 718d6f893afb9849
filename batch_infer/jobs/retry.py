"""Render rows with selected statuses or ids again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

from batch_infer.jobs import out as outdir
from batch_infer.jobs.job import use_current_endpoint, use_signer
from batch_infer.jobs.progress import Progress
from batch_infer.jobs.run import render_tables
from batch_infer.jobs.run_json import count_scanned_results, read_settings, refuse_unrepeatable_tables
from batch_infer.jobs.selected_ids import SelectedIds, select_ids
from batch_infer.jobs.selection import LOST, RowSelection
from batch_infer.jobs.summary import Summary
from batch_infer.jobs.verify import ImageRecords, find_damaged_images
from batch_infer.planning import Item, ManifestEntry, is_finished
from batch_infer.records import ResultRow
from batch_infer.settings import C2paSigner, RetryStatus, RunSettings
from batch_infer.sinks import make_sink, parse_member
from batch_infer.store import Out, Store, open_store

log = logging.getLogger("batch_infer")


@dataclass(frozen=True, slots=True)
class RetrySelection:
    """Which results to render again: those with one of `statuses` and one of the ids.

    An empty `statuses` means any status. The ids are `ids` and those in `ids_file`, which is a table with a column `id`
    or a text file. Without both, any id is selected.
    """

    statuses: tuple[RetryStatus, ...] = ()
    ids: tuple[str, ...] = ()
    ids_file: str | None = None

    def explain(self, _: Item, committed: ManifestEntry) -> str | None:
        """Return why a selected row is rendered again, or None if the reason is the status of its result."""
        if not self.statuses:
            return "selected by id"
        return None if committed.status in self.statuses else LOST


def retry_rows(
    out: Out,
    selection: RetrySelection,
    tables: Sequence[str],
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
    signer: C2paSigner | None = None,
) -> tuple[Summary, RunSettings]:
    """Render selected rows again with the settings of the last run in OUT, and merge.

    `tables` replaces that run's tables unless it is empty. The safety service's endpoint comes from the environment.
    `signer` signs the images if the run signs them. Each row gets one more attempt, no matter how often it failed. Rows
    without a result are left to `run`. Raises BatchInferError, for example UsageError if OUT contains no run or has no
    result with a selected id.
    """
    store = open_store(out)
    record = outdir.read_existing_run(store)
    settings = use_current_endpoint(read_settings(record, store.location, tables))
    settings = use_signer(settings, signer)
    settings = replace(settings, rerender_changed=True)  # only the selected rows are rendered, even if others changed
    if not tables:
        refuse_unrepeatable_tables(record, store.location)
    with select_ids(selection.ids, selection.ids_file) as ids, closing(_SkipOthers(selection, ids, store)) as skip:
        rows = RowSelection(skip, explain=selection.explain)
        if ids is not None:
            rows = replace(rows, check=partial(ids.check, store.location))
        summary = render_tables(settings, progress, stop, rows)
    earlier_total, total = count_scanned_results(record), count_scanned_results(outdir.read_existing_run(store))
    if total < earlier_total:
        log.warning(
            "these tables have %d results and those of the run had %d: results.* do not contain the others",
            total,
            earlier_total,
        )
    return summary, settings


class _SkipOthers:
    """Skips all images except the selected ones. This is a SkipRule.

    An invalid row has one result. If the row is valid now and this result is selected, all its images without a result
    of the present row are selected, since the rule is called for a row's images in order. Rows that are invalid now are
    skipped.
    """

    def __init__(self, selection: RetrySelection, ids: SelectedIds | None, store: Store) -> None:
        self._statuses, self._ids, self._sink = selection.statuses, ids, make_sink(store)
        self._selected_row: str | None = None
        self._folder, self._files = "", set[str]()
        self._store, self._faults = store, ImageRecords()
        self._is_checked = False

    def close(self) -> None:
        self._faults.close()

    def __call__(self, item: Item, committed: ManifestEntry | None) -> bool:
        is_listed = self._ids is None or self._ids.match(item.key)
        if item.image_index == 0:
            self._selected_row = None
        if isinstance(item, ResultRow):
            return True
        if self._selected_row == item.id and not is_finished(item, committed):
            return False
        if committed is None or not is_listed:
            return True
        is_faulty = committed.path is not None and self._is_faulty(item.key, committed.path)
        is_selected = is_faulty or not self._statuses or committed.status in self._statuses
        if is_selected and committed.status == "invalid":
            self._selected_row = item.id
        return not is_selected

    def _is_faulty(self, key: tuple[str, int], path: str) -> bool:
        """Return whether an image is missing or damaged, as the statuses say."""
        if "damaged" not in self._statuses:
            return "missing" in self._statuses and self._is_missing(path)
        if not self._is_checked:  # once OUT is locked, and not again for each pass over the rows
            log.info("reading all images to find the damaged ones")
            find_damaged_images(self._store, self._faults)
            self._is_checked = True
        kind = self._faults.get_fault(key)
        return kind is not None and (kind != "missing_image" or "missing" in self._statuses)

    def _is_missing(self, path: str) -> bool:
        """Return whether an image is missing. Lists each folder once, as long as the images are in table order."""
        if parse_member(path):
            return not self._sink.has(path)
        folder, _, name = path.rpartition("/")
        if folder != self._folder:
            self._folder, self._files = folder, self._sink.list_files(folder)
        return name not in self._files
