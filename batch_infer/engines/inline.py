"""Render with one worker in this process. If the worker fails, the run ends."""

from __future__ import annotations

import time
from collections.abc import Sequence

from batch_infer.autotune import detect_device
from batch_infer.engines.ledger import prefetch_first
from batch_infer.engines.protocol import OnCommit, OnReady, Stop, Task, TaskReport
from batch_infer.engines.worker_process import loading
from batch_infer.records import ResultRow
from batch_infer.settings import Device
from batch_infer.stopping import deferred
from batch_infer.worker import Worker, format_worker_name, load_chain


class InlineEngine:
    """Renders in this process, which suits a debugger, a notebook, or a system where worker processes cannot start."""

    worker_count = 1

    def __init__(self, requested_device: str) -> None:
        self._requested_device = requested_device

    def detect_device(self) -> Device:
        return detect_device(self._requested_device)

    def render(self, task: Task, on_commit: OnCommit, stop: Stop, on_ready: OnReady = lambda: None) -> TaskReport:
        with loading(task.settings):
            worker = Worker(task.settings, format_worker_name(0), load_chain, stop)
        requests = prefetch_first(task.requests)
        started = time.monotonic()
        on_ready()

        def report_commit(rows: Sequence[ResultRow]) -> None:
            on_commit(rows)
            task.on_report(TaskReport([worker.report()], time.monotonic() - started))

        with deferred():
            worker.render(requests, report_commit)
        seconds = time.monotonic() - started  # before the final report, which takes time to count FLOPs
        return TaskReport([worker.report(final=True)], seconds)

    def __enter__(self) -> InlineEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass
