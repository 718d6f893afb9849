"""Step-level batching: rows of any step count and guidance share UNet calls, and each leaves when it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from batch_infer.accelerator import out_of_memory_errors
from batch_infer.chain.base import BatchSizes, DeviceChain, RowOutcome, Stage, UnrenderedRow
from batch_infer.chain.pacing import EncodeStream, make_pacer
from batch_infer.chain.postprocessing import Postprocessing, Tag
from batch_infer.chain.sources import ReadAhead, Size, size_of
from batch_infer.diffusion import FinishedRow, Slots
from batch_infer.errors import RowError, first_line
from batch_infer.models import is_compiled
from batch_infer.records import PromptRequest
from batch_infer.safety import ImageChecker
from batch_infer.stages import Stages

if TYPE_CHECKING:
    from batch_infer.models import LatentDiffusion


class StepLevelChain(DeviceChain):
    """Renders with a model whose denoising loop is ours. Rows are admitted as slots become free."""

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
        """`stop` is called before each UNet call. Once it returns True, unfinished rows are dropped.

        `in_background`: decode and check on another thread. By default only on a GPU.
        """
        super().__init__(model, batch_sizes, checker, stop)
        self._in_background = model.device.type == "cuda" if in_background is None else in_background
        self._compiled: set[tuple[Size, tuple[int, int]]] = set()
        """The image sizes, with their batch sizes, that the networks are compiled for."""

    def _render_next(self, requests: ReadAhead, first: PromptRequest, stages: Stages) -> Iterator[Sequence[RowOutcome]]:
        """Render the next requests of one size."""
        size = size_of(first)
        batch_sizes = self.batch_sizes.for_size(size)
        postprocessing = Postprocessing(
            self.model, self._checker, batch_sizes, stages, in_background=self._in_background
        )
        size_pass = _SizePass(self.model, postprocessing, stages)
        size_pass.must_compile = is_compiled(self.model.networks) and (size, batch_sizes) not in self._compiled
        try:
            with out_of_memory_errors():
                yield from size_pass.run(requests, size, self._stop)
            return
        except torch.OutOfMemoryError as error:
            message = first_line(error)
        finally:
            unfinished, stage = list(size_pass.unfinished.values()), size_pass.stage
            if size_pass.has_compiled:
                self._compiled.add((size, batch_sizes))
            postprocessing.close()
        # Outside of the except block, whose traceback would keep the tensors alive.
        del size_pass, postprocessing
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        yield self._halve(requests, size, stage, unfinished, message)

    def _halve(
        self, requests: ReadAhead, size: Size, stage: Stage, unfinished: Sequence[PromptRequest], message: str
    ) -> list[UnrenderedRow]:
        """Halve a batch size and put unfinished rows back. Returns them as failed if no batch size can be halved."""
        smaller = self.batch_sizes.halve(size, stage)
        if smaller is None:
            return self._fail(unfinished, size, message)
        before, after = (sizes.for_size(size)[stage == "decode"] for sizes in (self.batch_sizes, smaller))
        what = "slots" if stage == "denoise" else "images in a decoder call"
        self._batch_sizes = smaller
        return self._retry(requests, unfinished, size, f"{after} {what}, not {before}")


class _SizePass:
    """Renders rows of one size with fixed batch sizes, and owns all that is on the device for them."""

    _slots: Slots[Tag]

    def __init__(self, model: LatentDiffusion, postprocessing: Postprocessing, stages: Stages) -> None:
        self._model, self._postprocessing, self._stages = model, postprocessing, stages
        self._encoded: list[Tag] = []
        """Rows that wait for free slots, oldest first."""
        self._pacer = make_pacer(model.device, stages)
        self._encode_stream = EncodeStream(model.device)
        self.unfinished: dict[tuple[str, int], PromptRequest] = {}
        self.stage: Stage = "denoise"
        """The stage that is running, or that ran out of memory."""
        self.must_compile = False
        """Whether to compile the networks for this size before the first row is timed."""
        self.has_compiled = False

    def run(self, requests: ReadAhead, size: Size, stop: Callable[[], bool]) -> Iterator[Sequence[RowOutcome]]:
        """Render until the next request is of another size, or there is none and no row is left."""
        model, slots = self._model, self._postprocessing.slots
        self._slots = Slots(model, slots, model.latent_shape(*size), model.device, model.dtype)
        while not stop():
            self._encode_ahead(requests, size)
            yield self._admit()
            if self._slots.has_rows:
                if self.must_compile:
                    self._compile()
                yield from self._postprocess(self._postprocessing.add(self._evaluate()))
            elif not self._encoded and not requests.has(size):
                break
        self._pacer.finish()
        yield from self._postprocess(self._postprocessing.finish())

    def _compile(self) -> None:
        """Compile both networks for these shapes, by one call each whose result is dropped.

        So the time of compiling is in no stage, and in no figure that is derived from them.
        """
        started = time.perf_counter()
        self._slots.evaluate()
        self.stage = "decode"
        self._postprocessing.compile(self._slots.latent_shape)
        self.stage = "denoise"
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()
        self._stages.compilation += time.perf_counter() - started
        self.must_compile, self.has_compiled = False, True

    def _postprocess(self, batches: Iterator[list[RowOutcome]]) -> Iterator[list[RowOutcome]]:
        self.stage = "decode"
        for outcomes in batches:
            for outcome in outcomes:
                self.unfinished.pop(outcome.request.key, None)
            yield outcomes
        self.stage = "denoise"

    def _encode_ahead(self, requests: ReadAhead, size: Size) -> None:
        """Keep as many rows waiting as there are slots. Their prompts are encoded together, before a slot is free."""
        if len(self._encoded) > self._slots.size // 2:
            return
        batch = requests.take(size, self._slots.size - len(self._encoded))
        if not batch:
            return
        self.unfinished.update((request.key, request) for request in batch)
        started = time.perf_counter()
        with self._encode_stream.use():
            conditionings = self._model.condition(batch)
        for request, conditioning in zip(batch, conditionings, strict=True):
            self._encode_stream.keep_alive(conditioning)
            self._encoded.append((request, conditioning))
        self._stages.encode += time.perf_counter() - started

    def _admit(self) -> list[RowOutcome]:
        """Move waiting rows into free slots. Returns those whose step count the scheduler refuses."""
        refused: list[RowOutcome] = []
        while (row := self._take_fitting()) is not None:
            request, conditioning = row
            try:
                table = self._model.solver.table(request.params.num_inference_steps)
            except RowError as error:
                self.unfinished.pop(request.key, None)
                refused.append(UnrenderedRow(request, "invalid", str(error)))
                continue
            self._slots.admit(row, request.params, request.seed, table, conditioning.context)
        return refused

    def _take_fitting(self) -> Tag | None:
        """Take the oldest row that fits into the free slots. A single one fits only a row without guidance."""
        for index, (request, _) in enumerate(self._encoded):
            if request.params.slots <= self._slots.free_count:
                return self._encoded.pop(index)
        return None

    def _evaluate(self) -> list[FinishedRow[Tag]]:
        """Make one UNet call and return the rows that it finishes."""
        self._pacer.start()
        before = self._slots.row_forwards
        finished = self._slots.tick()
        self._stages.ticks += 1
        self._stages.slot_ticks += self._slots.size
        self._stages.row_forwards += self._slots.row_forwards - before
        self._pacer.end()
        return finished
