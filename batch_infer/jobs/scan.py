"""The scan of the tables before anything is rendered: what there is to do and why, and the rows that are invalid."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from batch_infer.carried import estimate_bytes
from batch_infer.errors import SettingsError
from batch_infer.jobs.job import Job
from batch_infer.jobs.run_json import parse_record
from batch_infer.manifest import Manifest, ManifestIndex
from batch_infer.planning import Item, ManifestEntry, SkipRule, make_finished_check
from batch_infer.records import FINAL_STATUSES, PromptRequest, ResultRow
from batch_infer.sinks import make_sink
from batch_infer.table import RowRules

INVALID_BATCH = 1024
INVALID_BYTES = 64 << 20
INVALID_SHOWN = 20
"""Invalid rows that are logged; the results name them all."""
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
"""The option that sets a field's default."""

log = logging.getLogger("batch_infer")


@dataclass(slots=True)
class ScanResult:
    """Counts of the results that the tables ask for (a row has one per image).

    `done` results are skipped; `skipped` counts them by status, where `left` are those without a result that `retry`
    leaves to `run`, as it does `unsettled` invalid rows. `sizes` (height, width) and `reasons` are of the pending ones,
    and `changes` names the options that changed them.
    """

    total: int = 0
    done: int = 0
    invalid: int = 0
    pending: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    changes: str = ""
    unsettled: int = 0

    def add(self, item: Item, committed: ManifestEntry | None, *, skip: bool) -> None:
        self.total += 1
        current = committed if committed is not None and committed.fingerprint == item.fingerprint else None
        if isinstance(item, ResultRow):
            self.invalid += 1
            self.unsettled += skip and current is None
        elif skip:
            self.done += 1
            status = current.status if current else "left"
            self.skipped[status] = self.skipped.get(status, 0) + 1
        else:
            self.pending += 1
            reason = reason_of(item, committed)
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            size = item.params.height, item.params.width
            if size not in self.sizes:
                self.sizes.append(size)

    @property
    def explanation(self) -> str:
        """Why results are pending: `1 new, 22 changed (num_inference_steps 8 -> 50)`."""
        return format_reasons(self.reasons, self.changes)

    def as_dict(self) -> dict[str, Any]:
        """Return the keys of `survey` in run.json."""
        return {"standing" if name == "skipped" else name: value for name, value in asdict(self).items()}


def reason_of(item: Item, committed: ManifestEntry | None) -> str:
    """Return why an item is to be rendered, given its committed result."""
    if committed is None:
        return "new"
    if committed.status == "invalid":
        return "invalid before"
    if committed.fingerprint != item.fingerprint:
        return "changed"
    return "missing or damaged" if committed.status == "ok" else f"{committed.status} before"


def format_reasons(reasons: Mapping[str, int], changes: str) -> str:
    """Format the counts of `reason_of`, with the options that changed rows; empty where all rows are new."""
    if set(reasons) <= {"new"}:
        return ""
    cause = {"changed": f" ({changes})"} if changes else {}
    return ", ".join(f"{count:,} {reason}{cause.get(reason, '')}" for reason, count in reasons.items())


def scan_tables(
    job: Job, index: ManifestIndex, skip: SkipRule, changes: str = "", *, writes: bool = True
) -> ScanResult:
    """Count what is to be done, and commit the invalid rows, which need no device. Raises StorageError.

    `changes` names the options that changed rows. Without `writes`, invalid rows are left to `commit_invalid`.
    """
    result = ScanResult(changes=changes)
    invalid = _InvalidRows(job)
    count = 0
    for item in job.items(index):
        committed = index.find(item.key)
        is_skipped = skip(item, committed)
        result.add(item, committed, skip=is_skipped)
        if isinstance(item, ResultRow) and not is_skipped:
            count += 1
            level = logging.WARNING if count <= INVALID_SHOWN else logging.DEBUG
            log.log(level, "%s (%s): %s", item.source, item.id, item.error)
            if writes:
                invalid.add(item, committed)
    invalid.commit()
    for remark in job.tables.remarks:
        log.warning("%s", remark)
    if result.invalid > min(count, INVALID_SHOWN):
        log.warning("invalid in all: %d; results.parquet names each with its error", result.invalid)
    return result


def commit_invalid(job: Job) -> None:
    """Commit the invalid rows of an OUT that held no results when its tables were scanned. Raises StorageError."""
    invalid = _InvalidRows(job)
    with ManifestIndex(()) as index:
        for item in job.items(index):
            if isinstance(item, ResultRow):
                invalid.add(item, None)
    invalid.commit()


class _InvalidRows:
    """Invalid rows to commit, and the images that they had while they were valid, which are then removed."""

    def __init__(self, job: Job) -> None:
        self._carried = job.tables.carried
        self._manifest, self._sink = Manifest(job.settings.out, job.number), make_sink(job.settings.out)
        self._rows: list[ResultRow] = []
        self._size = 0
        self._obsolete: list[str] = []

    def add(self, row: ResultRow, committed: ManifestEntry | None) -> None:
        self._rows.append(replace(row, attempt=committed.attempt + 1 if committed else 1, worker="table"))
        if committed and committed.path:
            self._obsolete.append(committed.path)
        self._size += estimate_bytes(row.carried.values())
        if len(self._rows) == INVALID_BATCH or self._size > INVALID_BYTES:
            self.commit()

    def commit(self) -> None:
        if self._rows:
            self._manifest.commit(self._rows, self._carried)
        for path in self._obsolete:
            self._sink.remove(path)
        self._size = 0
        self._rows.clear()
        self._obsolete.clear()


@dataclass(slots=True)
class Changes:
    """How many finished images changed options would replace, and the cause by option."""

    images: int = 0
    causes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(self.causes.values())

    def refuse(self, job: Job) -> None:
        """Raise SettingsError where finished images would be replaced without --rerender-changed."""
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
    """Return which finished images the options of this run would replace. Rows whose own cells changed do not count.

    The tables are scanned only where a default has ever differed in this OUT, --column differs or run.json is missing.
    """
    if job.earlier is None:
        return _changes_without_record(job, index)
    earlier = parse_record(job.earlier)
    if earlier.ids_from is not None and job.tables.default_id_source not in (None, earlier.ids_from):
        return Changes(_finished(index), {"--id-from": f"id from {earlier.ids_from} -> {job.tables.default_id_source}"})
    rules = [each for each in earlier.known_rules if each != job.rules]
    before = dict(earlier.settings.table.columns) if earlier.settings else {}
    now = dict(job.settings.table.columns)
    changes = Changes()
    if not rules and before == now:
        return changes
    for item, others in job.tables.compared_rows(job.rules, rules, make_finished_check(index)):
        replaced = _find_replaced(item, index)
        if replaced is None:
            continue
        if rendered := _find_rendered(replaced.fingerprint, others, rules):
            changes.images += 1
            changes.causes |= _causes(item, *rendered, job.rules)
        elif before != now:
            changes.images += 1
            changes.causes["--column"] = f"columns {_format_columns(before)} -> {_format_columns(now)}"
    return changes


def _find_replaced(item: Item, index: ManifestIndex) -> ManifestEntry | None:
    """Return the finished result that rendering this row would replace."""
    committed = index.find(item.key)
    is_replaced = (
        committed is not None and committed.status in FINAL_STATUSES and committed.fingerprint != item.fingerprint
    )
    return committed if is_replaced else None


def _find_rendered(
    fingerprint: str, others: Sequence[Item | None], rules: Sequence[RowRules]
) -> tuple[Item, RowRules] | None:
    """Return the row as it was when its committed result was made, and the rules of that run."""
    pairs = zip(others, rules, strict=True)
    return next(((old, each) for old, each in pairs if old is not None and old.fingerprint == fingerprint), None)


def _changes_without_record(job: Job, index: ManifestIndex) -> Changes:
    """Count the finished images that would be replaced in an OUT whose run.json is missing."""
    if not _finished(index):
        return Changes()
    images = sum(_find_replaced(item, index) is not None for item in job.items(index))
    return Changes(images, {"an option or a row": "run.json, which records the options, is missing"} if images else {})


def _finished(index: ManifestIndex) -> int:
    statuses = index.count_statuses()
    return sum(statuses[status] for status in FINAL_STATUSES)


def _causes(item: Item, old: Item, before: RowRules, after: RowRules) -> dict[str, str]:
    """Return the options whose defaults differ and give this row another value, or make it invalid."""
    then, now = asdict(before.defaults), asdict(after.defaults)
    values: list[Mapping[str, Any]] = [
        {**asdict(request.params), "negative_prompt": request.negative_prompt, "seed": request.seed}
        if isinstance(request, PromptRequest)
        else now
        for request in (old, item)
    ]
    return {
        option: f"{name} {_format_value(then[name])} -> {_format_value(now[name])}"
        for name, option in OPTIONS.items()
        if then[name] != now[name] and values[0].get(name) != values[1].get(name)
    }


def _format_columns(columns: Mapping[str, str]) -> str:
    return " ".join(f"{field}={name}" for field, name in columns.items()) or "as they are named"


def _format_value(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
