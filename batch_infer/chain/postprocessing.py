"""From finished latents to checked pixels, in micro-batches of a fixed size."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from batch_infer.chain.base import RenderedImage, RowOutcome, UnrenderedRow
from batch_infer.chain.pacing import stream_for
from batch_infer.diffusion import FinishedRow
from batch_infer.records import PromptRequest, Verdict
from batch_infer.safety import ImageChecker
from batch_infer.stages import Stages

if TYPE_CHECKING:
    from batch_infer.models import Conditioning, LatentDiffusion

Tag: TypeAlias = "tuple[PromptRequest, Conditioning]"

MICRO_BATCHES_AHEAD = 2
"""The least number of micro-batches that may wait for the decoder. See `Postprocessing.micro_batches_ahead`."""


class Postprocessing:
    """Decodes and checks finished rows.

    On a GPU this runs in background, on its own thread and stream, so that the next UNet call never waits for it. On a
    CPU it runs in the calling thread: a second torch thread would only compete for the same cores.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        checker: ImageChecker | None,
        batch_sizes: tuple[int, int],
        stages: Stages,
        *,
        in_background: bool,
    ) -> None:
        """`batch_sizes`: the slots, which are reported with each image, and the size of a micro-batch."""
        self._model, self._checker, self._stages = model, checker, stages
        self.slots, self._batch = batch_sizes
        self._rows: list[FinishedRow[Tag]] = []
        """Rows for which no micro-batch is full yet."""
        self.micro_batches_ahead = max(MICRO_BATCHES_AHEAD, 2 * self.slots // self._batch)
        """Micro-batches between the UNet and the decoder. Beyond this the UNet waits.

        Rows of equal steps finish in one call: there must be room for all of them while those of the call before are
        still being decoded. What waits are latents, 64 kB for an image of 512x512 pixels.
        """
        self._futures: deque[Future[list[RowOutcome]]] = deque()
        self._pool = ThreadPoolExecutor(1, "postprocessing") if in_background else None
        self._stream = stream_for(model.device, "postprocess")

    def compile(self, latent_shape: tuple[int, int, int]) -> None:
        """Compile the decoder in this thread: torch must not compile while another thread calls compiled code."""
        with torch.inference_mode():
            self._model.decode(torch.zeros(self._batch, *latent_shape, device=self._model.device))

    def add(self, rows: Sequence[FinishedRow[Tag]]) -> Iterator[list[RowOutcome]]:
        """Add rows, and yield the outcomes of each micro-batch that is finished."""
        self._rows += rows
        while len(self._rows) >= self._batch:
            batch, self._rows = self._rows[: self._batch], self._rows[self._batch :]
            yield from self._start(batch)
        yield from self._finished(self.micro_batches_ahead)

    def finish(self) -> Iterator[list[RowOutcome]]:
        """Yield the outcomes of all rows that were added. The last micro-batch is padded."""
        if self._rows:
            batch, self._rows = self._rows, []
            yield from self._start(batch)
        yield from self._finished(0)

    def close(self) -> None:
        """Drop the rows that are unfinished."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._futures.clear()
        self._rows.clear()

    def _start(self, batch: list[FinishedRow[Tag]]) -> Iterator[list[RowOutcome]]:
        latents = torch.stack([row.latents for row in batch] + [batch[-1].latents] * (self._batch - len(batch)))
        if self._pool is None:
            yield self._process(batch, latents, None)
            return
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
            latents.record_stream(self._stream)
        self._futures.append(self._pool.submit(self._process, batch, latents, ready))

    def _finished(self, ahead: int) -> Iterator[list[RowOutcome]]:
        """Yield the outcomes of finished micro-batches, after waiting until at most `ahead` are unfinished."""
        while self._futures and (len(self._futures) > ahead or self._futures[0].done()):
            yield self._futures.popleft().result()

    def _process(
        self, batch: list[FinishedRow[Tag]], latents: torch.Tensor, ready: torch.cuda.Event | None
    ) -> list[RowOutcome]:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            if ready is not None and self._stream is not None:
                self._stream.wait_event(ready)
            images, are_finite = self._decode(latents, len(batch))
            verdicts = check_images(self._checker, images, self._batch, self._stages)
        self._stages.images += len(batch)
        outcomes: list[RowOutcome] = []
        for row, image, is_finite, verdict in zip(batch, images, are_finite, verdicts, strict=True):
            request, conditioning = row.tag
            if is_finite:
                outcomes.append(RenderedImage(request, image, verdict, conditioning, self.slots, row.seconds))
            else:
                outcomes.append(fail_not_finite(request, self._model.dtype))
        return outcomes

    @torch.inference_mode()
    def _decode(self, latents: torch.Tensor, count: int) -> tuple[list[np.ndarray], list[bool]]:
        started = time.perf_counter()
        decoded = to_pixels(self._model.decode(latents)[:count])
        self._stages.decode += time.perf_counter() - started
        return decoded


def check_images(
    checker: ImageChecker | None, images: Sequence[np.ndarray], batch: int, stages: Stages
) -> list[Verdict]:
    """Check images, at most `batch` at once. Without a checker the verdicts are empty."""
    if checker is None:
        return [Verdict()] * len(images)
    started = time.perf_counter()
    batches = [images[first : first + batch] for first in range(0, len(images), batch)]
    verdicts = [verdict for images in batches for verdict in checker.check(images)]
    stages.check += time.perf_counter() - started
    return verdicts


def to_pixels(images: torch.Tensor) -> tuple[list[np.ndarray], list[bool]]:
    """Return images (B, 3, H, W) from 0 to 1 as (H, W, 3) uint8 on the host, and whether each had finite values."""
    finite = torch.isfinite(images).flatten(1).all(1)
    images = images.nan_to_num().clamp(0, 1)
    # Rounded as in diffusers' image processor, half to even.
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    if pixels.is_cuda:
        # A copy to pinned memory waits for this stream only.
        pixels = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True).copy_(pixels, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return [image.copy() for image in pixels.numpy()], finite.tolist()
    return list(pixels.numpy()), finite.tolist()


def fail_not_finite(request: PromptRequest, dtype: torch.dtype) -> UnrenderedRow:
    """Return the failure of a row whose image has values that are not finite."""
    params = request.params
    advice = "" if dtype == torch.float32 else ", or compute with --dtype float32"
    error = (
        f"the model's output is not finite at {params.num_inference_steps} steps and guidance_scale "
        f"{params.guidance_scale:g}; try other values{advice}"
    )
    return UnrenderedRow(request, "failed", error)
