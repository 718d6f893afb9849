"""The bare UNet: one call after the other at the slots' shape, with the same input, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from batch_infer.bench.clock import seconds_of
from batch_infer.bench.rows import Table
from batch_infer.bench.settings import Size
from batch_infer.records import PromptRequest

if TYPE_CHECKING:
    from batch_infer.models import LatentDiffusion

LEAST_SECONDS = 1.0
"""A measurement takes as many calls as take so long, once a call has set things up."""


class BareUNet:
    """Row-forwards per second that the UNet does by itself: what a table could be rendered with if nothing else took
    time and every slot were always taken."""

    def __init__(self, model: LatentDiffusion, example: PromptRequest) -> None:
        """`example`: a row of any size, whose prompt is the UNet's input."""
        self._model, self._example = model, example

    @torch.inference_mode()
    def rate(self, size: Size, slots: int) -> float:
        """Row-forwards per second at a size (height, width) and a number of slots.

        Raises torch.OutOfMemoryError.
        """
        call, device = self._call(size, slots), self._model.device
        call()
        once = seconds_of(call, device)
        calls = round(LEAST_SECONDS / once)

        def work() -> None:
            for _ in range(calls):
                call()

        return slots / once if calls < 2 else calls * slots / seconds_of(work, device)

    def _call(self, size: Size, slots: int) -> Callable[[], torch.Tensor]:
        model = self._model
        params = replace(self._example.params, height=size[0], width=size[1])
        (conditioning,) = model.condition([replace(self._example, params=params)])
        context = {name: part.expand(slots, *part.shape).contiguous() for name, part in conditioning.context[0].items()}
        sample = torch.randn(slots, *model.latent_shape(*size), device=model.device).to(model.dtype)
        timestep = torch.full((slots,), 500.0, device=model.device)
        return lambda: model.denoise(sample, timestep, context)


def seconds_for(table: Table, rates: Mapping[Size, float]) -> float:
    """What the row-forwards of a table take at these rates, with no slot ever empty."""
    return sum(work.row_forwards / rates[size] for size, work in table.work.items())
