"""Scan the tables before rendering: count and explain pending results, and commit invalid rows."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from batch_infer.errors import SettingsError
from batch_infer.jobs.job import Job
from batch_infer.jobs.run_json import parse_record
from batch_infer.jobs.selection import RowSelection
from batch_infer.jobs.summary import JsonStruct
from batch_infer.manifest import Manifest, ManifestIndex
from batch_infer.planning import Item, ManifestEntry, make_finished_check, split_batches
from batch_infer.records import FINAL_STATUSES, PromptRequest, ResultRow
from batch_infer.sinks import make_sink
from batch_infer.table import RowRules

INVALID_BATCH = 1024
"""Maximum number of invalid rows to commit together."""
INVALID_BYTES = 64 << 20
"""Size in bytes of the texts and carried cells at which a batch ends early."""
MAX_LOGGED_INVALID = 20
"""Maximum number of invalid rows to log as warnings. results.* contain all."""
OPTIONS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "guidance_rescale": "--guidance-rescale",
    "height": "--height",
    "width": "--width",
    "negative_prompt": "--negative-prompt",
    "seed": "--seed",
    "num_images_per_prompt": "--images-per-prompt",
}
"""The option that sets the default of each field."""

log = logging.getLogger("batch_infer")


class ScanResult(JsonStruct, rename={"finished": "done", "skipped": "standing", "uncommitted": "unsettled"}):
    """Counts of all results that the tables require: one per image or invalid row.

    `finished` counts the results to skip, except invalid ones. `skipped` counts them by status, or as `left` if the
    current rows have no results yet: `retry` leaves these to `run`. `uncommitted` counts the invalid rows that `retry`
    leaves to `run`. `sizes` lists the sizes (height, width) of pending results, and `reasons` counts these results by
    reason. `changes` names the options that changed rows.
    """

    total: int = 0
    finished: int = 0
    invalid: int = 0
    pending: int = 0
    skipped: dict[str, int] = {}
    sizes: list[tuple[int, int]] = []
    reasons: dict[str, int] = {}
    changes: str = ""
    uncommitted: int = 0

    def add(self, item: Item, committed: ManifestEntry | None, *, skip: bool, reason: str | None = None) -> None:
        """Count a result. `reason` is why it is pending although it is current, if not for its status."""
        self.total += 1
        current = committed if committed is not None and committed.fingerprint == item.fingerprint else None
        if isinstance(item, ResultRow):
            self.invalid += 1
            self.uncommitted += skip and current is None
        elif skip:
            self.finished += 1
            status = current.status if current else "left"
            self.skipped[status] = self.skipped.get(status, 0) + 1
        else:
            self.pending += 1
            reason = explain_pending(item, committed, reason)
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            size = item.params.height, item.params.width
            if size not in self.sizes:
                self.sizes.append(size)

    @property
    def explanation(self) -> str:
        """The reasons for pending results: `1 new, 22 changed (num_inference_steps 8 -> 50)`."""
        return format_reasons(self.reasons, self.changes)


def explain_pending(item: Item, committed: ManifestEntry | None, current_reason: str | None = None) -> str:
    """Return why an item with this committed result is pending.

    `current_reason` is the reason if the result is current, or None if its status is the reason.
    """
    if committed is None:
        return "new"
    if committed.status == "invalid":
        return "invalid before"
    if committed.fingerprint != item.fingerprint:
        return "changed"
    return current_reason or f"{committed.status} before"


def format_reasons(reasons: Mapping[str, int], changes: str) -> str:
    """Format counts by reason and the options that changed rows. Return '' if all rows are new."""
    if set(reasons) <= {"new"}:
        return ""
    cause = {"changed": f" ({changes})"} if changes else {}
    return ", ".join(f"{count:,} {reason}{cause.get(reason, '')}" for reason, count in reasons.items())


def scan_tables(
    job: Job, index: ManifestIndex, selection: RowSelection, changes: str = "", *, writes: bool = True
) -> ScanResult:
    """Count the results of the tables, and commit new invalid rows, which need no device.

    Raises StorageError, and the errors of reading the tables.

    `changes` names the options that changed rows. Without `writes`, leave invalid rows to `commit_invalid`.
    """
    result, new_invalid = ScanResult(changes=changes), 0

    def find_new_invalid() -> Iterator[ResultRow]:
        nonlocal new_invalid
        for item in job.items(index):
            committed = index.find(item.key)
            is_skipped = selection.skip(item, committed)
            reason = selection.explain(item, committed) if committed and not is_skipped else None
            result.add(item, committed, skip=is_skipped, reason=reason)
            if isinstance(item, ResultRow) and not is_skipped:
                new_invalid += 1
                level = logging.WARNING if new_invalid <= MAX_LOGGED_INVALID else logging.DEBUG
                log.log(level, "%s (%s): %s", item.source, item.id, item.error)
                yield item

    if writes:
        _commit_invalid(job, find_new_invalid(), index)
    else:
        for _ in find_new_invalid():  # count and log them
            pass
    for notice in job.tables.notices:
        log.warning("%s", notice)
    if result.invalid > min(new_invalid, MAX_LOGGED_INVALID):
        rows = "1 row is" if result.invalid == 1 else f"{result.invalid} rows are"
        log.warning("%s invalid; results.parquet contains each with its error", rows)
    return result


def commit_invalid(job: Job) -> None:
    """Commit all invalid rows after --overwrite cleared OUT. Raises StorageError, and the errors of the tables."""
    with ManifestIndex(()) as index:
        _commit_invalid(job, (item for item in job.items(index) if isinstance(item, ResultRow)), index)


def _commit_invalid(job: Job, rows: Iterable[ResultRow], index: ManifestIndex) -> None:
    """Commit invalid rows, and remove the image that each result replaces, if any."""
    manifest, sink = Manifest(job.store, job.number), make_sink(job.store)
    for batch in split_batches(rows, INVALID_BATCH, INVALID_BYTES):
        entries = [index.find(row.key) for row in batch]
        attempts = [entry.attempt + 1 if entry else 1 for entry in entries]
        numbered = zip(batch, attempts, strict=True)
        rows_to_commit = [replace(row, attempt=attempt, worker="table") for row, attempt in numbered]
        manifest.commit(rows_to_commit, job.tables.carried)
        sink.remove(*(entry.path for entry in entries if entry and entry.path))


@dataclass(slots=True)
class Changes:
    """Number of finished images that changed options would replace, and a description of each of these options."""

    images: int = 0
    causes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(self.causes.values())

    def refuse(self, job: Job) -> None:
        """Raise SettingsError if finished images would be replaced without --rerender-changed."""
        if not self.images or job.settings.rerender_changed:
            return
        verb = "differs" if len(self.causes) == 1 else "differ"
        raise SettingsError(
            f"{self.images:,} finished image{'s' * (self.images != 1)} in {job.settings.out} would be rendered again "
            f"and replaced, because {' and '.join(self.causes)} {verb} from the run that made them ({self}): give the "
            "same options again, or add --rerender-changed to render them again, or --overwrite to start anew"
        )


def find_changes(job: Job, index: ManifestIndex) -> Changes:
    """Count the finished images that this run's options would replace.

    Ignore rows whose own cells changed, unless the source of default ids differs or run.json is missing.

    Scan the tables only if the rules for rows ever differed in this OUT, --column differs, or run.json is missing.
    """
    if job.earlier is None:
        items = job.items(index) if _count_finished(index) else ()
        images = sum(_find_replaced(item, index) is not None for item in items)
        causes = {"an option or a row": "run.json, which records the options, is missing"}
        return Changes(images, causes if images else {})
    earlier, ids_from = parse_record(job.earlier), job.tables.default_id_source
    if earlier.ids_from is not None and ids_from not in (None, earlier.ids_from):
        return Changes(_count_finished(index), {"--id-from": f"id from {earlier.ids_from} -> {ids_from}"})
    earlier_rules = [rules for rules in earlier.known_rules if rules != job.rules]
    earlier_columns = dict(earlier.settings.table.columns) if earlier.settings else {}
    columns = dict(job.settings.table.columns)
    changes = Changes()
    if not earlier_rules and earlier_columns == columns:
        return changes
    for item, earlier_items in job.tables.compare_rows(job.rules, earlier_rules, make_finished_check(index)):
        replaced = _find_replaced(item, index)
        if replaced is None:
            continue
        versions = zip(earlier_items, earlier_rules, strict=True)
        rendered = [(old, rules) for old, rules in versions if old and old.fingerprint == replaced.fingerprint]
        if rendered:
            changes.causes |= _find_causes(item, *rendered[0], job.rules)
        elif earlier_columns != columns:
            changes.causes["--column"] = f"columns {_format_columns(earlier_columns)} -> {_format_columns(columns)}"
        else:
            continue
        changes.images += 1
    return changes


def _find_replaced(item: Item, index: ManifestIndex) -> ManifestEntry | None:
    """Return the finished result that rendering this row would replace."""
    committed = index.find(item.key)
    if committed is None or committed.status not in FINAL_STATUSES or committed.fingerprint == item.fingerprint:
        return None
    return committed


def _count_finished(index: ManifestIndex) -> int:
    statuses = index.count_statuses()
    return sum(statuses[status] for status in FINAL_STATUSES)


def _find_causes(item: Item, old_item: Item, old_rules: RowRules, rules: RowRules) -> dict[str, str]:
    """Return the options with changed defaults that change a value of this row or make it invalid."""
    old_defaults, defaults = asdict(old_rules.defaults), asdict(rules.defaults)

    def get_values(request: Item) -> dict[str, Any]:
        if not isinstance(request, PromptRequest):
            return defaults
        return {**asdict(request.params), "negative_prompt": request.negative_prompt, "seed": request.seed}

    old_values, values = get_values(old_item), get_values(item)
    return {
        option: f"{name} {old_defaults[name]!r} -> {defaults[name]!r}"
        for name, option in OPTIONS.items()
        if old_defaults[name] != defaults[name] and old_values.get(name) != values.get(name)
    }


def _format_columns(columns: Mapping[str, str]) -> str:
    return " ".join(f"{field}={name}" for field, name in columns.items()) or "as they are named"
