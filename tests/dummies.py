"""A dummy chain for worker processes: it makes images at no cost, and some prompts kill its process.

Like a real chain, it takes several rows at once, which are all lost if the process dies.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from batch_infer.chain import BatchSizes, DeviceChain, RenderedImage, RowOutcome
from batch_infer.records import PromptRequest, Verdict
from batch_infer.stages import Stages

BATCH_ROWS = 8
BATCH_SECONDS = 0.1


class DummyChain(DeviceChain):
    """Gives every row an image of one grey level, its seed. A batch of rows takes `seconds`."""

    def __init__(self, stop: Callable[[], bool], seconds: float = 0.0) -> None:
        model = SimpleNamespace(networks=(), use_lora=lambda lora: None, uses_pipeline_call=False)
        super().__init__(model, BatchSizes(2 * BATCH_ROWS, BATCH_ROWS), None, stop)
        self._seconds = seconds

    def _render_next(self, requests: Any, first: PromptRequest, stages: Stages) -> Iterator[list[RowOutcome]]:
        batch = requests.take(first.group_key, BATCH_ROWS)
        for request in batch:
            _execute(request.prompt)
        yield self._make(batch, stages)

    def _make(self, batch: list[PromptRequest], stages: Stages) -> list[RowOutcome]:
        started = time.perf_counter()
        time.sleep(self._seconds)
        stages.images, stages.ticks = stages.images + len(batch), stages.ticks + len(batch)
        stages.row_forwards, stages.slot_ticks = stages.row_forwards + len(batch), stages.slot_ticks + len(batch)
        conditioning: Any = SimpleNamespace(prompt_tokens=1, prompt_truncated=False)
        outcomes: list[RowOutcome] = []
        for request in batch:
            pixels = np.full((request.params.height, request.params.width, 3), request.seed % 251, np.uint8)
            seconds = time.perf_counter() - started
            outcomes.append(RenderedImage(request, pixels, Verdict(), conditioning, self.batch_sizes.slots, seconds))
        return outcomes


def _execute(prompt: str) -> None:
    """Execute the command in a prompt, for example kill this process."""
    match prompt.split():
        case ["die", "by", name]:
            os.kill(os.getpid(), getattr(signal, name))
        case ["raise", word]:
            raise RuntimeError(f"the device said {word}")
        case ["hang"]:
            time.sleep(3600)
        case ["die", "once", marker]:
            try:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)


def load(card: Any, compute: Any, safety: Any, stop: Callable[[], bool]) -> Any:
    return DummyChain(stop)


def meet(folder: Path, count: int) -> None:
    """Wait until `count` processes have called this with the same folder."""
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < count:
        time.sleep(0.01)


def load_together(card: Any, compute: Any, safety: Any, stop: Callable[[], bool]) -> Any:
    """Wait until two workers are loading, and return a chain that is so slow that each worker gets rows."""
    meet(Path(os.environ["MEET"]), 2)
    return DummyChain(stop, seconds=BATCH_SECONDS)


def load_waiting(card: Any, compute: Any, safety: Any, stop: Callable[[], bool]) -> Any:
    """Return a chain that, like one on a GPU, takes time for a batch of rows but no CPU time."""
    return DummyChain(stop, seconds=BATCH_SECONDS)


def load_noisy(card: Any, compute: Any, safety: Any, stop: Callable[[], bool]) -> Any:
    """Write to stdout, stderr, file descriptor 2, warnings and logging, as libraries do."""
    print("on stdout")
    print("on stderr", file=sys.stderr)
    os.write(2, b"by C\n")
    warnings.warn("old settings", FutureWarning, stacklevel=1)
    logging.getLogger("somebody.else").warning("advice")
    return DummyChain(stop)


def load_broken(card: Any, compute: Any, safety: Any, stop: Callable[[], bool]) -> Any:
    raise RuntimeError("no such weights")


def load_dying_once(card: Any, compute: Any, safety: Any, stop: Callable[[], bool]) -> Any:
    """Kill the first process that loads, and create the file that the environment variable DIED names."""
    died = Path(os.environ["DIED"])
    if not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return DummyChain(stop)


def load_dying(card: Any, compute: Any, safety: Any, stop: Callable[[], bool]) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)
