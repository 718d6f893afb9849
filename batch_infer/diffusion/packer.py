"""Pack rows into a denoiser batch of fixed shape. A row can enter or leave the batch between any two denoiser calls.

A slot is one batch position. A row with guidance uses two slots, a row without guidance one. Rows with any step count,
guidance and progress share a denoiser call, and a finished row frees its slots for another row. Because the shape of
the batch never changes, the bytes of a row do not depend on its neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

import torch

from batch_infer.accelerator import copy_to
from batch_infer.diffusion.solver import CACHED_TABLES, CoefficientTable
from batch_infer.records import SamplingParams

Tag = TypeVar("Tag")
Context = Mapping[str, torch.Tensor]
"""Denoiser inputs other than sample and timestep, by argument name.

The tensors of a single slot's context have no batch dimension. Those passed to `denoise` have one.
"""


class Denoiser(Protocol):
    """Calls a denoiser: sample (N, C, h, w), timestep (N,), context tensors (N, ...) -> model output (N, C, h, w)."""

    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class FinishedRow(Generic[Tag]):
    """A row's tag, its final latents (C, h, w) float32, and the seconds from the row's admission to its last step."""

    tag: Tag
    latents: torch.Tensor
    seconds: float


@dataclass(slots=True)
class _Row(Generic[Tag]):
    """A row in the batch.

    `terms` (terms, elements) holds y of CoefficientTable. Its first `term_count` entries are known so far.
    `coefficients` are the table's, on the device. `guidance` is the scale and the rescale factor, and (1.0, 0.0)
    without guidance.
    """

    tag: Tag
    table: CoefficientTable
    coefficients: torch.Tensor
    terms: torch.Tensor
    generator: torch.Generator
    positions: tuple[int, ...]
    guidance: tuple[float, float]
    started: float
    step: int = 0
    term_count: int = 0


def draw_noise(shape: tuple[int, int, int], generator: torch.Generator, *, pinned: bool = False) -> torch.Tensor:
    """Draw unit normal noise (C, h, w) float32 from a row's CPU generator, in the same way as diffusers.

    With `pinned`, it is in page-locked memory, from which CUDA copies asynchronously.
    """
    return torch.randn(shape, generator=generator, dtype=torch.float32, pin_memory=pinned)


class Slots(Generic[Tag]):
    """Holds rows in `size` slots, for latents of one shape (C, h, w), on the denoiser's device.

    Samples and terms (initial noise, model outputs, noise drawn at later steps) are float32 for any denoiser dtype.
    With 4x64x64 latents, the terms of a row with 1,000 denoiser calls take 66 MB, or 131 MB with a draw after each.
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
        self._denoiser = denoiser
        self._device, self._dtype = device, dtype
        self._rows: dict[int, _Row[Tag]] = {}
        """Rows by first position. A row's entry in tensors such as `_samples` is also at its first position."""
        self._free_positions = list(range(size))
        self._samples = torch.zeros(size, *latent_shape, device=device)
        self._context: dict[str, torch.Tensor] = {}
        # A cache, so that rows with the same table share a copy. On a method, it would keep this object in memory.
        self._copy_to_device: Callable[[CoefficientTable], torch.Tensor] = lru_cache(CACHED_TABLES)(
            lambda table: copy_to(device, table.coefficients)
        )
        self._is_layout_stale = True

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
        """Add a row, for which there must be enough free slots.

        `context` has a conditional and, for a row with guidance, an unconditional part. Raises ValueError if the latter
        is missing.
        """
        positions = tuple(self._free_positions.pop(0) for _ in range(params.slots))
        for position, part in zip(positions, context, strict=False):
            if part is None:
                raise ValueError("a row with guidance needs an unconditional context")
            self._write_context(position, part)
        guidance = (params.guidance_scale, params.guidance_rescale) if params.uses_guidance else (1.0, 0.0)
        coefficients = self._copy_to_device(table)
        terms = torch.empty(coefficients.shape[1], self._samples[0].numel(), device=self._device)
        generator = torch.Generator("cpu").manual_seed(seed)
        row = _Row(tag, table, coefficients, terms, generator, positions, guidance, time.perf_counter())
        self._rows[positions[0]] = row
        self._draw(row)
        self._samples[positions[0]] = table.initial_scale * terms[0].reshape(self.latent_shape)
        self._is_layout_stale = True

    @torch.inference_mode()
    def tick(self) -> list[FinishedRow[Tag]]:
        """Make one denoiser call, advance each row by a line of its table, and return the finished rows."""
        output = self.evaluate().float()
        guided = guide(output[self._conditional], output[self._unconditional], self._scale, self._rescale)
        advanced = [self._advance(index, guided[index]) for index in list(self._rows)]
        return [finished for finished in advanced if finished is not None]

    @torch.inference_mode()
    def evaluate(self) -> torch.Tensor:
        """Call the denoiser without advancing rows. Return its output (slots, C, h, w) in the denoiser's dtype."""
        if self._is_layout_stale:
            self._send_layout()
        timestep, input_scale = self._send_steps()
        sample = self._samples[self._row_at] * input_scale.reshape(-1, 1, 1, 1)
        return self._denoiser.denoise(sample.to(self._dtype), timestep, self._context)

    def _advance(self, index: int, output: torch.Tensor) -> FinishedRow[Tag] | None:
        """Advance one row by one line of its table, and return it if it is finished.

        The shapes of all operations here depend only on this row, and so do the bytes of the result.
        """
        row = self._rows[index]
        row.terms[row.term_count] = output.flatten()
        row.term_count += 1
        for _ in range(row.table.draws[row.step]):
            self._draw(row)
        sum_of_terms = row.coefficients[row.step, : row.term_count] @ row.terms[: row.term_count]
        sample = sum_of_terms.reshape(self.latent_shape)
        row.step += 1
        if row.step < row.table.evaluations:
            self._samples[index] = sample
            return None
        del self._rows[index]
        self._free_positions.extend(row.positions)
        self._is_layout_stale = True
        return FinishedRow(row.tag, sample, time.perf_counter() - row.started)

    def _write_context(self, position: int, part: Context) -> None:
        for name, value in part.items():
            if name not in self._context:
                self._context[name] = torch.zeros(self.size, *value.shape, device=self._device, dtype=value.dtype)
            self._context[name][position] = value

    def _draw(self, row: _Row[Tag]) -> None:
        """Draw the row's next noise on the host and append it to the terms. The host does not wait for the copy."""
        noise = draw_noise(self.latent_shape, row.generator, pinned=self._device.type == "cuda")
        row.terms[row.term_count].copy_(noise.flatten(), non_blocking=True)
        row.term_count += 1

    def _send_layout(self) -> None:
        """Send to the device: for each position, the index of its row; for each row, its positions and guidance."""
        row_at, positions_of, guidance = [0] * self.size, [(0, 0)] * self.size, [(1.0, 0.0)] * self.size
        for index, row in self._rows.items():
            positions_of[index], guidance[index] = (row.positions[0], row.positions[-1]), row.guidance
            for position in row.positions:
                row_at[position] = index
        self._row_at = self._send(row_at, torch.long)
        self._conditional, self._unconditional = self._send(positions_of, torch.long).unbind(1)
        self._scale, rescale = self._send(guidance, torch.float32).unbind(1)
        self._rescale = rescale if any(factor > 0 for _, factor in guidance) else None
        self._is_layout_stale = False

    def _send_steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Send the timestep and input scale of each position to the device. Free positions get placeholders.

        Both tensors are contiguous, because torch.compile would compile again for a timestep with another stride.
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


def guide(
    conditional: torch.Tensor, unconditional: torch.Tensor, scale: torch.Tensor, rescale: torch.Tensor | None
) -> torch.Tensor:
    """Combine the two predictions of each row (Ho & Salimans, arXiv 2207.12598, eq. 6).

    conditional, unconditional (R, C, h, w); scale, rescale (R,). `rescale` (Lin et al., arXiv 2305.08891, section 3.4)
    is None if no row uses it. For a row without guidance, both predictions are the same and the scale is 1, so that
    u + s (c - u) is exactly c if c is finite.
    """
    guided = unconditional + scale.reshape(-1, 1, 1, 1) * (conditional - unconditional)
    if rescale is None:
        return guided
    dims = (1, 2, 3)
    ratio = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    factor = rescale.reshape(-1, 1, 1, 1)
    rescaled = factor * (guided * ratio) + (1 - factor) * guided
    # Use `where`, because multiplying a non-finite ratio by 0 gives NaN in rows without rescale.
    return torch.where(factor > 0, rescaled, guided)
