"""Rate limit and retries for Azure AI Content Safety, both ended by a stop of the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeAlias

from pyrate_limiter import Limiter, Rate
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential, wait_random

from batch_infer.errors import FailedRowError, ServiceError, StoppedError
from batch_infer.safety.payloads import SERVICE, Analysis, Kind, NoAnswerError
from batch_infer.settings import ServiceSettings

FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0
BACKOFF = wait_exponential(FIRST_WAIT, LONGEST_WAIT) + wait_random(0, FIRST_WAIT)
WINDOW, COUNTED = 10.5, 10.0
"""Seconds. The service counts in windows of 10 s, and requests may arrive closer together than they were sent."""
POLL_SECONDS = 0.05
"""How often a wait checks whether the run stops."""

Attempt: TypeAlias = Callable[[], Analysis]
"""Sends one request. Raises NoAnswerError if it may be sent again."""


class RetryingClient:
    """Sends requests until they are answered. Threads share the rate limit and the time of the last answer."""

    def __init__(self, settings: ServiceSettings, stop: Callable[[], bool]) -> None:
        self._settings, self._stop = settings, stop
        self._limiter = Limiter(make_rate(settings.requests_per_second))
        self._answered_at: dict[Kind, float] = {}

    def call(self, kind: Kind, attempt: Attempt, probe: Attempt) -> Analysis:
        """Return the result of an attempt, which is repeated for at least `timeout_seconds` seconds.

        `probe` sends a harmless request of the same kind, to distinguish a bad row from a service that is down. Raises
        FailedRowError if only this request is not answered, ServiceError if none is, and StoppedError.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(NoAnswerError),
            wait=self._seconds_to_wait,
            stop=lambda state: self._gives_up(state, kind),
            sleep=self._sleep_before_retry,
            reraise=True,
        )
        self._acquire()
        started = time.monotonic()
        try:
            return retrying(self._attempt, kind, attempt)
        except NoAnswerError as error:
            tried = time.monotonic() - started
            if self._silence(kind) < self._settings.timeout_seconds or self._is_answered(kind, probe):
                raise FailedRowError(f"{SERVICE} gave no answer on this row's {kind} ({error})") from error
            raise ServiceError(
                f"{SERVICE} at {self._settings.endpoint} has not answered for {tried:.0f} s (last: {error});"
                " finished images are kept. Run the same command again to continue"
            ) from error

    def close(self) -> None:
        self._limiter.close()

    def _attempt(self, kind: Kind, attempt: Attempt) -> Analysis:
        """Make an attempt and note the time if the service answers, if only by refusing this request."""
        try:
            analysis = attempt()
        except FailedRowError:
            self._answered_at[kind] = time.monotonic()
            raise
        self._answered_at[kind] = time.monotonic()
        return analysis

    def _silence(self, kind: Kind) -> float:
        """Return the seconds since the service last answered a request of this kind from any thread."""
        return time.monotonic() - self._answered_at.get(kind, -math.inf)

    def _seconds_to_wait(self, state: RetryCallState) -> float:
        """Return the seconds before the next attempt, limited to what is left of `timeout_seconds`."""
        error = state.outcome.exception() if state.outcome else None
        retry_after = error.retry_after if isinstance(error, NoAnswerError) else None
        seconds = BACKOFF(state) if retry_after is None else max(retry_after, FIRST_WAIT)
        left = self._settings.timeout_seconds - (state.seconds_since_start or 0)
        return min(seconds, left if left > 0 else self._settings.timeout_seconds)

    def _gives_up(self, state: RetryCallState, kind: Kind) -> bool:
        """Return whether `timeout_seconds` is over and the cause is known.

        If the last answer to another request is neither recent nor long ago, the service may have failed since.
        Retries then continue until it has been silent for `timeout_seconds` seconds, so that no row is blamed for it.
        """
        timeout = self._settings.timeout_seconds
        return (state.seconds_since_start or 0) >= timeout and not timeout / 2 <= self._silence(kind) < timeout

    def _is_answered(self, kind: Kind, probe: Attempt) -> bool:
        self._acquire()
        try:
            self._attempt(kind, probe)
        except NoAnswerError:
            return False
        except FailedRowError:
            pass
        return True

    def _acquire(self) -> None:
        """Wait until the rate limit allows another request."""
        self._raise_if_stopped()
        # Not with blocking=True, which no stop ends.
        while self._limiter.try_acquire(SERVICE, blocking=False) is not True:
            self._sleep(POLL_SECONDS)

    def _sleep_before_retry(self, seconds: float) -> None:
        self._sleep(seconds)
        self._acquire()

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._raise_if_stopped()
            time.sleep(min(left, POLL_SECONDS))

    def _raise_if_stopped(self) -> None:
        if self._stop():
            raise StoppedError(f"stopped while waiting for {SERVICE}; run the same command again to continue")


def make_rate(per_second: float) -> Rate:
    """Return a count per window of ten seconds, or one request per longer window."""
    count = int(per_second * COUNTED)
    return Rate(max(count, 1), math.ceil(1000 * (WINDOW if count else WINDOW / COUNTED / per_second)))
