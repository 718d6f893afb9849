"""Collect the problems that `verify` finds."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from batch_infer.jobs.summary import JsonStruct
from batch_infer.jobs.verify.image_records import ImageRecords, Key

MAX_PROBLEMS = 1000
"""Maximum number of problems to list. Their counts are complete."""

Kind = Literal[
    "missing_row",
    "duplicate_row",
    "missing_image",
    "truncated_image",
    "wrong_image",
    "orphan_image",
    "damaged_part",
    "results_differ",
    "not_reproduced",
]
"""Kinds of problems, as docs/verify.md describes them."""
IMAGE_FAULTS: tuple[Kind, ...] = ("missing_image", "truncated_image", "wrong_image", "not_reproduced")
"""Problems that rendering an image again solves."""


class Problem(JsonStruct):
    """A problem that `verify` reports.

    `id` and `image_index` name a result, and `path` names a file of OUT. They are None if they do not apply.
    """

    kind: Kind
    id: str | None
    image_index: int | None
    path: str | None
    detail: str


class Problems:
    """Counts problems by kind, lists the first MAX_PROBLEMS, and records the images that must be rendered again."""

    def __init__(self, records: ImageRecords) -> None:
        self.listed: list[Problem] = []
        self.counts: Counter[Kind] = Counter()
        self._records = records

    def add(
        self,
        kind: Kind,
        detail: str,
        *,
        key: tuple[str | None, int | None] = (None, None),
        path: str | None = None,
    ) -> None:
        """Count a problem, list it if the list is not full, and record an image that must be rendered again."""
        self.counts[kind] += 1
        if len(self.listed) < MAX_PROBLEMS:
            self.listed.append(Problem(kind, *key, path, detail))
        name, index = key
        if kind in IMAGE_FAULTS and name is not None and index is not None:
            self._records.add_fault((name, index), kind, detail)

    def is_missing(self, key: Key) -> bool:
        """Return whether a row is among the problems because it has no result."""
        return self._records.is_missing(key)
