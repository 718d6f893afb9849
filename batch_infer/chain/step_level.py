"""Step-level batching: rows of one size share denoiser calls at any step and guidance, and leave when they finish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import torch

from batch_infer.accelerator import out_of_memory_errors
from batch_infer.chain.base import BatchSizes, DeviceChain, ReadAhead, RowOutcome, Size, Stage, UnrenderedRow, size_of
from batch_infer.chain.batcher import Advanced, Batcher, Tag
from batch_infer.chain.packed import PackedBatcher
from batch_infer.chain.postprocessing import Postprocessing
from batch_infer.diffusion import FinishedRow
from batch_infer.errors import first_line
from batch_infer.models import is_compiled
from batch_infer.records import PromptRequest
from batch_infer.safety import ImageChecker
from batch_infer.stages import Stages

if TYPE_CHECKING:
    from batch_infer.models import AnyPipeline, LatentDiffusion


class StepLevelChain(DeviceChain):
    """Renders rows that advance step by step, and admits rows as slots become free."""

    def __init__(
        self,
        model: LatentDiffusion | AnyPipeline,
        batch_sizes: BatchSizes,
        checker: ImageChecker | None,
        stop: Callable[[], bool] = lambda: False,
        *,
        in_background: bool | None = None,
    ) -> None:
        """The chain calls `stop` before each step. Once it returns True, rows that are not yet denoised are dropped.

        `in_background`: whether to decode and check on another thread. By default, True on a GPU and False on a CPU.
        """
        super().__init__(model, batch_sizes, checker, stop)
        self._in_background = model.device.type == "cuda" if in_background is None else in_background
        self._compiled: set[tuple[Size, tuple[int, int]]] = set()
        """Image sizes and batch sizes for which the networks have been compiled."""

    def _render_next(self, requests: ReadAhead, first: PromptRequest, stages: Stages) -> Iterator[Sequence[RowOutcome]]:
        """Render the next requests with the image size and the LoRA of the first."""
        size = size_of(first)
        batch_sizes = self.batch_sizes.for_size(size)
        must_compile = is_compiled(self.model.networks) and (size, batch_sizes) not in self._compiled
        postprocessing = Postprocessing(
            self.model, self._checker, batch_sizes, stages, in_background=self._in_background
        )
        make_batcher = partial(self._make_batcher, batch_sizes, size, stages)
        size_pass = _SizePass(make_batcher, postprocessing, stages, must_compile=must_compile)
        try:
            with out_of_memory_errors():
                yield from size_pass.run(requests, first, self._stop)
            return
        except torch.OutOfMemoryError as error:
            message = first_line(error)
        finally:
            unfinished, stage = list(size_pass.unfinished.values()), size_pass.stage
            if must_compile and not size_pass.must_compile:
                self._compiled.add((size, batch_sizes))
            size_pass.close()
        # Free memory outside the except block, whose traceback would keep the tensors alive.
        del size_pass, postprocessing
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if not unfinished:  # memory ran out before any row was taken
            unfinished = requests.take(first.group_key, 1)
        yield self._retry_or_fail(requests, unfinished, size, self._shrink(size, stage), message)

    def _make_batcher(self, batch_sizes: tuple[int, int], size: Size, stages: Stages) -> Batcher:
        if self.model.uses_pipeline_call:
            from batch_infer.chain.stacked import StackedBatcher

            return StackedBatcher(cast("AnyPipeline", self.model), batch_sizes, stages)
        return PackedBatcher(cast("LatentDiffusion", self.model), batch_sizes, size, stages)

    def _shrink(self, size: Size, stage: Stage) -> str | None:
        """Halve a batch size and describe the change. Returns None if both batch sizes are at their minimum."""
        old_slots, old_decode = self.batch_sizes.for_size(size)
        smaller = self.batch_sizes.halve(size, stage, self.model.min_slots)
        if smaller is None:
            return None
        self._batch_sizes = smaller
        slots, decode = smaller.for_size(size)
        if slots < old_slots:
            return f"{slots} slots instead of {old_slots}"
        return f"{decode} images per decoder call instead of {old_decode}"


class _SizePass:
    """Renders rows of one image size and LoRA with fixed batch sizes, and holds their state on the device."""

    def __init__(
        self,
        make_batcher: Callable[[], Batcher],
        postprocessing: Postprocessing,
        stages: Stages,
        *,
        must_compile: bool,
    ) -> None:
        """`must_compile`: compile the networks for this size before the first denoising step."""
        self._make_batcher, self._postprocessing, self._stages = make_batcher, postprocessing, stages
        self._batcher: Batcher | None = None
        self.unfinished: dict[tuple[str, int], PromptRequest] = {}
        self._is_postprocessing = False
        self.must_compile = must_compile

    @property
    def stage(self) -> Stage:
        """The stage whose batch size shrinks first if memory runs out now."""
        if self._is_postprocessing:
            return "decode"
        return "denoise" if self._batcher is None else self._batcher.stage

    def close(self) -> None:
        """Drop all rows."""
        if self._batcher is not None:
            self._batcher.close()
        self._postprocessing.close()

    def run(
        self, requests: ReadAhead, first: PromptRequest, stop: Callable[[], bool]
    ) -> Iterator[Sequence[RowOutcome]]:
        """Render until all rows are finished and no further request of the group of the first is available.

        After a stop, yield rows that are fully denoised, and drop the others.
        """
        batcher, group = self._make_batcher(), first.group_key
        self._batcher = batcher
        while not stop():
            self._prepare(batcher, requests, group)
            yield self._drop(batcher.admit())
            if batcher.is_denoising:
                if self.must_compile:
                    self._compile(batcher)
                yield from self._postprocess(batcher.tick())
            elif not batcher.is_waiting and not requests.has(group):
                yield from self._postprocess(batcher.finish())
                if not batcher.is_denoising:  # a pipeline may denoise again after its decoder
                    break
        yield from self._postprocess(batcher.finish())
        yield from self._collect(self._postprocessing.finish())

    def _prepare(self, batcher: Batcher, requests: ReadAhead, group: object) -> None:
        """Encode the prompts of the rows to admit next."""
        if batcher.room and (batch := requests.take(group, batcher.room)):
            self.unfinished.update((request.key, request) for request in batch)
            batcher.prepare(batch)

    def _compile(self, batcher: Batcher) -> None:
        """Compile the networks for these shapes.

        The time counts as `Stages.compilation`, but not in the seconds of any stage or in the total.
        """
        started = time.perf_counter()
        batcher.compile()
        self._stages.compilation += time.perf_counter() - started
        self.must_compile = False

    def _postprocess(self, advanced: Advanced) -> Iterator[Sequence[RowOutcome]]:
        """Postprocess denoised rows, and yield the outcomes of failed rows and of finished micro-batches."""
        finished: list[FinishedRow[Tag]] = []
        failed: list[UnrenderedRow] = []
        for row in advanced:
            if isinstance(row, UnrenderedRow):
                failed.append(row)
            else:
                finished.append(row)
        yield self._drop(failed)
        yield from self._collect(self._postprocessing.add(finished))

    def _collect(self, batches: Iterator[list[RowOutcome]]) -> Iterator[Sequence[RowOutcome]]:
        self._is_postprocessing = True
        for outcomes in batches:
            yield self._drop(outcomes)
        self._is_postprocessing = False

    def _drop(self, outcomes: Sequence[RowOutcome]) -> Sequence[RowOutcome]:
        """Remove finished rows from `unfinished`, and return their outcomes."""
        for outcome in outcomes:
            self.unfinished.pop(outcome.request.key, None)
        return outcomes
