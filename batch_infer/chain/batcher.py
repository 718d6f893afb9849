"""Define what a step-level batcher is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from batch_infer.chain.base import Stage, UnrenderedRow
from batch_infer.diffusion import FinishedRow
from batch_infer.records import PromptRequest

if TYPE_CHECKING:
    from batch_infer.models import Conditioning

Tag: TypeAlias = "tuple[PromptRequest, Conditioning]"
Advanced: TypeAlias = "Sequence[FinishedRow[Tag] | UnrenderedRow]"
"""Rows that are ready for postprocessing, and rows that have failed."""


class Batcher(Protocol):
    """Denoises rows of one image size, each at its own step, in calls of a fixed batch size.

    Rows are prepared (their prompts are encoded), wait until slots are free, are admitted, and advance with each tick.
    """

    stage: Stage
    """The stage that is running, whose batch size shrinks first if memory runs out now."""

    @property
    def room(self) -> int:
        """How many rows to prepare now. 0 if enough rows are waiting."""
        ...

    @property
    def is_waiting(self) -> bool:
        """Whether rows wait to be admitted."""
        ...

    @property
    def is_denoising(self) -> bool:
        """Whether there are admitted rows to denoise."""
        ...

    def prepare(self, requests: Sequence[PromptRequest]) -> None:
        """Encode the prompts of rows, which then wait to be admitted."""
        ...

    def admit(self) -> Sequence[UnrenderedRow]:
        """Admit waiting rows, as far as slots are free, and return rows that the model or scheduler rejects."""
        ...

    def compile(self) -> None:
        """Compile the networks for these batch sizes by calling them without advancing the rows, and wait."""
        ...

    def tick(self) -> Advanced:
        """Advance admitted rows by one denoiser call."""
        ...

    def finish(self) -> Advanced:
        """Wait for the device, and return rows that are denoised but not returned yet."""
        ...

    def close(self) -> None:
        """Drop all rows."""
        ...
