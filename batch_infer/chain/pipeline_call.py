"""Pipeline-call batching: rows with equal sampling parameters share a diffusers pipeline call where possible."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from batch_infer.accelerator import out_of_memory_errors
from batch_infer.chain.base import (
    BatchSizes,
    DeviceChain,
    ReadAhead,
    RenderedImage,
    RowOutcome,
    Size,
    UnrenderedRow,
    size_of,
)
from batch_infer.chain.pacing import make_pacer
from batch_infer.chain.postprocessing import check_images, fail_not_finite, to_pixels
from batch_infer.errors import FailedRowError, RowError, first_line
from batch_infer.records import PromptRequest
from batch_infer.safety import ImageChecker
from batch_infer.stages import Stages

if TYPE_CHECKING:
    from batch_infer.models import AnyPipeline


class PipelineCallChain(DeviceChain):
    """Renders with a pipeline that runs the denoising loop itself.

    A call that rows can share is padded to the number of rows that fit into the slots, so that the bytes of an image do
    not depend on the number of rows in its call.
    """

    uses_pipeline_call = True
    model: AnyPipeline

    def __init__(
        self,
        model: AnyPipeline,
        batch_sizes: BatchSizes,
        checker: ImageChecker | None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """The chain calls `stop` before each batch, and renders no more batches once it returns True."""
        super().__init__(model, batch_sizes, checker, stop)
        self._single_row_sizes: set[Size] = set()
        """Image sizes at which each row without guidance has its own call: the smallest batch did not fit."""

    def _render_next(self, requests: ReadAhead, first: PromptRequest, stages: Stages) -> Iterator[Sequence[RowOutcome]]:
        """Render the next requests that can share a pipeline call and fit into the slots."""
        size = size_of(first)
        is_single = size in self._single_row_sizes and first.params.slots == 1
        slots = 1 if is_single else self.batch_sizes.for_size(size)[0]
        rows = requests.take(first.batch_key, slots // first.params.slots, lambda request: request.batch_key)
        try:
            with out_of_memory_errors():
                outcomes = self._render_rows(rows, slots, stages)
            yield outcomes
            return
        except torch.OutOfMemoryError as error:
            message = first_line(error)
        # Free memory outside the except block, whose traceback would keep the call's tensors alive.
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        yield self._retry_or_fail(requests, rows, size, self._shrink(size, first.params.slots), message)

    def _shrink(self, size: Size, slots_per_row: int) -> str | None:
        """Make later batches smaller and describe the change. Returns None if no smaller batch is left to try."""
        slots = self.batch_sizes.for_size(size)[0]
        if slots_per_row == 1 and slots < 4 and size not in self._single_row_sizes:
            self._single_row_sizes.add(size)
            return "one row per call"
        smaller = self.batch_sizes.halve(size, "denoise") if slots >= 4 else None
        if smaller is None or self.model.needs_separate_calls:
            return None
        self._batch_sizes = smaller
        return f"{smaller.for_size(size)[0]} slots instead of {slots}"

    def _render_rows(self, rows: Sequence[PromptRequest], slots: int, stages: Stages) -> list[RowOutcome]:
        """Render a batch, or its rows one by one if the pipeline rejects the batch or raises an error.

        A rejected row therefore affects no other outcome. A single row is padded with copies of itself to the same
        batch size, so that its bytes stay the same.
        """
        try:
            return self._call_pipeline(rows, slots, stages)
        except RowError as error:
            if len(rows) == 1:
                return [
                    UnrenderedRow(rows[0], "failed" if isinstance(error, FailedRowError) else "invalid", str(error))
                ]
        return [outcome for row in rows for outcome in self._render_rows([row], slots, stages)]

    def _call_pipeline(self, rows: Sequence[PromptRequest], slots: int, stages: Stages) -> list[RowOutcome]:
        params = rows[0].params
        started = time.perf_counter()
        with self._timed(stages):
            images, are_finite = to_pixels(self.model.render(rows, slots // params.slots))
        seconds = time.perf_counter() - started
        stages.images += len(rows)
        stages.ticks += params.num_inference_steps
        stages.row_forwards += params.num_inference_steps * params.slots * len(rows)
        stages.slot_ticks += params.num_inference_steps * slots
        verdicts = check_images(self._checker, images, self.batch_sizes.decode, stages)
        return [
            RenderedImage(row, image, verdict, self.model.count_tokens(row), slots, seconds)
            if is_finite
            else fail_not_finite(row, self.model.dtype)
            for row, image, is_finite, verdict in zip(rows, images, are_finite, verdicts, strict=True)
        ]

    @contextmanager
    def _timed(self, stages: Stages) -> Iterator[None]:
        """Add the duration of a batch to the stages.

        Time before the first denoiser call counts as encoding, time in denoiser calls as denoising, and the rest as
        decoding. If the denoiser is unknown, all time counts as decoding.
        """
        pacer, denoise_before = make_pacer(self.model.device, stages), stages.denoise
        started = time.perf_counter()
        calls_started: list[float] = []

        def start(*_: Any) -> None:
            calls_started.append(time.perf_counter())
            pacer.start()

        with ExitStack() as hooks:
            if self.model.denoiser is not None:
                hooks.enter_context(self.model.denoiser.register_forward_pre_hook(start))
                hooks.enter_context(self.model.denoiser.register_forward_hook(lambda *_: pacer.end()))
            yield
            pacer.finish()
        ended = time.perf_counter()
        encoding = calls_started[0] - started if calls_started else 0.0
        stages.encode += encoding
        stages.decode += max(0.0, ended - started - encoding - (stages.denoise - denoise_before))
