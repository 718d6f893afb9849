"""Prepare a run and execute it: open tables, find the model, lock OUT, and start the engine and the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock

from batch_infer.autotune import Probe
from batch_infer.engines import RankInfo, check_engine, join_launch, make_engine, read_rank_info, remove_rendezvous
from batch_infer.errors import SettingsError, StoppedError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.compute import choose_actor_threads
from batch_infer.jobs.execution import RunExecution
from batch_infer.jobs.job import Job, find_model, make_paths_absolute, open_tables, prepare
from batch_infer.jobs.progress import Progress
from batch_infer.jobs.recovery import recover
from batch_infer.jobs.run_json import ended_cleanly
from batch_infer.jobs.selection import ALL_UNFINISHED, LOST, RowSelection
from batch_infer.jobs.signing import check_sign_key
from batch_infer.jobs.summary import Summary
from batch_infer.models import ModelCard
from batch_infer.provenance import check_marks
from batch_infer.settings import RunSettings
from batch_infer.stopping import deferred
from batch_infer.store import Store, log_handler, open_store

WAIT_SECONDS = 0.2
"""Seconds between two checks whether to stop while another thread of this process renders."""
_rendering = Lock()

log = logging.getLogger("batch_infer")


def render_tables(
    settings: RunSettings,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
    selection: RowSelection = ALL_UNFINISHED,
) -> Summary:
    """Render the tables into OUT, continuing earlier runs unless --overwrite is given. Raises BatchInferError."""
    with _in_turn(stop):
        return _render_tables(settings, progress, stop, selection)


@contextmanager
def _in_turn(stop: Callable[[], bool]) -> Iterator[None]:
    """Let the threads of this process render one after another.

    They share the logger, and libraries cannot load models in several threads at the same time.
    """
    is_held = False
    try:
        with deferred():  # so that a stop does not come between taking the lock and noting it
            while not (is_held := _rendering.acquire(timeout=WAIT_SECONDS)):
                if stop():
                    raise StoppedError("stopped while another thread of this process rendered; run again")
        yield
    finally:
        if is_held:
            _rendering.release()


def _render_tables(
    settings: RunSettings, progress: Progress, stop: Callable[[], bool], selection: RowSelection
) -> Summary:
    started = time.monotonic()
    settings = make_paths_absolute(settings)
    check_sign_key(settings.output.sign_key)
    check_marks(settings.output.provenance)
    rank = _read_rank(settings)
    if rank is not None and rank.rank:
        raise SettingsError("this command does not run under a launcher: start it once, by itself")
    unlocked_store = open_store(settings.out)  # before the model is downloaded, so that an unsuitable URL is refused
    with open_tables(settings) as tables:
        card = _find_model(settings)
        with outdir.locked(unlocked_store) as store:
            existing = outdir.read_run(store)
            remove_rendezvous(store)  # left by a killed run
            with make_engine(settings, choose_actor_threads(settings, existing), rank, store) as engine:
                job = prepare(settings, store, existing, tables, card, engine.detect_device())
                with _run_log(store):
                    execution = RunExecution(job, engine, progress, stop, _recover_if_needed(job, selection))
                    return execution.execute(started)


def _find_model(settings: RunSettings) -> ModelCard:
    """Return the model's card. Unless this process itself renders, it does not import torch for this."""
    if settings.compute.processes == 0:
        return find_model(settings)
    with Probe() as probe:
        return find_model(settings, probe.inspect_pipeline)


def join_run(settings: RunSettings, stop: Callable[[], bool] = lambda: False) -> bool:
    """Render for rank 0 and return True if a launcher started this process as a higher rank, else return False.

    Raises BatchInferError.
    """
    settings = make_paths_absolute(settings)
    rank = _read_rank(settings)
    if rank is None or not rank.rank:
        return False
    log.setLevel(logging.WARNING)  # rank 0 already logs notes on the settings
    join_launch(rank, settings.model.device, open_store(settings.out), find_model(settings), stop)
    return True


def _read_rank(settings: RunSettings) -> RankInfo | None:
    rank = read_rank_info()
    check_engine(settings, rank)
    return rank


def _recover_if_needed(job: Job, selection: RowSelection) -> RowSelection:
    """Recover OUT if the earlier run did not end cleanly, unless --overwrite is given.

    Return the selection with the images that are missing or damaged.
    """
    if job.settings.overwrite or ended_cleanly(job.earlier):
        return selection
    missing = recover(job.store, job.record["recover_from"])
    # Call the rule with missing images too: it may count the rows.
    return replace(
        selection,
        skip=lambda item, committed: selection.skip(item, committed) and item.key not in missing,
        explain=lambda item, committed: LOST if item.key in missing else selection.explain(item, committed),
    )


@contextmanager
def _run_log(store: Store) -> Iterator[None]:
    """Also write the log to a file in OUT, with all levels.

    In a Python program, the loggers above this one still receive only the levels that they would have received.
    """
    level, propagates = log.level, log.propagate
    with store.open_log("logs/run.log") as file:
        handlers = [log_handler(file)]
        if propagates and log.parent is not None:
            handlers.append(_Forwarder(log.parent, log.getEffectiveLevel()))
        for handler in handlers:
            log.addHandler(handler)
        log.setLevel(logging.DEBUG)
        log.propagate = False
        try:
            yield
        finally:
            log.setLevel(level)
            log.propagate = propagates
            for handler in handlers:
                log.removeHandler(handler)


class _Forwarder(logging.Handler):
    """Passes records from a level on to another logger."""

    def __init__(self, target: logging.Logger, level: int) -> None:
        super().__init__(level)
        self._target = target

    def emit(self, record: logging.LogRecord) -> None:
        if self._target.hasHandlers():  # otherwise logging would print the record
            self._target.callHandlers(record)
