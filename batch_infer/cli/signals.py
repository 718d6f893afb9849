"""What stops a command: SIGINT, SIGTERM, SIGHUP and --time-limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from batch_infer.cli.logs import log_error, stop_log
from batch_infer.cli.report import duration, number
from batch_infer.errors import Interrupted
from batch_infer.stopping import TIME_LIMIT, Stopper, StopRequested
from batch_infer.store import remove_unfinished

RESUME = "what was committed is kept. Run the same command again to continue"
NOTHING_KEPT = "nothing is kept. Run the same command again"


@contextmanager
def stoppable(time_limit: float | None = None, *, hint: str = RESUME) -> Iterator[Stopper]:
    """End a command early where a signal or the time limit stops it; the signals have their old meaning afterwards.

    `hint` says what is kept and what to do. Raises Interrupted.
    """
    stop = Stopper(time_limit, hint, announce=_announce, farewell=_say_farewell, clean_up=remove_unfinished)
    try:
        with stop:
            yield stop
    except StopRequested:
        raise stop.error() from None


def report_time_limit(stop: Stopper, left: int) -> None:
    """Say that the time limit stopped the command, if it did and `left` images are not done."""
    if stop.reason == TIME_LIMIT and left and stop.time_limit is not None:
        stop_log.warning(
            "the time limit of %s came, and %s left: run the same command again to continue",
            duration(stop.time_limit),
            f"{number(left, 'image')} {'is' if left == 1 else 'are'}",
            extra={"left": left},
        )


def _announce() -> None:
    stop_log.warning("stopping; finished images are being committed (Ctrl-C again: at once)")


def _say_farewell(sentence: str) -> None:
    log_error(sentence, Interrupted.exit_code)
