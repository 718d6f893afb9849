"""Describe which rows a command renders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from batch_infer.manifest import ManifestIndex
from batch_infer.planning import Item, ManifestEntry, SkipRule, is_finished

LOST = "missing or damaged"
"""Why an image is rendered again that a command does not select for its status or id."""


def _accept(_: ManifestIndex) -> None:
    pass


def _explain_by_status(_: Item, __: ManifestEntry) -> None:
    pass


@dataclass(frozen=True, slots=True)
class RowSelection:
    """Which rows a command renders. The default is the selection of `run`.

    `skip` is called with every row of the tables. Then, before anything is rendered, `check` may raise UsageError.
    `explain` returns why a row with a current result is rendered again, or None if the status of the result is the
    reason.
    """

    skip: SkipRule = is_finished
    check: Callable[[ManifestIndex], None] = _accept
    explain: Callable[[Item, ManifestEntry], str | None] = _explain_by_status


ALL_UNFINISHED = RowSelection()
