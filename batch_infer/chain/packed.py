"""Batch the rows of a model family with this package's own denoising loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from batch_infer.accelerator import synchronize
from batch_infer.admission import WaitingRows
from batch_infer.chain.base import Size, Stage, UnrenderedRow
from batch_infer.chain.batcher import Advanced, Tag
from batch_infer.chain.pacing import encode_concurrently, make_pacer
from batch_infer.diffusion import Slots
from batch_infer.errors import RowError
from batch_infer.records import PromptRequest
from batch_infer.stages import Stages

if TYPE_CHECKING:
    from batch_infer.models import LatentDiffusion


class PackedBatcher:
    """Batches rows of a model family by coefficient tables, which takes the fewest operations per step."""

    stage: Stage = "denoise"

    def __init__(self, model: LatentDiffusion, batch_sizes: tuple[int, int], size: Size, stages: Stages) -> None:
        """`batch_sizes`: batch elements of a denoiser and of a decoder call."""
        self._model, self._stages = model, stages
        slots, self._decode_batch = batch_sizes
        self._slots: Slots[Tag] = Slots(model, slots, model.latent_shape(*size), model.device, model.dtype)
        self._waiting: WaitingRows[Tag] = WaitingRows(slots, lambda row: row[0].params.slots)
        self._pacer = make_pacer(model.device, stages)

    @property
    def room(self) -> int:
        return self._waiting.room

    @property
    def is_waiting(self) -> bool:
        return len(self._waiting) > 0

    @property
    def is_denoising(self) -> bool:
        return self._slots.has_rows

    def prepare(self, requests: Sequence[PromptRequest]) -> None:
        started = time.perf_counter()
        for row in zip(requests, encode_concurrently(self._model, requests), strict=True):
            self._waiting.add(row)
        self._stages.encode += time.perf_counter() - started

    @torch.inference_mode()
    def compile(self) -> None:
        self._slots.evaluate()
        self.stage = "decode"
        self._model.decode(torch.zeros(self._decode_batch, *self._slots.latent_shape, device=self._model.device))
        synchronize(self._model.device)
        self.stage = "denoise"

    def tick(self) -> Advanced:
        used = self._slots.size - self._slots.free_count
        self._pacer.start()
        finished = self._slots.tick()
        self._pacer.end()
        self._stages.add_tick(used, self._slots.size)
        return finished

    def finish(self) -> Advanced:
        self._pacer.finish()
        return []

    def close(self) -> None:
        self._waiting.clear()

    def admit(self) -> Sequence[UnrenderedRow]:
        """Move rows into free slots, and return the rows whose step count the scheduler rejects."""
        refused: list[UnrenderedRow] = []
        while rows := self._waiting.admit(self._slots.free_count):  # again, since a rejected row leaves its slots free
            for row in rows:
                request, conditioning = row
                try:
                    table = self._model.solver.table(request.params.num_inference_steps)
                except RowError as error:
                    refused.append(UnrenderedRow(request, "invalid", str(error)))
                else:
                    self._slots.admit(row, request.params, request.seed, table, conditioning.context)
        return refused
