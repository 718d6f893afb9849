"""Step-level batching: rows of one size share UNet calls at any step count and guidance, and leave when they finish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from batch_infer.accelerator import out_of_memory_errors
from batch_infer.chain.base import BatchSizes, DeviceChain, ReadAhead, RowOutcome, Size, Stage, UnrenderedRow, size_of
from batch_infer.chain.pacing import encode_concurrently, make_pacer
from batch_infer.chain.postprocessing import Postprocessing, Tag
from batch_infer.diffusion import FinishedRow, Slots
from batch_infer.errors import RowError, first_line
from batch_infer.models import is_compiled
from batch_infer.records import PromptRequest
from batch_infer.safety import ImageChecker
from batch_infer.stages import Stages

if TYPE_CHECKING:
    from batch_infer.models import LatentDiffusion


class StepLevelChain(DeviceChain):
    """Renders with this package's denoising loop, and admits rows as slots become free."""

    uses_pipeline_call = False
    model: LatentDiffusion

    def __init__(
        self,
        model: LatentDiffusion,
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
        size_pass = _SizePass(self.model, postprocessing, stages, must_compile=must_compile)
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
            postprocessing.close()
        # Free memory outside the except block, whose traceback would keep the tensors alive.
        del size_pass, postprocessing
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        yield self._retry_or_fail(requests, unfinished, size, self._shrink(size, stage), message)

    def _shrink(self, size: Size, stage: Stage) -> str | None:
        """Halve a batch size and describe the change. Returns None if both batch sizes are at their minimum."""
        old_slots, old_decode = self.batch_sizes.for_size(size)
        smaller = self.batch_sizes.halve(size, stage)
        if smaller is None:
            return None
        self._batch_sizes = smaller
        slots, decode = smaller.for_size(size)
        if slots < old_slots:
            return f"{slots} slots instead of {old_slots}"
        return f"{decode} images per decoder call instead of {old_decode}"


class _SizePass:
    """Renders rows of one image size and LoRA with fixed batch sizes, and holds their state on the device."""

    _slots: Slots[Tag]

    def __init__(
        self, model: LatentDiffusion, postprocessing: Postprocessing, stages: Stages, *, must_compile: bool
    ) -> None:
        """`must_compile`: compile the networks for this size before the first denoising step."""
        self._model, self._postprocessing, self._stages = model, postprocessing, stages
        self._encoded: list[Tag] = []
        """Rows that wait for free slots, oldest first."""
        self._pacer = make_pacer(model.device, stages)
        self.unfinished: dict[tuple[str, int], PromptRequest] = {}
        self.stage: Stage = "denoise"
        """The stage whose batch size shrinks first if memory runs out now."""
        self.must_compile = must_compile

    def run(
        self, requests: ReadAhead, first: PromptRequest, stop: Callable[[], bool]
    ) -> Iterator[Sequence[RowOutcome]]:
        """Render until all rows are finished and no further request of the group of the first is available.

        After a stop, yield rows that are fully denoised, and drop the others.
        """
        model, slots = self._model, self._postprocessing.slots
        self._slots = Slots(model, slots, model.latent_shape(*size_of(first)), model.device, model.dtype)
        while not stop():
            self._encode_ahead(requests, first.group_key)
            yield self._admit()
            if self._slots.has_rows:
                if self.must_compile:
                    self._compile()
                yield from self._postprocess(self._postprocessing.add(self._tick()))
            elif not self._encoded and not requests.has(first.group_key):
                break
        self._pacer.finish()
        yield from self._postprocess(self._postprocessing.finish())

    def _compile(self) -> None:
        """Compile the UNet and the decoder for these shapes by calling each once, and drop the results.

        The time counts as `Stages.compilation`, but not in the seconds of any stage or in the total.
        """
        started = time.perf_counter()
        self._slots.evaluate()
        self.stage = "decode"
        self._postprocessing.compile(self._slots.latent_shape)
        self.stage = "denoise"
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()
        self._stages.compilation += time.perf_counter() - started
        self.must_compile = False

    def _postprocess(self, batches: Iterator[list[RowOutcome]]) -> Iterator[list[RowOutcome]]:
        self.stage = "decode"
        for outcomes in batches:
            for outcome in outcomes:
                self.unfinished.pop(outcome.request.key, None)
            yield outcomes
        self.stage = "denoise"

    def _encode_ahead(self, requests: ReadAhead, group: object) -> None:
        """Encode the prompts of the rows to admit next.

        When at most one encoded row per two slots is waiting, their number is increased to one per slot.
        """
        if len(self._encoded) > self._slots.size // 2:
            return
        batch = requests.take(group, self._slots.size - len(self._encoded))
        if not batch:
            return
        self.unfinished.update((request.key, request) for request in batch)
        started = time.perf_counter()
        self._encoded += zip(batch, encode_concurrently(self._model, batch), strict=True)
        self._stages.encode += time.perf_counter() - started

    def _admit(self) -> list[RowOutcome]:
        """Move rows into free slots, oldest first, and return the rows whose step count the scheduler rejects.

        If a single slot is free, a row without guidance overtakes rows with guidance, which need two.
        """
        outcomes: list[RowOutcome] = []
        waiting, self._encoded = self._encoded, []
        for row in waiting:
            request, conditioning = row
            if request.params.slots > self._slots.free_count:
                self._encoded.append(row)
                continue
            try:
                table = self._model.solver.table(request.params.num_inference_steps)
            except RowError as error:
                self.unfinished.pop(request.key, None)
                outcomes.append(UnrenderedRow(request, "invalid", str(error)))
            else:
                self._slots.admit(row, request.params, request.seed, table, conditioning.context)
        return outcomes

    def _tick(self) -> list[FinishedRow[Tag]]:
        """Advance every row by one step in one UNet call, and return the finished rows."""
        used = self._slots.size - self._slots.free_count
        self._pacer.start()
        finished = self._slots.tick()
        self._pacer.end()
        self._stages.ticks += 1
        self._stages.slot_ticks += self._slots.size
        self._stages.row_forwards += used
        return finished
