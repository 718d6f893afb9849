"""Scan the tables before rendering: count pending results, explain why they are pending, and commit invalid rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from batch_infer.carried import estimate_bytes
from batch_infer.errors import SettingsError
from batch_infer.jobs.job import Job
from batch_infer.jobs.run_json import parse_record
from batch_infer.jobs.summary import JsonStruct
from batch_infer.manifest import Manifest, ManifestIndex
from batch_infer.planning import Item, ManifestEntry, SkipRule, make_finished_check
from batch_infer.records import FINAL_STATUSES, PromptRequest, ResultRow
from batch_infer.sinks import make_sink
from batch_infer.table import RowRules

INVALID_BATCH = 1024
INVALID_BYTES = 64 << 20
MAX_LOGGED_INVALID = 20
"""Maximum number of invalid rows to log. The results name them all."""
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
"""Option that sets each field's default."""

log = logging.getLogger("batch_infer")


class ScanResult(JsonStruct, rename={"finished": "done", "skipped": "standing", "uncommitted": "unsettled"}):
    """Counts of the results that the tables request (one per image).

    `skipped` counts the finished results by status; `left` is the status of results that do not exist yet, which
    `retry` leaves to `run`. `uncommitted` counts invalid rows that `retry` leaves to `run`. `sizes` (height, width) and
    `reasons` describe pending results, and `changes` names the options that changed them.
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

    def add(self, item: Item, committed: ManifestEntry | None, *, skip: bool) -> None:
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
            reason = explain_pending(item, committed)
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            size = item.params.height, item.params.width
            if size not in self.sizes:
                self.sizes.append(size)

    @property
    def explanation(self) -> str:
        """Why results are pending: `1 new, 22 changed (num_inference_steps 8 -> 50)`."""
        return format_reasons(self.reasons, self.changes)


def explain_pending(item: Item, committed: ManifestEntry | None) -> str:
    """Return why an item must be rendered, given its committed result."""
    if committed is None:
        return "new"
    if committed.status == "invalid":
        return "invalid before"
    if committed.fingerprint != item.fingerprint:
        return "changed"
    return "missing or damaged" if committed.status == "ok" else f"{committed.status} before"


def format_reasons(reasons: Mapping[str, int], changes: str) -> str:
    """Format the counts by reason and the options that changed rows. Returns an empty string if all rows are new."""
    if set(reasons) <= {"new"}:
        return ""
    cause = {"changed": f" ({changes})"} if changes else {}
    return ", ".join(f"{count:,} {reason}{cause.get(reason, '')}" for reason, count in reasons.items())


def scan_tables(
    job: Job, index: ManifestIndex, skip: SkipRule, changes: str = "", *, writes: bool = True
) -> ScanResult:
    """Count pending results, and commit the invalid rows, which need no device. Raises StorageError.

    `changes` names the options that changed rows. Without `writes`, invalid rows are left to `commit_invalid`.
    """
    result = ScanResult(changes=changes)
    invalid = _InvalidRows(job)
    new_invalid = 0
    for item in job.items(index):
        committed = index.find(item.key)
        is_skipped = skip(item, committed)
        result.add(item, committed, skip=is_skipped)
        if isinstance(item, ResultRow) and not is_skipped:
            new_invalid += 1
            level = logging.WARNING if new_invalid <= MAX_LOGGED_INVALID else logging.DEBUG
            log.log(level, "%s (%s): %s", item.source, item.id, item.error)
            if writes:
                invalid.add(item, committed)
    invalid.commit()
    for remark in job.tables.notices:
        log.warning("%s", remark)
    if result.invalid > min(new_invalid, MAX_LOGGED_INVALID):
        log.warning("invalid in all: %d; results.parquet names each with its error", result.invalid)
    return result


def commit_invalid(job: Job) -> None:
    """Commit the invalid rows once --overwrite has cleared OUT. Raises StorageError."""
    invalid = _InvalidRows(job)
    with ManifestIndex(()) as index:
        for item in job.items(index):
            if isinstance(item, ResultRow):
                invalid.add(item, None)
    invalid.commit()


class _InvalidRows:
    """Commits invalid rows, then removes the images that they had while they were valid."""

    def __init__(self, job: Job) -> None:
        self._carried = job.tables.carried
        self._manifest, self._sink = Manifest(job.settings.out, job.number), make_sink(job.settings.out)
        self._rows: list[ResultRow] = []
        self._byte_count = 0
        self._obsolete: list[str] = []

    def add(self, row: ResultRow, committed: ManifestEntry | None) -> None:
        self._rows.append(replace(row, attempt=committed.attempt + 1 if committed else 1, worker="table"))
        if committed and committed.path:
            self._obsolete.append(committed.path)
        self._byte_count += estimate_bytes(row.carried.values())
        if len(self._rows) == INVALID_BATCH or self._byte_count > INVALID_BYTES:
            self.commit()

    def commit(self) -> None:
        if self._rows:
            self._manifest.commit(self._rows, self._carried)
        for path in self._obsolete:
            self._sink.remove(path)
        self._byte_count = 0
        self._rows.clear()
        self._obsolete.clear()


@dataclass(slots=True)
class Changes:
    """Number of finished images that changed options would replace, and the cause by option."""

    images: int = 0
    causes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(self.causes.values())

    def refuse(self, job: Job) -> None:
        """Raise SettingsError if finished images would be replaced without --rerender-changed."""
        if not self.images or job.settings.rerender_changed:
            return
        options = list(self.causes)
        raise SettingsError(
            f"{self.images:,} finished image{'s' * (self.images != 1)} in {job.settings.out} would be rendered again "
            "and replaced, because "
            f"{' and '.join(options)} {'differs' if len(options) == 1 else 'differ'} from the run that made them "
            f"({self}): give the same options again, or add --rerender-changed to render them again, or "
            "--overwrite to start anew"
        )


def find_changes(job: Job, index: ManifestIndex) -> Changes:
    """Count the finished images that this run's options would replace. Rows whose cells changed do not count.

    Scans the tables only if a default ever differed in this OUT, --column differs or run.json is missing.
    """
    if job.earlier is None:
        return _changes_without_record(job, index)
    earlier = parse_record(job.earlier)
    if earlier.ids_from is not None and job.tables.default_id_source not in (None, earlier.ids_from):
        return Changes(
            _count_finished(index), {"--id-from": f"id from {earlier.ids_from} -> {job.tables.default_id_source}"}
        )
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
        rendered = _find_rendered(replaced.fingerprint, earlier_items, earlier_rules)
        if rendered is not None:
            changes.images += 1
            changes.causes |= _find_causes(item, *rendered, job.rules)
        elif earlier_columns != columns:
            changes.images += 1
            changes.causes["--column"] = f"columns {_format_columns(earlier_columns)} -> {_format_columns(columns)}"
    return changes


def _find_replaced(item: Item, index: ManifestIndex) -> ManifestEntry | None:
    """Return the finished result that rendering this row would replace."""
    committed = index.find(item.key)
    is_replaced = (
        committed is not None and committed.status in FINAL_STATUSES and committed.fingerprint != item.fingerprint
    )
    return committed if is_replaced else None


def _find_rendered(
    fingerprint: str, earlier_items: Sequence[Item | None], earlier_rules: Sequence[RowRules]
) -> tuple[Item, RowRules] | None:
    """Return the version of a row that was rendered as its committed result, and the rules of that run."""
    for item, rules in zip(earlier_items, earlier_rules, strict=True):
        if item is not None and item.fingerprint == fingerprint:
            return item, rules
    return None


def _changes_without_record(job: Job, index: ManifestIndex) -> Changes:
    """Count the finished images that the run would replace if run.json is missing."""
    if not _count_finished(index):
        return Changes()
    images = sum(_find_replaced(item, index) is not None for item in job.items(index))
    return Changes(images, {"an option or a row": "run.json, which records the options, is missing"} if images else {})


def _count_finished(index: ManifestIndex) -> int:
    statuses = index.count_statuses()
    return sum(statuses[status] for status in FINAL_STATUSES)


def _find_causes(item: Item, old_item: Item, old_rules: RowRules, rules: RowRules) -> dict[str, str]:
    """Return the options whose changed defaults give this row another value or make it invalid."""
    old_defaults, defaults = asdict(old_rules.defaults), asdict(rules.defaults)

    def values_of(request: Item) -> dict[str, Any]:
        if not isinstance(request, PromptRequest):
            return defaults
        return {**asdict(request.params), "negative_prompt": request.negative_prompt, "seed": request.seed}

    old_values, values = values_of(old_item), values_of(item)
    return {
        option: f"{name} {_format_value(old_defaults[name])} -> {_format_value(defaults[name])}"
        for name, option in OPTIONS.items()
        if old_defaults[name] != defaults[name] and old_values.get(name) != values.get(name)
    }


def _format_columns(columns: Mapping[str, str]) -> str:
    return " ".join(f"{field}={name}" for field, name in columns.items()) or "as they are named"


def _format_value(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
