"""Provide CUDA streams for work that runs concurrently with the denoiser, and time and pace denoiser calls."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch

from batch_infer.records import PromptRequest
from batch_infer.stages import Stages

if TYPE_CHECKING:
    from batch_infer.models import Conditioning, LatentDiffusion

CALLS_AHEAD = 3
"""Maximum number of unfinished denoiser calls on a GPU when the host submits another one.

This is enough to keep the GPU busy, and few enough to limit memory.
"""


@cache
def stream_for(device: torch.device, purpose: Literal["encode", "postprocess"]) -> torch.cuda.Stream | None:
    """Return the stream for a purpose, or None on a CPU.

    Streams are reused, because torch caches freed memory per stream. They have high priority: their short kernels would
    otherwise queue behind the kernels of a whole denoiser call.
    """
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def encode_concurrently(model: LatentDiffusion, requests: Sequence[PromptRequest]) -> list[Conditioning]:
    """Encode prompts. On a GPU, a separate stream is used, so that small copies do not wait for denoiser calls.

    Later work on the denoiser's stream waits for the encoding to end, but the host need not.
    """
    stream = stream_for(model.device, "encode")
    if stream is None:
        return model.condition(requests)
    unet_stream = torch.cuda.current_stream()
    try:
        with torch.cuda.stream(stream):
            conditionings = model.condition(requests)
    finally:
        unet_stream.wait_stream(stream)
    for conditioning in conditionings:
        for part in conditioning.context:
            for tensor in (part or {}).values():
                if tensor.is_cuda:
                    tensor.record_stream(unet_stream)  # keeps its memory until the denoiser has read it
    return conditionings


class Pacer:
    """Adds the seconds of denoiser calls on a CPU, where a call is complete when it returns, to the stages."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def start(self) -> None:
        self._started = time.perf_counter()
        self._stages.started_at = min(self._stages.started_at, self._started)

    def end(self) -> None:
        self._stages.ended_at = time.perf_counter()
        self._stages.denoise += self._stages.ended_at - self._started

    def finish(self) -> None:
        """Wait for unfinished calls. On a CPU, there are none."""


class CudaPacer(Pacer):
    """Times calls with CUDA events. `end` blocks the host until at most CALLS_AHEAD calls are unfinished."""

    def __init__(self, stages: Stages) -> None:
        super().__init__(stages)
        self._unfinished: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self) -> None:
        if math.isinf(self._stages.started_at):
            torch.cuda.current_stream().synchronize()  # the span starts with this call, not with earlier work
            self._stages.started_at = time.perf_counter()
        self._event = _record_event()

    def end(self) -> None:
        self._unfinished.append((self._event, _record_event()))
        self._wait(CALLS_AHEAD)

    def finish(self) -> None:
        self._wait(0)

    def _wait(self, limit: int) -> None:
        """Wait until at most `limit` calls are unfinished, and add the seconds of the finished calls."""
        while len(self._unfinished) > limit:
            started, ended = self._unfinished.popleft()
            ended.synchronize()
            self._stages.denoise += started.elapsed_time(ended) / 1000
            self._stages.ended_at = time.perf_counter()


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def make_pacer(device: torch.device, stages: Stages) -> Pacer:
    return CudaPacer(stages) if device.type == "cuda" else Pacer(stages)
