"""Which finished images a run would replace because its options differ from those of the run that made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from batch_infer.errors import SettingsError, UsageError
from batch_infer.jobs.job import Job, rules_of, settings_of
from batch_infer.manifest import Index
from batch_infer.planning import Item
from batch_infer.records import FINAL, PromptRequest
from batch_infer.settings import TableSettings
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
        """Raise SettingsError where finished images would be replaced and that was not asked for."""
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


def find_changes(job: Job, index: Index) -> Changes:
    """Scan the tables for finished images that the options of this run change. A row whose own cells changed is none.

    Scans only where the defaults or --column differ from those in run.json.
    """
    if (earlier := _earlier(job)) is None:
        return Changes()
    before, table = earlier
    if job.tables.default_ids not in (None, table.id_from):
        statuses = index.statuses()
        cause = f"id from {table.id_from} -> {job.tables.default_ids}"
        return Changes(sum(statuses[status] for status in FINAL), {"--id-from": cause})
    columns, now = dict(table.columns), dict(job.settings.table.columns)
    changes = Changes()
    if before == job.rules and columns == now:
        return changes
    for item, old in job.tables.compared_rows(job.rules, before):
        match = index.find(item.key)
        if match is None or match.status not in FINAL or match.fingerprint == item.fingerprint:
            continue
        if old is not None and match.fingerprint == old.fingerprint:
            changes.images += 1
            changes.causes |= _causes(item, old, before, job.rules)
        elif columns != now:
            changes.images += 1
            changes.causes["--column"] = f"columns {_named(columns)} -> {_named(now)}"
    return changes


def _earlier(job: Job) -> tuple[RowRules, TableSettings] | None:
    """Return how the run that this one continues read its tables, None where there is none to compare."""
    if job.earlier is None:
        return None
    try:
        out = job.settings.out
        return rules_of(job.earlier, out), settings_of(job.earlier, out).table
    except UsageError:  # another version wrote it in another form
        return None


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
