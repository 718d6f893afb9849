"""Batch the rows of any diffusers pipeline: each runs the pipeline's own call, and rows share the network calls."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from batch_infer.accelerator import is_device_error, synchronize
from batch_infer.chain.base import Stage, UnrenderedRow
from batch_infer.chain.batcher import Advanced, Tag
from batch_infer.chain.pacing import make_pacer
from batch_infer.diffusion import FinishedRow
from batch_infer.errors import FailedRowError, RowError, first_line
from batch_infer.models import AnyPipeline
from batch_infer.records import PromptRequest
from batch_infer.stacking import ROW_ERRORS, CallStacker, EndedRow, Kind
from batch_infer.stages import Stages


class StackedBatcher:
    """Batches rows by their network calls. Rows of a pipeline whose calls cannot be stacked run one at a time."""

    def __init__(self, model: AnyPipeline, batch_sizes: tuple[int, int], stages: Stages) -> None:
        """`batch_sizes`: batch elements of a denoiser and of a decoder call."""
        self._model, self._stages = model, stages
        self._pacer = make_pacer(model.device, stages)
        self.stage: Stage = "denoise"
        evaluator = model.make_evaluator(*batch_sizes, self._observe)
        self._stacker: CallStacker[Tag] = CallStacker(model.pipeline, evaluator)
        self._ready: list[FinishedRow[Tag] | UnrenderedRow] = []

    @property
    def room(self) -> int:
        stacker = self._stacker
        if self._model.plan.is_alone:
            return 0 if stacker.has_rows else 1
        return stacker.waiting.room

    @property
    def is_waiting(self) -> bool:
        return len(self._stacker.waiting) > 0

    @property
    def is_denoising(self) -> bool:
        return self._stacker.is_denoising

    def prepare(self, requests: Sequence[PromptRequest]) -> None:
        rows: list[tuple[Tag, Mapping[str, object]]] = []
        for request in requests:
            try:
                rows.append(((request, self._model.count_tokens(request)), self._model.make_arguments(request)))
            except ROW_ERRORS as error:  # of the tokenizer
                if is_device_error(error):
                    raise
                self._ready.append(UnrenderedRow(request, "failed", f"the prompt cannot be read: {first_line(error)}"))
        self._stacker.start(rows)

    def admit(self) -> Sequence[UnrenderedRow]:
        """Admit waiting rows, and return rows that have failed before their first denoiser call."""
        self._stacker.admit()
        self._take_ended()
        failed = [row for row in self._ready if isinstance(row, UnrenderedRow)]
        self._ready = [row for row in self._ready if not isinstance(row, UnrenderedRow)]
        return failed

    def compile(self) -> None:
        self._stacker.next_call()()
        synchronize(self._model.device)

    def tick(self) -> Advanced:
        self._stacker.tick()
        return self._take_ready()

    def finish(self) -> Advanced:
        self._stacker.finish_decoding()
        self._pacer.finish()
        return self._take_ready()

    def close(self) -> None:
        self._stacker.close()

    def _take_ready(self) -> Advanced:
        self._take_ended()
        ready, self._ready = self._ready, []
        return ready

    def _take_ended(self) -> None:
        self._ready += map(self._finish, self._stacker.take_ended())

    def _finish(self, row: EndedRow[Tag]) -> FinishedRow[Tag] | UnrenderedRow:
        request, _ = row.tag
        try:
            image = self._model.read_image(request, row.result, row.error)
        except RowError as error:
            return UnrenderedRow(request, "failed" if isinstance(error, FailedRowError) else "invalid", str(error))
        return FinishedRow(row.tag, image, row.seconds)

    @contextmanager
    def _observe(self, kind: Kind) -> Iterator[None]:
        """Add the duration of a network call to its stage.

        On a GPU, a call returns before it is complete, and another thread counts the time of decoding.
        """
        self.stage = "decode" if kind == "decode" else "denoise"  # an earlier call that raised did not reset it
        if kind == "denoise":
            self._pacer.start()
            yield
            self._pacer.end()
            evaluator = self._stacker.evaluator
            self._stages.add_tick(evaluator.last_used, evaluator.last_size)
            return
        started = time.perf_counter()
        yield
        self.stage = "denoise"
        if kind == "encode":
            self._stages.encode += time.perf_counter() - started
        elif self._model.device.type != "cuda":
            self._stages.decode += time.perf_counter() - started
