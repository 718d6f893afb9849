"""The inline engine: one worker in the command's own process, which nobody starts again where it dies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from batch_infer.autotune import explain_out_of_memory, find_device
from batch_infer.engines.ledger import primed
from batch_infer.engines.protocol import Task, TaskReport
from batch_infer.engines.worker_process import loading
from batch_infer.records import ResultRow
from batch_infer.settings import Device
from batch_infer.stopping import deferred
from batch_infer.worker import Worker, format_worker_name, load_chain


class InlineEngine:
    """Renders here: for a debugger, a notebook, or where one process is all that there may be."""

    workers = 1

    def __init__(self, asked: str) -> None:
        """`asked`: the --device."""
        self._asked = asked

    def find_device(self) -> Device:
        return find_device(self._asked)

    def render(
        self,
        task: Task,
        committed: Callable[[Sequence[ResultRow]], None],
        stop: Callable[[], bool],
        ready: Callable[[], None] = lambda: None,
    ) -> TaskReport:
        try:
            with loading():
                worker = Worker(task.settings, format_worker_name(0), load_chain, stop)
        except torch.OutOfMemoryError as error:
            raise explain_out_of_memory(error) from error
        requests = primed(task.requests)
        began = time.monotonic()
        ready()
        with deferred():
            worker.render(requests, committed)
        seconds = time.monotonic() - began
        return TaskReport([worker.report(final=True)], seconds)

    def __enter__(self) -> InlineEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass
