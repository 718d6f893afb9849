"""From finished latents to judged pixels, in micro-batches of one fixed size."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from batch_infer.chain.outcomes import Rendered, Unrendered, not_finite
from batch_infer.chain.streams import stream_of
from batch_infer.diffusion import Finished
from batch_infer.records import PromptRequest, Verdict
from batch_infer.safety import ImageChecker
from batch_infer.stages import Stages

if TYPE_CHECKING:
    from batch_infer.models import Conditioning, LatentDiffusion

Tag: TypeAlias = "tuple[PromptRequest, Conditioning]"

BATCHES_AHEAD = 2
"""Micro-batches that may always wait for the decoder. See `Finishing.batches_ahead`."""


class Finishing:
    """Decodes and judges finished rows.

    On a GPU that is done on a thread and a stream of its own, so that the UNet's next call never waits for it. On a
    CPU it is done where it is asked for: the CPU is the device, and a second torch thread would only fight the first
    for its cores.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        checker: ImageChecker | None,
        shape: tuple[int, int],
        stages: Stages,
        *,
        in_background: bool,
    ) -> None:
        """`shape`: the slots of the UNet, and the size of a micro-batch. `in_background`: on a thread of its own."""
        self._model, self._checker, self.stages = model, checker, stages
        self.slots, self._batch = shape
        self._collected: list[Finished[Tag]] = []
        self.batches_ahead = max(BATCHES_AHEAD, 2 * self.slots // self._batch)
        """Micro-batches between the UNet and the decoder; beyond this the UNet waits.

        Rows of equal steps finish at one tick: there must be room for all of them while those of the tick before are
        still being decoded. What waits are latents, 64 kB for an image of 512x512 pixels.
        """
        self._under_way: deque[Future[list[Rendered | Unrendered]]] = deque()
        self._pool = ThreadPoolExecutor(1, "finishing") if in_background else None
        self._stream = stream_of(model.device, "finish")

    def prepare(self, latent_shape: tuple[int, int, int]) -> None:
        """Compile the decoder here: torch must not compile on one thread while another calls compiled code."""
        with torch.inference_mode():
            self._model.decode(torch.zeros(self._batch, *latent_shape, device=self._model.device))

    def add(self, rows: Sequence[Finished[Tag]]) -> Iterator[Rendered | Unrendered]:
        """Take rows in; gives those that are through."""
        self._collected += rows
        while len(self._collected) >= self._batch:
            batch, self._collected = self._collected[: self._batch], self._collected[self._batch :]
            yield from self._begin(batch)
        yield from self._through(self.batches_ahead)

    def finish(self) -> Iterator[Rendered | Unrendered]:
        """Give all that was taken in, the last micro-batch padded."""
        if self._collected:
            batch, self._collected = self._collected, []
            yield from self._begin(batch)
        yield from self._through(0)

    def close(self) -> None:
        """Give up what is not through."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._under_way.clear()
        self._collected.clear()

    def _begin(self, batch: list[Finished[Tag]]) -> Iterator[Rendered | Unrendered]:
        latents = torch.stack([row.latents for row in batch] + [batch[-1].latents] * (self._batch - len(batch)))
        if self._pool is None:
            yield from self._finish(batch, latents, None)
            return
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
            latents.record_stream(self._stream)
        self._under_way.append(self._pool.submit(self._finish, batch, latents, ready))

    def _through(self, ahead: int) -> Iterator[Rendered | Unrendered]:
        """Those that are through; waits while more than `ahead` micro-batches are not."""
        while self._under_way and (len(self._under_way) > ahead or self._under_way[0].done()):
            yield from self._under_way.popleft().result()

    def _finish(
        self, batch: list[Finished[Tag]], latents: torch.Tensor, ready: torch.cuda.Event | None
    ) -> list[Rendered | Unrendered]:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            if ready is not None and self._stream is not None:
                self._stream.wait_event(ready)
            pixels, whole = self._decode(latents, len(batch))
            verdicts = self._check(pixels)
        self.stages.images += len(batch)
        return [
            self._outcome(row, image, verdict) if finite else self._failed(row)
            for row, image, finite, verdict in zip(batch, pixels, whole, verdicts, strict=True)
        ]

    def _outcome(self, row: Finished[Tag], image: np.ndarray, verdict: Verdict) -> Rendered:
        request, conditioning = row.tag
        return Rendered(request, image, verdict, conditioning, self.slots, row.seconds)

    def _failed(self, row: Finished[Tag]) -> Unrendered:
        request = row.tag[0]
        return Unrendered(request, "failed", not_finite(request.params, self._model.dtype))

    @torch.inference_mode()
    def _decode(self, latents: torch.Tensor, count: int) -> tuple[list[np.ndarray], list[bool]]:
        started = time.perf_counter()
        found = to_pixels(self._model.decode(latents)[:count])
        self.stages.decode += time.perf_counter() - started
        return found

    def _check(self, pixels: list[np.ndarray]) -> list[Verdict]:
        if self._checker is None:
            return [Verdict()] * len(pixels)
        started = time.perf_counter()
        verdicts = self._checker.check(pixels)
        self.stages.check += time.perf_counter() - started
        return verdicts


def to_pixels(images: torch.Tensor) -> tuple[list[np.ndarray], list[bool]]:
    """Images (B, 3, H, W), 0 black and 1 white, as (H, W, 3) uint8 on the host, and which of them were finite."""
    finite = torch.isfinite(images).flatten(1).all(1)
    images = images.nan_to_num().clamp(0, 1)
    # Rounded as diffusers' image processor does, half to even.
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    if pixels.is_cuda:
        # From pinned memory the copy waits for this stream alone.
        pixels = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True).copy_(pixels, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return [image.copy() for image in pixels.numpy()], finite.tolist()
    return list(pixels.numpy()), finite.tolist()
