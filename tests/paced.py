"""Run the command at a pace set by environment variables: `python -m tests.paced run TABLE ...`.

PACE_ROWS: images per manifest part, 1 by default. PACE_SECONDS: pause of a worker after each image. PACE_HOLD: a worker
renders this many images and then hangs until it is stopped or killed. PACE_MEET (a folder) and PACE_WORKERS: a worker
waits after its first image until this many workers have rendered one, so that each of them gets rows.

Worker processes import this main module, which batch-infer would hide from them, so the variables apply to them too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from batch_infer.__main__ import main
from batch_infer.chain import RenderedImage, UnrenderedRow
from batch_infer.engines import handle
from batch_infer.records import PromptRequest
from batch_infer.sinks import CommitLimits
from batch_infer.sinks.sharded import ShardedSink
from batch_infer.worker import committing, loading
from tests.dummies import meet

MODULE = ("-m", "tests.paced")


class PacedChain:
    """A chain that pauses after each image."""

    def __init__(self, chain: Any, stop: Callable[[], bool]) -> None:
        self._chain, self._stop = chain, stop
        self._seconds = float(os.environ.get("PACE_SECONDS", "0"))
        self._left = int(os.environ.get("PACE_HOLD", "-1"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chain, name)

    def render(self, requests: Iterable[PromptRequest]) -> Iterator[RenderedImage | UnrenderedRow]:
        for outcome in self._chain.render(requests):
            yield outcome
            if folder := os.environ.get("PACE_MEET"):
                meet(Path(folder), int(os.environ["PACE_WORKERS"]))
            self._left -= 1
            time.sleep(self._seconds)
            while not self._left and not self._stop():
                time.sleep(0.01)


def pace() -> None:
    load = loading.load_chain

    def load_paced(card: Any, compute: Any, safety: Any, stop: Callable[[], bool] = lambda: False) -> Any:
        return PacedChain(load(card, compute, safety, stop), stop)

    loading.load_chain = load_paced
    committing.COMMIT_ROWS = int(os.environ.get("PACE_ROWS", "1"))
    vars(handle)["main_module_hidden"] = nullcontext
    ShardedSink.commit_limits = CommitLimits(committing.COMMIT_ROWS, committing.COMMIT_SECONDS)


if __name__ in ("__main__", "__mp_main__"):
    pace()
if __name__ == "__main__":
    main()
