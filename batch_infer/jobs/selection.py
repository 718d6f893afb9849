"""Describe which rows a command renders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from batch_infer.manifest import ManifestIndex
from batch_infer.planning import SkipRule, is_finished


def _accept(_: ManifestIndex) -> None:
    pass


@dataclass(frozen=True, slots=True)
class RowSelection:
    """Which rows a command renders. The default is the selection of `run`.

    `skip` is called with every row of the tables. Then, before anything is rendered, `check` may raise UsageError.
    """

    skip: SkipRule = is_finished
    check: Callable[[ManifestIndex], None] = _accept


ALL_UNFINISHED = RowSelection()
