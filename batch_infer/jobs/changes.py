"""Which finished images a run would replace because its options differ from those of the run that made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from msgspec import UnsetType

from batch_infer.errors import SettingsError
from batch_infer.jobs.job import Job
from batch_infer.jobs.run_json import parse_record
from batch_infer.manifest import ManifestIndex
from batch_infer.planning import Item, make_finished_check
from batch_infer.records import FINAL_STATUSES, PromptRequest
from batch_infer.table import RowRules

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
"""The option that gives a field its default."""


@dataclass(slots=True)
class Changes:
    """How many finished images options change, and the cause by option: `num_inference_steps 8 -> 50`."""

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
    """Scan the tables for finished images that the options of this run change. A row whose own cells changed is none.

    Scans only where a default has ever differed in this OUT, where --column differs, and where run.json is missing.
    """
    if job.earlier is None:
        return _changes_of_unknown_runs(job, index)
    earlier = parse_record(job.earlier)
    if earlier.ids_from is not None and job.tables.default_id_source not in (None, earlier.ids_from):
        cause = f"id from {earlier.ids_from} -> {job.tables.default_id_source}"
        return Changes(_finished(index), {"--id-from": cause})
    known = () if isinstance(earlier.rules, UnsetType) else (earlier.rules,)
    rules = [each for each in (*known, *earlier.earlier_rules) if each != job.rules]
    before = {} if isinstance(earlier.settings, UnsetType) else dict(earlier.settings.table.columns)
    now = dict(job.settings.table.columns)
    changes = Changes()
    if not rules and before == now:
        return changes
    for item, others in job.tables.compared_rows(job.rules, rules, make_finished_check(index)):
        match = index.find(item.key)
        if match is None or match.status not in FINAL_STATUSES or match.fingerprint == item.fingerprint:
            continue
        if made := _made_by(match.fingerprint, others, rules):
            changes.images += 1
            changes.causes |= _causes(item, *made, job.rules)
        elif before != now:
            changes.images += 1
            changes.causes["--column"] = f"columns {_named(before)} -> {_named(now)}"
    return changes


def _made_by(
    fingerprint: str, others: Sequence[Item | None], rules: Sequence[RowRules]
) -> tuple[Item, RowRules] | None:
    """Return what a row was when this result was made of it, and the rules of that run."""
    pairs = zip(others, rules, strict=True)
    return next(((old, each) for old, each in pairs if old is not None and old.fingerprint == fingerprint), None)


def _changes_of_unknown_runs(job: Job, index: ManifestIndex) -> Changes:
    """Count the finished images that would be replaced in an OUT whose run.json is missing."""
    if not _finished(index):
        return Changes()
    matches = ((item, index.find(item.key)) for item in job.items(index))
    images = sum(
        match is not None and match.status in FINAL_STATUSES and match.fingerprint != item.fingerprint
        for item, match in matches
    )
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
        option: f"{name} {_shown(then[name])} -> {_shown(now[name])}"
        for name, option in OPTIONS.items()
        if then[name] != now[name] and values[0].get(name) != values[1].get(name)
    }


def _named(columns: Mapping[str, str]) -> str:
    return " ".join(f"{field}={name}" for field, name in columns.items()) or "as they are named"


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
