"""Slots: a UNet batch of one fixed shape in which rows come and go.

A slot is a row-forward, one row of one UNet call: a row with guidance takes two, a row without takes one. Rows of any
step count, guidance and position share the call; a finished row leaves its slots to the next. The batch never changes
its shape, so the bytes of a row do not depend on its neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import torch

from batch_infer.accelerator import copy_to
from batch_infer.diffusion.guidance import guide
from batch_infer.diffusion.solver import TABLES_KEPT, CoefficientTable
from batch_infer.records import SamplingParams

Tag = TypeVar("Tag")
Context = Mapping[str, torch.Tensor]
"""What the UNet is told of one row beside its sample, by the name of the argument (no batch dimension)."""


class Denoiser(Protocol):
    """A UNet call. sample (N, C, h, w), timestep (N,), context tensors (N, ...) -> model output (N, C, h, w)."""

    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Finished(Generic[Tag]):
    """A row that has left: its tag, its latents (C, h, w) float32, and the seconds it spent in the slots."""

    tag: Tag
    latents: torch.Tensor
    seconds: float


@dataclass(slots=True)
class _Row(Generic[Tag]):
    """A row under way. `history` has room for all that its table adds up; the first `known` of them are there."""

    tag: Tag
    table: CoefficientTable
    coefficients: torch.Tensor
    history: torch.Tensor
    generator: torch.Generator
    lanes: tuple[int, ...]
    started: float
    step: int = 0
    known: int = 0


def draw_noise(shape: tuple[int, int, int], generator: torch.Generator, *, pinned: bool = False) -> torch.Tensor:
    """The next unit noise of a row's CPU generator, as diffusers draws it: (C, h, w) float32."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, pin_memory=pinned)


class Slots(Generic[Tag]):
    """`size` slots over latents of one shape (C, h, w), on the device and in the dtype of the UNet.

    The state of the rows is float32 whatever the UNet computes in: a sample each, and all that it is a sum of (noise,
    model outputs, draws). At 64x64 latents a row of 1,000 steps keeps 66 MB of that, or 131 MB if it draws at each.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        size: int,
        latent_shape: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.size = size
        self.latent_shape = latent_shape
        self.row_forwards = 0
        self._denoiser = denoiser
        self._device, self._dtype = device, dtype
        self._rows: dict[int, _Row[Tag]] = {}
        self._free_lanes = list(range(size))
        self._free_rows = list(range(size))
        self._samples = torch.zeros(size, *latent_shape, device=device)
        self._context: dict[str, torch.Tensor] = {}
        # One copy for all rows that use a table. By no method of this object, which would then outlive its last user.
        self._on_device: Callable[[CoefficientTable], torch.Tensor] = lru_cache(TABLES_KEPT)(
            lambda table: copy_to(device, table.coefficients)
        )
        # Which row each lane serves, and each row's two lanes: kept on the host, sent when rows come or go.
        self._row_of_lane = [0] * size
        self._lanes_of_row = [(0, 0)] * size
        self._guidance = [(1.0, 0.0)] * size
        self._stale = True

    @property
    def free(self) -> int:
        return len(self._free_lanes)

    @property
    def busy(self) -> bool:
        return bool(self._rows)

    @torch.inference_mode()
    def admit(
        self,
        tag: Tag,
        params: SamplingParams,
        seed: int,
        table: CoefficientTable,
        context: tuple[Context, Context | None],
    ) -> None:
        """Take a row in: `context` is its conditional and, with guidance, its unconditional part."""
        row, lanes = self._free_rows.pop(0), tuple(self._free_lanes.pop(0) for _ in range(params.slots))
        for lane, part in zip(lanes, context, strict=False):
            if part is None:
                raise ValueError("a row with guidance needs an unconditional context")
            self._row_of_lane[lane] = row
            self._write_context(lane, part)
        self._lanes_of_row[row] = (lanes[0], lanes[-1])
        self._guidance[row] = (params.guidance_scale, params.guidance_rescale) if params.uses_guidance else (1.0, 0.0)
        coefficients = self._on_device(table)
        history = torch.empty(coefficients.shape[1], self._samples[0].numel(), device=self._device)
        generator = torch.Generator("cpu").manual_seed(seed)
        self._rows[row] = taken = _Row(tag, table, coefficients, history, generator, lanes, time.perf_counter())
        self._draw(taken)
        self._samples[row] = table.initial_scale * history[0].reshape(self.latent_shape)
        self._stale = True

    @torch.inference_mode()
    def tick(self) -> list[Finished[Tag]]:
        """One UNet call over all slots, one step for every row; returns the rows that are done."""
        output = self.evaluate().float()
        guided = guide(output[self._conditional], output[self._unconditional], self._scale, self._rescale)
        self.row_forwards += sum(len(row.lanes) for row in self._rows.values())
        return [done for index in list(self._rows) if (done := self._advance(index, guided[index])) is not None]

    @torch.inference_mode()
    def evaluate(self) -> torch.Tensor:
        """Call the UNet on the rows as they are, and advance none: output (slots, C, h, w) in the UNet's dtype."""
        self._send_layout()
        timestep, input_scale = self._send_steps()
        sample = self._samples[self._lane_rows] * input_scale.reshape(-1, 1, 1, 1)
        return self._denoiser.denoise(sample.to(self._dtype), timestep, self._context)

    def _advance(self, index: int, output: torch.Tensor) -> Finished[Tag] | None:
        """Step one row by its own line of its own table; every operation has a shape that is the row's alone."""
        row = self._rows[index]
        row.history[row.known] = output.flatten()
        row.known += 1
        for _ in range(row.table.draws[row.step]):
            self._draw(row)
        sample = row.coefficients[row.step, : row.known] @ row.history[: row.known]
        row.step += 1
        if row.step < row.table.evaluations:
            self._samples[index] = sample.reshape(self.latent_shape)
            return None
        self._release(index)
        return Finished(row.tag, sample.reshape(self.latent_shape), time.perf_counter() - row.started)

    def _release(self, index: int) -> None:
        row = self._rows.pop(index)
        self._free_rows.append(index)
        self._free_lanes.extend(row.lanes)
        self._stale = True

    def _write_context(self, lane: int, part: Context) -> None:
        for name, value in part.items():
            if name not in self._context:
                self._context[name] = torch.zeros(self.size, *value.shape, device=self._device, dtype=value.dtype)
            self._context[name][lane] = value

    def _draw(self, row: _Row[Tag]) -> None:
        """Add the row's next noise to what is known. The host draws it, and does not wait until it is sent."""
        noise = draw_noise(self.latent_shape, row.generator, pinned=self._device.type == "cuda")
        row.history[row.known].copy_(noise.flatten(), non_blocking=True)
        row.known += 1

    def _send_layout(self) -> None:
        if not self._stale:
            return
        self._lane_rows = self._send(self._row_of_lane, torch.long)
        self._conditional, self._unconditional = self._send(self._lanes_of_row, torch.long).unbind(1)
        self._scale, rescale = self._send(self._guidance, torch.float32).unbind(1)
        asked = any(self._guidance[index][1] > 0 for index in self._rows)
        self._rescale = rescale if asked else None
        self._stale = False

    def _send_steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Each lane's timestep and input scale, both contiguous. An idle lane computes at timestep 0, and is not read.

        A timestep with gaps would be another input to torch.compile than the bare UNet's, and be compiled once more.
        """
        timesteps, input_scales = [0.0] * self.size, [1.0] * self.size
        for row in self._rows.values():
            for lane in row.lanes:
                timesteps[lane] = row.table.timesteps[row.step]
                input_scales[lane] = row.table.input_scale[row.step]
        timestep, input_scale = self._send([timesteps, input_scales], torch.float32).unbind(0)
        return timestep, input_scale

    def _send(
        self,
        values: list[int] | list[list[float]] | list[tuple[float, float]] | list[tuple[int, int]],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        return copy_to(self._device, torch.tensor(values, dtype=dtype))
