"""The driven chain: rows that are alike, made together by one call of a diffusers pipeline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from batch_infer.accelerator import out_of_memory_errors
from batch_infer.chain.outcomes import Elsewhere, Rendered, Size, Unrendered, not_finite, nothing
from batch_infer.chain.pacing import pace_of
from batch_infer.chain.postprocessing import to_pixels
from batch_infer.chain.read_ahead import Ahead
from batch_infer.chain.shape import BatchSizes
from batch_infer.errors import RowBroken, RowError, first_line
from batch_infer.records import PromptRequest, Verdict
from batch_infer.safety import ImageChecker
from batch_infer.stages import Stages

if TYPE_CHECKING:
    from batch_infer.models import AnyPipeline

log = logging.getLogger("batch_infer")


class PipelineCallChain:
    """One device's way from requests to judged images where a pipeline has the loop; asked as `Chain` is.

    A batch is one fixed number of rows, padded, so that a row's bytes do not depend on how many it was made with: the
    slots, of which a row with guidance takes two.
    """

    uses_pipeline_call = True

    def __init__(
        self,
        model: AnyPipeline,
        shape: BatchSizes,
        checker: ImageChecker | None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """`stop` is asked between batches; once it says so, `render` ends."""
        self.model, self._checker, self._stop = model, checker, stop
        self.batch_sizes = shape
        """The batch sizes as they are now: smaller than at first where the device ran out of memory."""
        self.stages_by_size: dict[Size, Stages] = {}
        self._singly: set[Size] = set()

    @property
    def stages(self) -> Stages:
        """Those of all sizes together."""
        return sum(self.stages_by_size.values(), Stages())

    def render(
        self, requests: Iterable[PromptRequest], elsewhere: Elsewhere = nothing
    ) -> Iterator[Rendered | Unrendered]:
        """Render requests batch by batch. Rows that are alike should stand together: others end a batch.

        After each batch the outcomes that `elsewhere` gives are given too, as they are.
        """
        source = Ahead(iter(requests))
        started = time.perf_counter()
        while (first := source.peek()) is not None and not self._stop():
            size = first.params.height, first.params.width
            stages = self.stages_by_size.setdefault(size, Stages())
            yield from self._render_batch(source, size, stages)
            yield from elsewhere()
            stages.seconds += time.perf_counter() - started
            started = time.perf_counter()

    def _render_batch(self, source: Ahead, size: Size, stages: Stages) -> Iterator[Rendered | Unrendered]:
        first = source.peek()
        slots = 1 if size in self._singly and first and first.params.slots == 1 else self.batch_sizes.of(size)[0]
        rows = _take_alike(source, size, slots)
        try:
            with out_of_memory_errors():
                outcomes = self._make(rows, slots, stages)
            yield from outcomes
            return
        except torch.OutOfMemoryError as error:
            told = first_line(error)
        # Outside of the except block, whose traceback would keep the tensors of the call alive.
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        yield from self._shrink(source, size, rows, told)

    def _shrink(
        self, source: Ahead, size: Size, rows: Sequence[PromptRequest], told: str
    ) -> Iterator[Rendered | Unrendered]:
        """Go on with half the slots; where a call made one image already, the rows have failed."""
        name, slots = f"{size[1]}x{size[0]}", self.batch_sizes.of(size)[0]
        if rows[0].params.slots == 1 and 1 < slots < 4 and size not in self._singly:
            log.warning("out of memory at %s pixels: going on with one row a call", name)
            self._singly.add(size)
            source.put_back(rows)
            return
        smaller = self.batch_sizes.shrunk(size, "denoise") if slots >= 4 else None
        if smaller is None or self.model.one_row_per_call or slots // rows[0].params.slots < 2:
            error = f"the device's memory does not hold one image of {name} pixels ({told})"
            yield from (Unrendered(request, "failed", error) for request in rows)
            return
        log.warning("out of memory at %s pixels: going on with %d slots, not %d", name, smaller.of(size)[0], slots)
        self.batch_sizes = smaller
        source.put_back(rows)

    def _make(self, rows: Sequence[PromptRequest], slots: int, stages: Stages) -> list[Rendered | Unrendered]:
        """All rows of a batch together or, where the pipeline refuses that, each by itself.

        It is then made in a batch of its own copies, whose shape is the same, so that a refused row costs the others
        nothing and their bytes stay.
        """
        try:
            return self._made(rows, slots, stages)
        except RowError as error:
            if len(rows) == 1:
                return [Unrendered(rows[0], "failed" if isinstance(error, RowBroken) else "invalid", str(error))]
        return [outcome for row in rows for outcome in self._make([row], slots, stages)]

    def _made(self, rows: Sequence[PromptRequest], slots: int, stages: Stages) -> list[Rendered | Unrendered]:
        params = rows[0].params
        started = time.perf_counter()
        with self._timed(stages):
            pixels, whole = to_pixels(self.model.render(rows, slots // params.slots))
        seconds = time.perf_counter() - started
        stages.images += len(rows)
        stages.ticks += params.num_inference_steps
        stages.row_forwards += params.num_inference_steps * params.slots * len(rows)
        stages.slot_ticks += params.num_inference_steps * slots
        verdicts = self._check(pixels, stages)
        return [
            Rendered(row, image, verdict, self.model.count_tokens(row), slots, seconds)
            if finite
            else Unrendered(row, "failed", not_finite(params, self.model.dtype))
            for row, image, finite, verdict in zip(rows, pixels, whole, verdicts, strict=True)
        ]

    @contextmanager
    def _timed(self, stages: Stages) -> Iterator[None]:
        """Tell apart what goes by before the denoiser is first asked, in it, and beside and after it."""
        pace, before = pace_of(self.model.device, stages), stages.denoise
        started = time.perf_counter()
        first: list[float] = []

        def begin(*_: Any) -> None:
            first.append(time.perf_counter()) if not first else None
            pace.start()

        denoiser = self.model.denoiser
        hooks = [] if denoiser is None else [
            denoiser.register_forward_pre_hook(begin), denoiser.register_forward_hook(lambda *_: pace.end())
        ]  # fmt: skip
        try:
            yield
            pace.finish()
        finally:
            for hook in hooks:
                hook.remove()
        ended = time.perf_counter()
        encoding = first[0] - started if first else 0.0
        stages.encode += encoding
        stages.decode += max(0.0, ended - started - encoding - (stages.denoise - before))

    def _check(self, pixels: list[np.ndarray], stages: Stages) -> list[Verdict]:
        if self._checker is None:
            return [Verdict()] * len(pixels)
        started = time.perf_counter()
        pieces = [
            pixels[first : first + self.batch_sizes.decode] for first in range(0, len(pixels), self.batch_sizes.decode)
        ]
        verdicts = [verdict for piece in pieces for verdict in self._checker.check(piece)]
        stages.check += time.perf_counter() - started
        return verdicts


def _take_alike(source: Ahead, size: Size, slots: int) -> list[PromptRequest]:
    """As many of the next rows as are alike and fill the slots."""
    rows = source.take(size, 1)
    while len(rows) < slots // rows[0].params.slots:
        ahead = source.peek()
        if ahead is None or ahead.batch_key != rows[0].batch_key:
            break
        rows += source.take(size, 1)
    return rows
