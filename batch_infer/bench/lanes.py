"""The lanes of the contest: each contender with the rows that it is timed on, and the seconds that it took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from batch_infer.bench import clock
from batch_infer.bench.bare import BareUNet, seconds_for
from batch_infer.bench.contenders import Contender
from batch_infer.bench.figures import by_name
from batch_infer.bench.rows import Table, size_of
from batch_infer.bench.settings import Size
from batch_infer.bench.subject import Subject
from batch_infer.records import PromptRequest


class Lane(Protocol):
    """What is timed, round by round. `seconds` are of the whole table, `device_bytes` the most of the last round."""

    name: str
    seconds: list[float]
    device_bytes: int | None
    sampled: int | None
    """How many rows are timed, where it is not all of them."""

    def warm_up(self) -> None: ...
    def run(self) -> None: ...
    def more(self) -> Mapping[str, Any]:
        """What there is to tell of this one alone."""
        ...


@dataclass(frozen=True, slots=True)
class Course:
    """The rows that a lane is timed on; the images of those whose ids are in `kept` are compared.

    `factor`: how many times as much the whole table is.
    """

    rows: Sequence[PromptRequest]
    kept: frozenset[str]
    factor: float = 1.0


class RenderingLane:
    """A contender that makes images."""

    def __init__(self, name: str, contender: Contender, course: Course, subject: Subject) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.device_bytes: int | None = None
        self.sampled = None if course.factor == 1 else len(course.rows)
        self.images: dict[str, np.ndarray] = {}
        self._more: Mapping[str, Any] = {}
        self._contender, self._course = contender, course
        self._device, self._few_steps = subject.model.device, subject.few_steps

    def warm_up(self) -> None:
        """Every shape that there will be once, at few steps: what is set up at first use is no part of the rate."""
        for _ in self._contender.render(list(self._warming())):
            pass

    def _warming(self) -> Iterator[PromptRequest]:
        kinds = {(size_of(row), row.params.uses_guidance): row for row in self._course.rows}
        for kind, row in kinds.items():
            params = replace(row.params, num_inference_steps=self._few_steps)
            for number in range(self._contender.capacity(row)):
                yield replace(row, id=f"warm {kind} {number}", params=params)

    def run(self) -> None:
        clock.forget_peak(self._device)
        self.seconds.append(self._course.factor * clock.seconds_of(self._render, self._device))
        self._more = self._contender.told()  # now: a stop may come during the next round
        self.device_bytes = clock.device_peak(self._device)

    def _render(self) -> None:
        for row, pixels in self._contender.render(self._course.rows):
            if row.id in self._course.kept:
                self.images[row.id] = pixels

    def more(self) -> Mapping[str, Any]:
        return self._more


class BareLane:
    """The UNet alone, on each size of the table for a second or so."""

    name = "bare"

    def __init__(self, bare: BareUNet, table: Table, subject: Subject) -> None:
        self.seconds: list[float] = []
        self.device_bytes: int | None = None
        self.sampled: int | None = None
        self._bare, self._table, self._subject = bare, table, subject
        self._rates: dict[Size, float] = {}

    def warm_up(self) -> None:
        self._measure()

    def run(self) -> None:
        device = self._subject.model.device
        clock.forget_peak(device)
        self._rates = self._measure()
        self.seconds.append(seconds_for(self._table, self._rates))
        self.device_bytes = clock.device_peak(device)

    def _measure(self) -> dict[Size, float]:
        shape_of = self._subject.compute.shape_of
        return {size: self._bare.rate(size, shape_of(*size).slots) for size in self._table.work}

    def more(self) -> Mapping[str, Any]:
        return {"row_forwards_per_second": by_name(self._rates)}
