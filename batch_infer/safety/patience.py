"""How a service is asked that does not always answer: within its rate, again for a while, until the run stops."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from pyrate_limiter import Limiter, Rate
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential, wait_random

from batch_infer.errors import Interrupted, RowBroken, ServiceError
from batch_infer.safety.answers import SERVICE, Answer, Kind, NoAnswer
from batch_infer.settings import ServiceSettings

FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0
BACKOFF = wait_exponential(FIRST_WAIT, LONGEST_WAIT) + wait_random(0, FIRST_WAIT)
WINDOW, COUNTED = 10.5, 10.0
"""Seconds. The service counts 10, and what leaves here further apart than that can arrive closer together."""
POLL = 0.05
"""Seconds after which whoever waits looks whether the run stops."""

Attempt = Callable[[], Answer]
"""One request. Raises NoAnswer where it is to be made again."""


class Patience:
    """Asks until there is an answer; threads share the rate, and what is known of who was answered."""

    def __init__(self, settings: ServiceSettings, stop: Callable[[], bool]) -> None:
        self._settings, self._stop = settings, stop
        self._limiter = Limiter(rate_of(settings.requests_per_second))
        self._answered: dict[str, float] = {}

    def ask(self, kind: Kind, attempt: Attempt, harmless: Attempt) -> Answer:
        """The answer to an attempt, which is made again for `patience` seconds at least.

        `harmless` asks something of the same kind that no row is to blame for, where that has to be known. Raises
        RowBroken where others are answered and this is not, ServiceError where nobody is, and Interrupted.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(NoAnswer),
            wait=self._wait,
            stop=lambda state: self._is_hopeless(state, kind),
            sleep=self._rest,
            reraise=True,
        )
        self._take_turn()
        started = time.monotonic()
        try:
            return retrying(self._noted, kind, attempt)
        except NoAnswer as error:
            tried = time.monotonic() - started
            if self._silence(kind) < self._settings.patience or self._is_answered(kind, harmless):
                raise RowBroken(f"{SERVICE} gave no answer on this row's {kind} ({error})") from error
            raise ServiceError(
                f"{SERVICE} at {self._settings.endpoint} has not answered for {tried:.0f} s (last: {error});"
                " what is finished is kept, run again to go on"
            ) from error

    def close(self) -> None:
        self._limiter.close()

    def _noted(self, kind: Kind, attempt: Attempt) -> Answer:
        """An attempt, with a note of when the service last had a word to say, if only that it refuses this one."""
        try:
            answer = attempt()
        except RowBroken:
            self._answered[kind] = time.monotonic()
            raise
        self._answered[kind] = time.monotonic()
        return answer

    def _silence(self, kind: Kind) -> float:
        """Seconds since the service last answered anybody on something of this kind."""
        return time.monotonic() - self._answered.get(kind, -math.inf)

    def _wait(self, state: RetryCallState) -> float:
        """Seconds before the next attempt; a wait that would last beyond our patience ends with it."""
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after if isinstance(error, NoAnswer) else None
        seconds = BACKOFF(state) if asked is None else max(asked, FIRST_WAIT)
        left = self._settings.patience - (state.seconds_since_start or 0)
        return min(seconds, left if left > 0 else self._settings.patience)

    def _is_hopeless(self, state: RetryCallState, kind: Kind) -> bool:
        """Whether our patience has ended, and it is known who is to blame.

        Where others were answered a while ago, but not lately, the service may have broken down since: then it is
        asked on until that has lasted as long as our patience, so that no row is blamed for it.
        """
        patience = self._settings.patience
        return (state.seconds_since_start or 0) >= patience and not patience / 2 <= self._silence(kind) < patience

    def _is_answered(self, kind: Kind, attempt: Attempt) -> bool:
        self._take_turn()
        try:
            self._noted(kind, attempt)
        except NoAnswer:
            return False
        except RowBroken:
            pass
        return True

    def _take_turn(self) -> None:
        """Wait until one more request is within the rate."""
        self._see_stop()
        # Not by the limiter's own waiting, which nothing ends.
        while self._limiter.try_acquire(SERVICE, blocking=False) is not True:
            self._sleep(POLL)

    def _rest(self, seconds: float) -> None:
        self._sleep(seconds)
        self._take_turn()

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._see_stop()
            time.sleep(min(left, POLL))

    def _see_stop(self) -> None:
        if self._stop():
            raise Interrupted(f"stopped while {SERVICE} was asked; run again to go on")


def rate_of(per_second: float) -> Rate:
    """A rate as a count in a window of ten seconds, or one request in a longer window."""
    count = int(per_second * COUNTED)
    return Rate(max(count, 1), math.ceil(1000 * (WINDOW if count else WINDOW / COUNTED / per_second)))
