"""How far the host runs ahead of its device, and what the device took: the host never waits for the call it made."""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

import torch

from batch_infer.stages import Stages

TICKS_AHEAD = 3
"""UNet calls that a GPU has been handed and has not finished: enough never to starve it, few enough to hold memory."""


class Pace(Protocol):
    """Is told when a UNet call is made; writes the seconds that it took into the stages."""

    def start(self) -> None: ...
    def end(self) -> None: ...
    def finish(self) -> None: ...


class HostPace:
    """Of a CPU: a call is over when it returns."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def start(self) -> None:
        self._started = time.perf_counter()

    def end(self) -> None:
        now = time.perf_counter()
        self._stages.began = min(self._stages.began, self._started)
        self._stages.ended = now
        self._stages.denoise += now - self._started

    def finish(self) -> None:
        pass


class StreamPace:
    """Of a GPU: a call is over when its events say so, and the host waits for one that it made some calls ago."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._began: float | None = None

    def start(self) -> None:
        if self._began is None:
            torch.cuda.current_stream().synchronize()  # once: the clock starts with the first call
            self._began = time.perf_counter()
            self._stages.began = min(self._stages.began, self._began)
        self._started = _recorded()

    def end(self) -> None:
        self._under_way.append((self._started, _recorded()))
        while len(self._under_way) > TICKS_AHEAD:
            self._wait()

    def finish(self) -> None:
        while self._under_way:
            self._wait()

    def _wait(self) -> None:
        started, ended = self._under_way.popleft()
        ended.synchronize()
        self._stages.denoise += started.elapsed_time(ended) / 1000
        self._stages.ended = time.perf_counter()


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def pace_of(device: torch.device, stages: Stages) -> Pace:
    return StreamPace(stages) if device.type == "cuda" else HostPace(stages)
