"""Limit the rate of requests to Azure AI Content Safety, and retry them. Waits between requests end on a stop."""

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

MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.5, 20.0
BACKOFF = wait_exponential(MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS) + wait_random(0, MIN_BACKOFF_SECONDS)
WINDOW_SECONDS, SERVICE_WINDOW_SECONDS = 10.5, 10.0
"""The window is longer than the service's, because requests may arrive at shorter intervals than they are sent."""
POLL_SECONDS = 0.05
"""Seconds between checks whether to stop."""

Attempt: TypeAlias = Callable[[], Analysis]
"""Sends one request and returns the response. Raises NoAnswerError if the request may be sent again."""


class RetryingClient:
    """Repeats requests that are not answered. Threads share the rate limit and the times of the last answers."""

    def __init__(self, settings: ServiceSettings, stop: Callable[[], bool]) -> None:
        self._settings, self._stop = settings, stop
        self._limiter = Limiter(make_rate(settings.requests_per_second))
        self._answered_at: dict[Kind, float] = {}

    def call(self, kind: Kind, attempt: Attempt, probe: Attempt) -> Analysis:
        """Send a request, repeat it for at least `timeout_seconds` if necessary, and return the response.

        `probe` sends a harmless request of the same kind, to distinguish a bad row from a service that is down. Raises
        FailedRowError if the service rejects this request or answers only others, ServiceError if it answers none,
        SettingsError if it rejects the credentials or settings, and StoppedError.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(NoAnswerError),
            wait=self._seconds_to_wait,
            stop=lambda state: self._gives_up(state, kind),
            sleep=self._acquire,
            reraise=True,
        )
        self._acquire()
        started = time.monotonic()
        try:
            return retrying(self._attempt, kind, attempt)
        except NoAnswerError as error:
            elapsed = time.monotonic() - started
            if self._seconds_since_answer(kind) < self._settings.timeout_seconds or self._is_answered(kind, probe):
                raise FailedRowError(f"{SERVICE} gave no answer for this row's {kind} ({error})") from error
            raise ServiceError(
                f"{SERVICE} at {self._settings.endpoint} has not answered for {elapsed:.0f} s (last: {error});"
                " finished images are kept. Run the same command again to continue"
            ) from error

    def close(self) -> None:
        self._limiter.close()

    def _attempt(self, kind: Kind, attempt: Attempt) -> Analysis:
        """Make an attempt, and store the time if the service answers or rejects only this request."""
        try:
            analysis = attempt()
        except FailedRowError:
            self._answered_at[kind] = time.monotonic()
            raise
        self._answered_at[kind] = time.monotonic()
        return analysis

    def _seconds_since_answer(self, kind: Kind) -> float:
        """Return the seconds since the service last answered a request of this kind from any thread, or infinity."""
        return time.monotonic() - self._answered_at.get(kind, -math.inf)

    def _seconds_to_wait(self, state: RetryCallState) -> float:
        """Return the seconds to wait before the next attempt.

        No wait that begins within `timeout_seconds` extends beyond them.
        """
        error = state.outcome.exception() if state.outcome else None
        retry_after = error.retry_after if isinstance(error, NoAnswerError) else None
        seconds = BACKOFF(state) if retry_after is None else max(retry_after, MIN_BACKOFF_SECONDS)
        remaining = self._settings.timeout_seconds - (state.seconds_since_start or 0)
        return min(seconds, remaining if remaining > 0 else self._settings.timeout_seconds)

    def _gives_up(self, state: RetryCallState, kind: Kind) -> bool:
        """Return whether `timeout_seconds` have passed and the cause is clear.

        If the last answer is at least half of `timeout_seconds` old, the service may be down. Retries then continue
        until it has not answered for `timeout_seconds`, so that an outage fails no row.
        """
        timeout, seconds = self._settings.timeout_seconds, self._seconds_since_answer(kind)
        return (state.seconds_since_start or 0) >= timeout and not timeout / 2 <= seconds < timeout

    def _is_answered(self, kind: Kind, probe: Attempt) -> bool:
        self._acquire()
        try:
            self._attempt(kind, probe)
        except NoAnswerError:
            return False
        except FailedRowError:
            pass
        return True

    def _acquire(self, delay: float = 0.0) -> None:
        """Wait `delay` seconds, then until the rate limit allows another request. Raises StoppedError."""
        ends_at = time.monotonic() + delay
        while True:
            if self._stop():
                raise StoppedError(f"stopped while waiting for {SERVICE}; run the same command again to continue")
            remaining = ends_at - time.monotonic()
            # Not with blocking=True, which would ignore a stop.
            if remaining <= 0 and self._limiter.try_acquire(SERVICE, blocking=False) is True:
                return
            time.sleep(min(remaining, POLL_SECONDS) if remaining > 0 else POLL_SECONDS)


def make_rate(per_second: float) -> Rate:
    """Return a limit of one or more requests per window, or of one request per longer window if the rate is low."""
    count = int(per_second * SERVICE_WINDOW_SECONDS)
    seconds = WINDOW_SECONDS if count else WINDOW_SECONDS / SERVICE_WINDOW_SECONDS / per_second
    return Rate(max(count, 1), math.ceil(1000 * seconds))
