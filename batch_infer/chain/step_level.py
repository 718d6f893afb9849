"""The packed chain: rows of any steps and guidance share one UNet call, and leave it one by one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from batch_infer.accelerator import out_of_memory_errors
from batch_infer.chain.encoding import Encoding
from batch_infer.chain.outcomes import Elsewhere, Rendered, Size, Unrendered, nothing
from batch_infer.chain.pacing import pace_of
from batch_infer.chain.postprocessing import Finishing, Tag
from batch_infer.chain.read_ahead import Ahead, Waiting
from batch_infer.chain.shape import BatchSizes, Part
from batch_infer.diffusion import Finished, Slots
from batch_infer.errors import RowError, first_line
from batch_infer.models import is_compiled
from batch_infer.records import PromptRequest
from batch_infer.safety import ImageChecker
from batch_infer.stages import Stages

if TYPE_CHECKING:
    from batch_infer.models import LatentDiffusion

log = logging.getLogger("batch_infer")


class StepLevelChain:
    """One device's way from requests to judged images.

    What follows (compress, hash, write) is the worker's, on threads beside this one.
    """

    uses_pipeline_call = False

    def __init__(
        self,
        model: LatentDiffusion,
        shape: BatchSizes,
        checker: ImageChecker | None,
        stop: Callable[[], bool] = lambda: False,
        *,
        in_background: bool | None = None,
    ) -> None:
        """`stop` is asked at every tick; once it says so, rows under way are given up and `render` ends.

        `in_background`: decode and check on a thread of their own; by default on a GPU.
        """
        self.model, self._checker, self._stop = model, checker, stop
        self._in_background = model.device.type == "cuda" if in_background is None else in_background
        self.batch_sizes = shape
        """The batch sizes as they are now: smaller than at first where the device ran out of memory."""
        self.stages_by_size: dict[Size, Stages] = {}
        self._compiled: set[tuple[Size, tuple[int, int]]] = set()
        """The image sizes, each with its slots and decoder batch, that the networks are compiled for."""

    @property
    def stages(self) -> Stages:
        """Those of all sizes together."""
        return sum(self.stages_by_size.values(), Stages())

    def render(
        self, requests: Iterable[PromptRequest], elsewhere: Elsewhere = nothing
    ) -> Iterator[Rendered | Unrendered]:
        """Render requests as slots come free, in the order in which they finish.

        Rows next to each other should share a size: a change of size waits until the slots have emptied. Where the
        device's memory does not hold the slots, or the decoder's batch, half of them are given up and the rows that
        were in them begin again.

        An iterator that has none at this moment is asked again at the next tick, for as long as there is one: it may
        then have more. After each tick the outcomes that `elsewhere` gives are given too, as they are.
        """
        source = Ahead(iter(requests))
        started = time.perf_counter()
        while (first := source.peek()) is not None and not self._stop():
            size = first.params.height, first.params.width
            stages = self.stages_by_size.setdefault(size, Stages())
            compilation = stages.compilation
            yield from self._render_size(source, size, elsewhere)
            stages.seconds += time.perf_counter() - started - (stages.compilation - compilation)
            started = time.perf_counter()

    def _render_size(self, source: Ahead, size: Size, elsewhere: Elsewhere) -> Iterator[Rendered | Unrendered]:
        finishing = Finishing(
            self.model,
            self._checker,
            self.batch_sizes.of(size),
            self.stages_by_size[size],
            in_background=self._in_background,
        )
        passage = _Passage(self.model, finishing, size, compiles=self._needs_compilation(size))
        batches = self.batch_sizes.of(size)
        try:
            with out_of_memory_errors():
                yield from passage.run(source, self._stop, elsewhere)
            return
        except torch.OutOfMemoryError as error:
            told = first_line(error)
        finally:
            left, part = passage.left, passage.part
            if passage.has_compiled:
                self._compiled.add((size, batches))
            finishing.close()
        # Outside of the except block, whose traceback would keep the tensors of the passage alive.
        del passage, finishing
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        yield from self._shrink(source, size, part, left, told)

    def _needs_compilation(self, size: Size) -> bool:
        """Whether networks are to be compiled, and are not yet for this size and its batch sizes."""
        return is_compiled(self.model.networks) and (size, self.batch_sizes.of(size)) not in self._compiled

    def _shrink(
        self, source: Ahead, size: Size, part: Part, left: Sequence[PromptRequest], told: str
    ) -> Iterator[Unrendered]:
        """Go on with half; with nothing left to halve, the rows that were under way have failed."""
        name = f"{size[1]}x{size[0]}"
        smaller = self.batch_sizes.shrunk(size, part)
        if smaller is None:
            error = f"the device's memory does not hold one image of {name} pixels ({told})"
            yield from (Unrendered(request, "failed", error) for request in left)
            return
        before, after = (shape.of(size)[part == "decode"] for shape in (self.batch_sizes, smaller))
        what = "slots" if part == "denoise" else "images in a decoder call"
        log.warning("out of memory at %s pixels: going on with %d %s, not %d", name, after, what, before)
        self.batch_sizes = smaller
        source.put_back(left)


class _Passage:
    """Rows of one size on their way through the slots of one shape: all that lies on the device for them."""

    def __init__(self, model: LatentDiffusion, finishing: Finishing, size: Size, *, compiles: bool) -> None:
        """`compiles`: compile the networks for this size before any row is timed."""
        self._model, self._finishing, self._size = model, finishing, size
        self._compiles = compiles
        self.has_compiled = False
        self._stages = finishing.stages
        self._waiting = Waiting()
        self._pace = pace_of(model.device, self._stages)
        self._encoding = Encoding(model.device)
        self._open: dict[tuple[str, int], PromptRequest] = {}
        self.part: Part = "denoise"
        """What is being done, or was when it did not fit into memory."""

    @property
    def left(self) -> list[PromptRequest]:
        """The rows that were taken in and are not through."""
        return list(self._open.values())

    def run(
        self, source: Ahead, stop: Callable[[], bool], elsewhere: Elsewhere = nothing
    ) -> Iterator[Rendered | Unrendered]:
        """Render this size's rows; gives those that are through, and returns once the next row has another size."""
        model = self._model
        slots: Slots[Tag] = Slots(
            model, self._finishing.slots, model.latent_shape(*self._size), model.device, model.dtype
        )
        while not stop():
            self._read_ahead(source, slots.size)
            yield from self._admit(slots)
            if self._compiles and slots.busy:
                self._compile(slots)
            if not slots.busy:
                if self._waiting or source.has(self._size):
                    continue
                break
            done = self._tick(slots)
            yield from self._through(self._finishing.add(done))
            yield from elsewhere()
        self._pace.finish()
        yield from self._through(self._finishing.finish())

    def _compile(self, slots: Slots[Tag]) -> None:
        """Have both networks compiled for these shapes, by one call each whose result is dropped.

        So the time of compiling is in no stage, and in no figure that is derived from them.
        """
        started = time.perf_counter()
        slots.evaluate()
        self.part = "decode"
        self._finishing.prepare(slots.latent_shape)
        self.part = "denoise"
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()
        self._stages.compilation += time.perf_counter() - started
        self._compiles, self.has_compiled = False, True

    def _through(self, outcomes: Iterator[Rendered | Unrendered]) -> Iterator[Rendered | Unrendered]:
        self.part = "decode"
        for outcome in outcomes:
            self._open.pop(outcome.request.key, None)
            yield outcome
        self.part = "denoise"

    def _read_ahead(self, source: Ahead, slots: int) -> None:
        """Keep as many rows waiting as there are slots; encode their prompts together, before a slot wants them."""
        if len(self._waiting) > slots // 2:
            return
        batch = source.take(self._size, slots - len(self._waiting))
        if batch:
            self._open.update((request.key, request) for request in batch)
            started = time.perf_counter()
            with self._encoding.apart():
                conditionings = self._model.condition(batch)
            for request, conditioning in zip(batch, conditionings, strict=True):
                self._encoding.lend(conditioning)
                self._waiting.add(request, conditioning)
            self._stages.encode += time.perf_counter() - started

    def _admit(self, slots: Slots[Tag]) -> Iterator[Unrendered]:
        while (taken := self._waiting.take(slots.free)) is not None:
            request, conditioning = taken
            try:
                table = self._model.solver.table(request.params.num_inference_steps)
            except RowError as error:
                self._open.pop(request.key, None)
                yield Unrendered(request, "invalid", str(error))
                continue
            slots.admit(taken, request.params, request.seed, table, conditioning.context)

    def _tick(self, slots: Slots[Tag]) -> list[Finished[Tag]]:
        self._pace.start()
        before = slots.row_forwards
        done = slots.tick()
        self._stages.ticks += 1
        self._stages.slot_ticks += slots.size
        self._stages.row_forwards += slots.row_forwards - before
        self._pace.end()
        return done
