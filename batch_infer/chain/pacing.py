"""CUDA streams and events: work besides the UNet on its own streams, and timing of UNet calls without waiting."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch

from batch_infer.stages import Stages

if TYPE_CHECKING:
    from batch_infer.models import Conditioning

CALLS_AHEAD = 3
"""UNet calls that are queued on a GPU and unfinished: enough never to starve it, few enough to hold memory."""


@cache
def stream_for(device: torch.device, purpose: Literal["encode", "postprocess"]) -> torch.cuda.Stream | None:
    """Return the stream for a purpose, or None on a CPU. It is always the same one: torch frees memory by stream.

    Both have a high priority: their kernels are short, and would otherwise queue behind those of a whole UNet call.
    """
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


class EncodeStream:
    """The stream on which prompts are encoded, so that its small copies wait for no UNet call. None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream = stream_for(device, "encode")

    @contextmanager
    def use(self) -> Iterator[None]:
        """Run the block on this stream. Later work on the UNet's stream waits for it, but the host does not."""
        if self._stream is None:
            yield
            return
        unet = torch.cuda.current_stream()
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            unet.wait_stream(self._stream)

    def keep_alive(self, conditioning: Conditioning) -> None:
        """Keep memory that was allocated on this stream from being reused before the UNet's stream has read it."""
        if self._stream is None:
            return
        for part in conditioning.context:
            for tensor in (part or {}).values():
                tensor.record_stream(torch.cuda.current_stream())


class Pacer:
    """Adds the seconds of UNet calls to the stages. On a CPU a call is complete when it returns."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def start(self) -> None:
        self._started = time.perf_counter()
        self._stages.started_at = min(self._stages.started_at, self._started)

    def end(self) -> None:
        self._stages.ended_at = time.perf_counter()
        self._stages.denoise += self._stages.ended_at - self._started

    def finish(self) -> None:
        """Wait for the calls that are unfinished."""


class CudaPacer(Pacer):
    """Times calls by CUDA events. The host waits only for calls that it made CALLS_AHEAD calls ago."""

    def __init__(self, stages: Stages) -> None:
        super().__init__(stages)
        self._unfinished: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._began: float | None = None

    def start(self) -> None:
        if self._began is None:
            torch.cuda.current_stream().synchronize()  # once: the clock starts with the first call
            self._began = time.perf_counter()
            self._stages.started_at = min(self._stages.started_at, self._began)
        self._event = _record_event()

    def end(self) -> None:
        self._unfinished.append((self._event, _record_event()))
        while len(self._unfinished) > CALLS_AHEAD:
            self._wait()

    def finish(self) -> None:
        while self._unfinished:
            self._wait()

    def _wait(self) -> None:
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
