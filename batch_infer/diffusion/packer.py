"""Slots: a UNet batch of one fixed shape, which rows enter and leave at any step.

A slot is one batch position: a row with guidance uses two, a row without uses one. Rows of any step count, guidance and
progress share the UNet call, and a finished row frees its slots for the next. The batch never changes its shape, so the
bytes of a row do not depend on its neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

import torch

from batch_infer.accelerator import copy_to
from batch_infer.diffusion.guidance import guide
from batch_infer.diffusion.solver import CACHED_TABLES, CoefficientTable
from batch_infer.records import SamplingParams

Tag = TypeVar("Tag")
Context = Mapping[str, torch.Tensor]
"""Per-row conditioning passed to the UNet besides the sample, by argument name (no batch dimension)."""


class Denoiser(Protocol):
    """A UNet call. sample (N, C, h, w), timestep (N,), context tensors (N, ...) -> model output (N, C, h, w)."""

    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class FinishedRow(Generic[Tag]):
    """A finished row: its tag, its latents (C, h, w) float32, and the seconds it spent in the slots."""

    tag: Tag
    latents: torch.Tensor
    seconds: float


@dataclass(slots=True)
class _Row(Generic[Tag]):
    """A row in the batch. `history` has room for all terms of its sum, of which the first `known` are filled."""

    tag: Tag
    table: CoefficientTable
    coefficients: torch.Tensor
    history: torch.Tensor
    generator: torch.Generator
    positions: tuple[int, ...]
    started: float
    step: int = 0
    known: int = 0


def draw_noise(shape: tuple[int, int, int], generator: torch.Generator, *, pinned: bool = False) -> torch.Tensor:
    """Draw unit noise (C, h, w) float32 from a row's CPU generator, as diffusers does."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, pin_memory=pinned)


class Slots(Generic[Tag]):
    """`size` slots over latents of one shape (C, h, w), on the device and in the dtype of the UNet.

    The state of the rows is float32 in any dtype of the UNet: each has its sample and the terms that it is a sum of
    (noise, model outputs, draws). At 64x64 latents the terms of 1,000 steps take 66 MB, or 131 MB with a draw per step.
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
        """UNet evaluations so far: batch positions that were in use, summed over UNet calls."""
        self._denoiser = denoiser
        self._device, self._dtype = device, dtype
        self._rows: dict[int, _Row[Tag]] = {}
        self._free_positions = list(range(size))
        self._free_rows = list(range(size))
        self._samples = torch.zeros(size, *latent_shape, device=device)
        self._context: dict[str, torch.Tensor] = {}
        # One copy for all rows that use a table. A cached method would keep this object alive after its last use.
        self._on_device: Callable[[CoefficientTable], torch.Tensor] = lru_cache(CACHED_TABLES)(
            lambda table: copy_to(device, table.coefficients)
        )
        # The row at each position and the two positions of each row: on the host, sent when rows enter or leave.
        self._row_at = [0] * size
        self._positions_of = [(0, 0)] * size
        self._guidance = [(1.0, 0.0)] * size
        self._is_stale = True

    @property
    def free_count(self) -> int:
        return len(self._free_positions)

    @property
    def has_rows(self) -> bool:
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
        """Add a row. `context` is its conditional and, with guidance, its unconditional part."""
        row = self._free_rows.pop(0)
        positions = tuple(self._free_positions.pop(0) for _ in range(params.slots))
        for position, part in zip(positions, context, strict=False):
            if part is None:
                raise ValueError("a row with guidance needs an unconditional context")
            self._row_at[position] = row
            self._write_context(position, part)
        self._positions_of[row] = (positions[0], positions[-1])
        self._guidance[row] = (params.guidance_scale, params.guidance_rescale) if params.uses_guidance else (1.0, 0.0)
        coefficients = self._on_device(table)
        history = torch.empty(coefficients.shape[1], self._samples[0].numel(), device=self._device)
        generator = torch.Generator("cpu").manual_seed(seed)
        state = _Row(tag, table, coefficients, history, generator, positions, time.perf_counter())
        self._rows[row] = state
        self._draw(state)
        self._samples[row] = table.initial_scale * history[0].reshape(self.latent_shape)
        self._is_stale = True

    @torch.inference_mode()
    def tick(self) -> list[FinishedRow[Tag]]:
        """Make one UNet call over all slots, advance every row by one step, and return the rows that are finished."""
        output = self.evaluate().float()
        guided = guide(output[self._conditional], output[self._unconditional], self._scale, self._rescale)
        self.row_forwards += sum(len(row.positions) for row in self._rows.values())
        advanced = [self._advance(index, guided[index]) for index in list(self._rows)]
        return [finished for finished in advanced if finished is not None]

    @torch.inference_mode()
    def evaluate(self) -> torch.Tensor:
        """Call the UNet without advancing any row. Returns (slots, C, h, w) in the UNet's dtype."""
        self._send_layout()
        timestep, input_scale = self._send_steps()
        sample = self._samples[self._position_rows] * input_scale.reshape(-1, 1, 1, 1)
        return self._denoiser.denoise(sample.to(self._dtype), timestep, self._context)

    def _advance(self, index: int, output: torch.Tensor) -> FinishedRow[Tag] | None:
        """Advance one row by one line of its table. Shapes depend on this row only, and so do the bytes."""
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
        return FinishedRow(row.tag, sample.reshape(self.latent_shape), time.perf_counter() - row.started)

    def _release(self, index: int) -> None:
        row = self._rows.pop(index)
        self._free_rows.append(index)
        self._free_positions.extend(row.positions)
        self._is_stale = True

    def _write_context(self, position: int, part: Context) -> None:
        for name, value in part.items():
            if name not in self._context:
                self._context[name] = torch.zeros(self.size, *value.shape, device=self._device, dtype=value.dtype)
            self._context[name][position] = value

    def _draw(self, row: _Row[Tag]) -> None:
        """Append the row's next noise to its history. The host draws it and does not wait until it is copied."""
        noise = draw_noise(self.latent_shape, row.generator, pinned=self._device.type == "cuda")
        row.history[row.known].copy_(noise.flatten(), non_blocking=True)
        row.known += 1

    def _send_layout(self) -> None:
        if not self._is_stale:
            return
        self._position_rows = self._send(self._row_at, torch.long)
        self._conditional, self._unconditional = self._send(self._positions_of, torch.long).unbind(1)
        self._scale, rescale = self._send(self._guidance, torch.float32).unbind(1)
        has_rescale = any(self._guidance[index][1] > 0 for index in self._rows)
        self._rescale = rescale if has_rescale else None
        self._is_stale = False

    def _send_steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the timestep and input scale of each position. Free positions compute at timestep 0, unread.

        Both are contiguous: torch.compile would compile once more for a timestep with gaps.
        """
        timesteps, input_scales = [0.0] * self.size, [1.0] * self.size
        for row in self._rows.values():
            for position in row.positions:
                timesteps[position] = row.table.timesteps[row.step]
                input_scales[position] = row.table.input_scale[row.step]
        timestep, input_scale = self._send([timesteps, input_scales], torch.float32).unbind(0)
        return timestep, input_scale

    def _send(self, values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        return copy_to(self._device, torch.tensor(values, dtype=dtype))
