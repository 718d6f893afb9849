"""Which finished images a run would replace because its options differ from those of the run that made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from batch_infer.errors import SettingsError, UsageError
from batch_infer.jobs.job import Job, rules_of, settings_of
from batch_infer.manifest import Index
from batch_infer.records import FINAL, PromptRequest
from batch_infer.table import RowRules

OPTIONS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "guidance_rescale": "--guidance-rescale",
    "height": "--height",
    "width": "--width",
    "negative_prompt": "--negative-prompt",
    "seed": "--seed",
}
"""The option that gives a field its default. --images-per-prompt adds or leaves out images, and replaces none."""


@dataclass(slots=True)
class Changes:
    """Finished images whose settings change with an option: how many, and the old and new default of each field."""

    images: int = 0
    defaults: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    columns: bool = False
    """Whether --column differs: then rows whose cells seem to have changed are counted too."""

    def __str__(self) -> str:
        """Name the fields with their old and new defaults: `num_inference_steps 8 -> 50`."""
        told = [f"{name} {_shown(before)} -> {_shown(after)}" for name, (before, after) in self.defaults.items()]
        return ", ".join([*told, *["--column"] * self.columns])

    def refuse(self, job: Job) -> None:
        """Raise SettingsError where finished images would be replaced and that was not asked for."""
        if not self.images or job.settings.rerender_changed:
            return
        options = [*(OPTIONS[name] for name in self.defaults), *["--column"] * self.columns]
        raise SettingsError(
            f"{self.images:,} finished images in {job.settings.out} would be rendered again and replaced, because "
            f"{' and '.join(options)} {'differs' if len(options) == 1 else 'differ'} from the run that made them "
            f"({self}): give the same options again, or add --rerender-changed to replace these images, or "
            "--overwrite to start anew"
        )


def find_changes(job: Job, index: Index) -> Changes:
    """Scan the tables for finished images that the options of this run change. A row whose own cells changed is none.

    Scans only where the defaults or --column differ from those in run.json.
    """
    changes = Changes()
    if (earlier := _earlier(job)) is None:
        return changes
    before, columns = earlier
    columns_differ = dict(columns) != dict(job.settings.table.columns)
    if before == job.rules and not columns_differ:
        return changes
    for item, old in job.tables.compared_rows(job.rules, before):
        match = index.find(item.key)
        if match is None or match.status not in FINAL or match.fingerprint == item.fingerprint:
            continue
        if old is not None and match.fingerprint == old.fingerprint:
            changes.images += 1
            if isinstance(item, PromptRequest) and isinstance(old, PromptRequest):
                _note_defaults(changes, item, old, before, job.rules)
        elif columns_differ:
            changes.images += 1
            changes.columns = True
    return changes


def _earlier(job: Job) -> tuple[RowRules, Mapping[str, str]] | None:
    """Return the rules and the --column of the run that this one continues, None where there is none to compare."""
    if job.earlier is None:
        return None
    try:
        out = job.settings.out
        return rules_of(job.earlier, out), settings_of(job.earlier, out).table.columns
    except UsageError:  # another version wrote it in another form
        return None


def _note_defaults(
    changes: Changes, item: PromptRequest, old: PromptRequest, before: RowRules, after: RowRules
) -> None:
    """Note each field whose value in this row comes from a default that differs."""
    then, now = asdict(before.defaults), asdict(after.defaults)
    values = [{**asdict(request.params), "negative_prompt": request.negative_prompt, "seed": request.seed}
              for request in (old, item)]  # fmt: skip
    for name in OPTIONS:
        if then[name] != now[name] and values[0][name] != values[1][name]:
            changes.defaults[name] = then[name], now[name]


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
