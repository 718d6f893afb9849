"""Run a pipeline's own call for many rows at once, and stack the calls of its networks.

Each row runs in a greenlet. When it calls a network, the greenlet stores the arguments and pauses. Calls with equal
signatures are stacked to one call with a fixed number of batch elements, and each row continues with its part of the
result. Because the shape of a stack never changes within a run, the bytes of a row do not depend on its neighbours.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Generic

import torch
from greenlet import getcurrent, greenlet

from batch_infer.accelerator import is_device_error
from batch_infer.admission import WaitingRows
from batch_infer.stacking.evaluator import CallEvaluator, count_elements
from batch_infer.stacking.networks import Kind, Network, copy_pipeline
from batch_infer.stacking.rows import Call, EndedRow, Row, Tag, autocast, get_autocast
from batch_infer.stacking.signature import Signatures
from batch_infer.stacking.trees import UnstackableError, clone_tensors

ENCODE_BATCH = 4
"""Batch elements of a text encoder call. A row with guidance often needs two."""
MAX_WAITING_TICKS = 16
"""Ticks for which the call of an admitted row may wait while larger groups of calls are made."""
ROW_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    ImportError,
)
"""Errors of a pipeline that fail only its row, unless the device causes them."""


class CallStacker(Generic[Tag]):
    """Holds the rows in progress, for images of one size.

    While it is open, the networks' methods are replaced. All methods must be called in the same thread.
    """

    def __init__(self, pipeline: Any, evaluator: CallEvaluator) -> None:
        self._pipeline, self.evaluator = pipeline, evaluator
        self._plan, self._sizes, self._cache = evaluator.plan, evaluator.sizes, evaluator.cache
        self._main = getcurrent()
        self._signatures = Signatures()
        self._rows: dict[greenlet, Row[Tag]] = {}
        self._ended: list[EndedRow[Tag]] = []
        self._ticks = 0
        self.slots = self._sizes["denoise"]
        self.waiting: WaitingRows[Row[Tag]] = WaitingRows(self.slots, lambda row: row.elements)
        self._replacements = ExitStack()
        for network in self._plan.networks:
            self._replacements.enter_context(network.replaced(partial(self._pause, network)))

    @property
    def free_slots(self) -> int:
        used = sum(row.elements for row in self._rows.values() if row.admitted is not None)
        return self.slots - used

    @property
    def is_denoising(self) -> bool:
        """Whether an admitted row waits for a denoiser."""
        return any(row.is_denoising for row in self._rows.values())

    @property
    def has_rows(self) -> bool:
        return bool(self._rows)

    def take_ended(self) -> list[EndedRow[Tag]]:
        """Return rows that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    @torch.no_grad()
    def start(self, rows: Sequence[tuple[Tag, Mapping[str, Any]]]) -> None:
        """Start rows, with the arguments of their calls, and run them up to their first denoiser call."""
        for tag, arguments in rows:
            self._start(tag, arguments)
        self._settle()

    @torch.no_grad()
    def admit(self) -> None:
        """Admit waiting rows, as far as slots are free."""
        for row in self.waiting.admit(self.free_slots):
            row.admitted, row.paused_at = time.perf_counter(), self._ticks

    @torch.no_grad()
    def tick(self) -> None:
        """Make one denoiser call for the largest group of admitted rows that can share one.

        If new rows keep joining that group, other groups get their turn after MAX_WAITING_TICKS.
        """
        calls = self._next_tick()
        self._ticks += 1
        self._make(calls)
        self._settle()

    @torch.no_grad()
    def next_call(self) -> Callable[[], object]:
        """Return a function that makes the denoiser call of the next tick without advancing the rows."""
        return self.evaluator.prepare(self._next_tick())

    @torch.no_grad()
    def finish_decoding(self) -> None:
        """Decode rows that wait for others to fill a decoder call."""
        while calls := self._next_group("decode", 1):
            self._make(calls)
            self._settle()

    @torch.no_grad()
    def close(self) -> None:
        """End all rows, restore the networks' methods, and drop all tensors."""
        rows = list(self._rows.values())
        try:
            for row in rows:
                row.greenlet.throw()  # GreenletExit, which leaves the pipeline's with-blocks
        finally:
            for row in rows:
                row.call = None  # a call and its row refer to each other, so they would wait for garbage collection
                row.last_tensors.clear()
            self._rows.clear()
            self.waiting.clear()
            self._replacements.close()
            self.evaluator.release()

    # In the greenlet of the caller

    def _start(self, tag: Tag, arguments: Mapping[str, Any]) -> None:
        pipeline = self._copy_pipeline()

        def run() -> None:
            try:
                row.result = pipeline(**arguments)
            except ROW_ERRORS as error:
                if is_device_error(error):
                    raise
                row.error = error

        row: Row[Tag] = Row(tag, greenlet(run))
        row.greenlet.gr_context = contextvars.copy_context()
        self._rows[row.greenlet] = row
        self.waiting.add(row)
        self._resume(row)

    def _copy_pipeline(self) -> Any:
        return copy_pipeline(self._pipeline, self._plan.device, host_timesteps=self._plan.host_timesteps)

    def _resume(self, row: Row[Tag], *result: Any) -> None:
        """Continue a row up to its next call."""
        state = row.call.autocast if row.call is not None else None
        row.call = None
        with autocast(state):
            row.greenlet.switch(*result)
        self._update(row)

    def _fail(self, row: Row[Tag], error: Exception) -> None:
        """Raise an error in a row, at its call."""
        state = row.call.autocast if row.call is not None else None
        row.call = None
        with autocast(state):
            row.greenlet.throw(error)
        self._update(row)

    def _update(self, row: Row[Tag]) -> None:
        """Record what a paused row is waiting for."""
        if row.call is not None:
            row.elements = row.call.elements if row.call.network.kind == "denoise" else 0
            row.paused_at = self._ticks
            return
        del self._rows[row.greenlet]
        if row.admitted is None:
            self.waiting.discard(row)
        if row.error is not None:
            row.error.__traceback__ = None  # it would keep the tensors of the call alive
        seconds = time.perf_counter() - row.admitted if row.admitted is not None else 0.0
        self._ended.append(EndedRow(row.tag, row.result, row.error, seconds))

    def _settle(self) -> None:
        """Make the calls of text encoders, and full calls of decoders, until rows only wait for denoisers."""
        while calls := self._next_group("encode", 1) or self._next_group("decode", self._sizes["decode"]):
            self._make(calls)

    def _next_tick(self) -> list[Call[Tag]]:
        groups: dict[Hashable, list[Call[Tag]]] = {}
        for row in self._rows.values():
            if row.is_denoising and row.call is not None:
                groups.setdefault(row.call.group, []).append(row.call)
        oldest = min(groups.values(), key=_paused_at)
        is_overdue = self._ticks - _paused_at(oldest) >= MAX_WAITING_TICKS
        return self._fit(oldest if is_overdue else max(groups.values(), key=count_elements))

    def _next_group(self, kind: Kind, min_elements: int) -> list[Call[Tag]]:
        """Return calls that can share a stack, if they have at least `min_elements` or cannot be stacked."""
        groups: dict[Hashable, list[Call[Tag]]] = {}
        for row in self._rows.values():
            if row.call is not None and row.call.network.kind == kind:
                groups.setdefault(row.call.group, []).append(row.call)
        for group in groups.values():
            calls = self._fit(group)
            if calls[0].signature is None or count_elements(calls) >= min_elements or len(calls) < len(group):
                return calls
        return []

    def _fit(self, calls: Sequence[Call[Tag]]) -> list[Call[Tag]]:
        """Return the calls that fit into a stack, at least one. Calls with equal texts need room only once."""
        room = self._sizes[calls[0].network.kind]
        fitting: list[Call[Tag]] = []
        contents: set[Hashable] = set()
        for call in calls if calls[0].signature is not None else calls[:1]:
            if call.content is not None and call.content in contents:
                fitting.append(call)
            elif call.elements <= room or not fitting:
                fitting.append(call)
                room -= call.elements
                contents.add(call.content)
        return fitting

    def _make(self, calls: list[Call[Tag]]) -> None:
        """Make the calls as one, and continue their rows. An error fails the row whose call raises it."""
        try:
            results = self.evaluator.evaluate(calls)
        except ROW_ERRORS as error:
            if is_device_error(error):
                raise
            if len(calls) == 1:
                self._fail(calls[0].row, error)
            else:
                for call in calls:
                    self._make([call])
            return
        for call, result in zip(calls, results, strict=True):
            self._resume(call.row, result)

    # In the greenlet of a row

    def _pause(self, network: Network, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Store a call to be made with others, and return its result."""
        row = self._rows.get(getcurrent())
        if row is None:
            return original(**arguments)
        call = self._describe(row, network, arguments)
        if network.kind == "encode":
            if call.signature is None:
                return original(**arguments)
            if (cached := self._cache.get(call.content)) is not None:
                return clone_tensors(cached)
        row.call = call
        return self._main.switch()

    def _describe(self, row: Row[Tag], network: Network, arguments: dict[str, Any]) -> Call[Tag]:
        state, axes = get_autocast(network.device), self._plan.axes.get(network.name)
        padding = self._plan.paddings.get(network.name)
        if padding is not None:
            arguments = padding.pad(arguments)
        try:
            if axes is None:
                raise UnstackableError
            elements = axes.count_elements(arguments)
            if elements > self._sizes[network.kind]:
                raise UnstackableError
            free_lengths = network.name in self._plan.stand_ins
            last_tensors = row.last_tensors.setdefault(network.name, {})
            signature = self._signatures.of(arguments, axes, free_lengths=free_lengths, last_tensors=last_tensors)
            is_text = network.kind == "encode"
            content = (network.name, state, self._signatures.content(arguments)) if is_text else None
        except UnstackableError:
            return Call(row, network, arguments, None, self._plan.count_elements(network, arguments), state)
        return Call(row, network, arguments, signature, elements, state, content)


def _paused_at(calls: Sequence[Call[Any]]) -> int:
    """Return the tick since which the first of these calls waits."""
    return min(call.row.paused_at for call in calls)
