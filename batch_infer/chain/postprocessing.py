"""Decode finished latents and check the images, in micro-batches of a fixed size."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from batch_infer.chain.base import RenderedImage, RowOutcome, UnrenderedRow
from batch_infer.chain.batcher import Tag
from batch_infer.chain.pacing import stream_for
from batch_infer.diffusion import FinishedRow
from batch_infer.records import PromptRequest, Verdict
from batch_infer.safety import ImageChecker
from batch_infer.stages import Stages

if TYPE_CHECKING:
    from batch_infer.models import AnyPipeline, LatentDiffusion

MIN_MICRO_BATCHES_AHEAD = 2


class Postprocessing:
    """Decodes and checks finished rows.

    With `in_background`, the default on a GPU, this happens on a separate thread, so that the next denoiser call does
    not wait for it. Otherwise it happens in the calling thread: on a CPU, a second torch thread would compete for the
    same cores. A GPU uses a separate stream in both cases.
    """

    def __init__(
        self,
        model: LatentDiffusion | AnyPipeline,
        checker: ImageChecker | None,
        batch_sizes: tuple[int, int],
        stages: Stages,
        *,
        in_background: bool,
    ) -> None:
        """`batch_sizes`: the slots, which are reported with the images, and the size of a micro-batch."""
        self._model, self._checker, self._stages = model, checker, stages
        self.slots, self._batch = batch_sizes
        self._rows: list[FinishedRow[Tag]] = []
        """Rows that wait until a micro-batch is full."""
        self.micro_batches_ahead = max(MIN_MICRO_BATCHES_AHEAD, 2 * self.slots // self._batch)
        """Maximum number of unfinished micro-batches. The next denoiser call waits if there are more.

        Rows that are admitted together and have equal step counts finish in one denoiser call. The queue has room for
        all of them while those of an earlier call are still being decoded. The latents of a waiting row take 64 KiB if
        they have 4x64x64 values.
        """
        self._futures: deque[Future[list[RowOutcome]]] = deque()
        self._pool = ThreadPoolExecutor(1, "postprocessing") if in_background else None
        self._stream = stream_for(model.device, "postprocess")

    def add(self, rows: Sequence[FinishedRow[Tag]]) -> Iterator[list[RowOutcome]]:
        """Add rows, and yield the outcomes of finished micro-batches."""
        self._rows += rows
        while len(self._rows) >= self._batch:
            yield from self._start()
        yield from self._take_finished(self.micro_batches_ahead)

    def finish(self) -> Iterator[list[RowOutcome]]:
        """Yield the outcomes of all remaining rows."""
        if self._rows:
            yield from self._start()
        yield from self._take_finished(0)

    def close(self) -> None:
        """Drop unfinished rows, after waiting for a micro-batch that is being processed."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._futures.clear()
        self._rows.clear()

    def _start(self) -> Iterator[list[RowOutcome]]:
        """Process or submit one micro-batch, padded with copies of its last row if it is not full."""
        batch, self._rows = self._rows[: self._batch], self._rows[self._batch :]
        latents = torch.stack([row.latents for row in batch] + [batch[-1].latents] * (self._batch - len(batch)))
        ready = None
        if self._stream is not None:
            ready = torch.cuda.current_stream().record_event()
            latents.record_stream(self._stream)
        if self._pool is None:
            yield self._process(batch, latents, ready)
            return
        self._futures.append(self._pool.submit(self._process, batch, latents, ready))

    def _take_finished(self, limit: int) -> Iterator[list[RowOutcome]]:
        """Yield outcomes of micro-batches in order: of those already finished, and of others until `limit` are left."""
        while self._futures and (len(self._futures) > limit or self._futures[0].done()):
            yield self._futures.popleft().result()

    def _process(
        self, batch: list[FinishedRow[Tag]], latents: torch.Tensor, ready: torch.cuda.Event | None
    ) -> list[RowOutcome]:
        # torch.cuda.stream(None) would initialize CUDA even if the device is a CPU.
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            if ready is not None:
                ready.wait()
            started = time.perf_counter()
            with torch.inference_mode():
                images, are_finite = to_pixels(self._model.decode(latents)[: len(batch)])
            self._stages.decode += time.perf_counter() - started
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


def check_images(
    checker: ImageChecker | None, images: Sequence[np.ndarray], batch: int, stages: Stages
) -> list[Verdict]:
    """Check images in calls with up to `batch` images. Without a checker, return empty verdicts."""
    if checker is None:
        return [Verdict()] * len(images)
    started = time.perf_counter()
    starts = range(0, len(images), batch)
    verdicts = [verdict for start in starts for verdict in checker.check(images[start : start + batch])]
    stages.check += time.perf_counter() - started
    return verdicts


def to_pixels(images: torch.Tensor) -> tuple[list[np.ndarray], list[bool]]:
    """Convert images (B, 3, H, W) to arrays (H, W, 3) uint8 on the host, and return whether each image is finite.

    In `images`, 0 is black and 1 is white, and other values are clipped to this range.
    """
    are_finite = torch.isfinite(images).flatten(1).all(1)
    images = images.nan_to_num().clamp(0, 1)
    # round() rounds half to even, like diffusers' image processor.
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    if pixels.is_cuda:
        # Copy to pinned memory, because such a copy waits only for this stream.
        pixels = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True).copy_(pixels, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return [image.copy() for image in pixels.numpy()], are_finite.tolist()
    return list(pixels.numpy()), are_finite.tolist()


def fail_not_finite(request: PromptRequest, dtype: torch.dtype) -> UnrenderedRow:
    """Return the outcome of a row whose image contains infinite values or NaN."""
    params = request.params
    advice = "" if dtype == torch.float32 else ", or compute with --dtype float32"
    error = (
        f"the model's output is not finite at {params.num_inference_steps} steps and guidance_scale "
        f"{params.guidance_scale:g}; try other values{advice}"
    )
    return UnrenderedRow(request, "failed", error)
