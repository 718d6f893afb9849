"""Stopping a command early, by a signal or at the time limit, at once or when running work is done.

A command may be killed at any moment without losing committed work. So a stop raises StopRequested in the main thread
immediately, except inside `deferred`: the code there checks for a stop itself and finishes its work. A watchdog thread
ends the process where the main thread is inside a library that neither returns nor lets an exception through.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from types import FrameType, TracebackType
from typing import Any

from batch_infer.errors import Interrupted

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
GRACE_SECONDS = 3.0
"""Time to merge results after a stop."""
END_SECONDS = 1.5
"""Time that an interrupted process has to exit before it is ended."""
REPEAT_SECONDS = 0.5
"""Signals in shorter succession count once: `timeout` signals a process and then its group."""
TICK_SECONDS = 0.1
_ALARM = getattr(signal, "SIGALRM", None)
TIME_LIMIT = "the time limit"


class StopRequested(KeyboardInterrupt):
    """Raised in the main thread by a stop. It is not an Exception, so that no library handles it."""


class Stopper:
    """Tells whether to stop, and interrupts the main thread unless that is deferred. A context manager.

    `reason` is None until a stop is requested, then the name of a signal or TIME_LIMIT. Only one Stopper is active at
    a time, on the main thread.
    """

    reason: str | None = None

    def __init__(
        self,
        time_limit: float | None,
        hint: str,
        *,
        announce: Callable[[], object] = lambda: None,
        farewell: Callable[[str], object] = lambda message: None,
        clean_up: Callable[[], object] = lambda: None,
    ) -> None:
        """Start the time limit, in seconds. `hint` is the part of the message that says what to do after a stop.

        `announce` is called in the main thread when a stop by a signal is deferred. `farewell`, with the message, and
        `clean_up` are called on other threads before the watchdog ends the process.
        """
        self.time_limit, self._hint = time_limit, hint
        self._deadline = time.monotonic() + (math.inf if time_limit is None else time_limit)
        self._announce, self._farewell, self._clean_up = announce, farewell, clean_up
        self._grace = 0.0
        """Seconds by which a stop is deferred now."""
        self._has_timer = self._interrupted = False
        self._first_signal: float | None = None
        self._former_handlers: dict[int, Any] = {}
        self._closed = threading.Event()

    def __call__(self) -> bool:
        """Return whether to stop."""
        if self.reason is None and time.monotonic() >= self._deadline:
            self.reason = TIME_LIMIT
        return self.reason is not None

    def error(self) -> Interrupted:
        """Return the error with which to exit after StopRequested."""
        how = f"{TIME_LIMIT} came" if self.reason == TIME_LIMIT else f"stopped by {self.reason}"
        return Interrupted(f"{how}; {self._hint}")

    @contextmanager
    def deferring(self, seconds: float) -> Iterator[None]:
        """Defer a stop inside the context, by at most this many seconds."""
        before, self._grace = self._grace, seconds
        if self() and seconds < math.inf:
            self._set_timer(seconds)
        try:
            yield
        finally:
            self._grace = before
        if self.reason is not None and before < math.inf:
            self._set_timer(GRACE_SECONDS)

    def __enter__(self) -> Stopper:
        global _active
        _active = self
        self._pipe, self._woken = socket.socketpair()
        self._pipe.setblocking(False)
        for number in STOP_SIGNALS:
            if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._install(number, self._handle)
        if _ALARM is not None:
            self._install(_ALARM, self._handle_alarm)
        if _ALARM in self._former_handlers and self.time_limit is not None:
            signal.setitimer(signal.ITIMER_REAL, max(self.time_limit, 1e-6))
        self._wakeup = signal.set_wakeup_fd(self._pipe.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        global _active
        _active = None
        if _ALARM in self._former_handlers:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        self._closed.set()
        with suppress(OSError):
            self._pipe.send(b"\0")
        self._pipe.close()

    def _install(self, number: int, handler: Callable[[int, FrameType | None], None]) -> None:
        """Install a handler, unless the embedding program has one in C, which could not be restored."""
        if signal.getsignal(number) is not None:
            self._former_handlers[number] = signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._first_signal is None:
            self._first_signal = time.monotonic()
        elif time.monotonic() - self._first_signal >= REPEAT_SECONDS:
            self._interrupt()
        if self.reason is None:
            self.reason = _signal_name(number)
            if self._grace == math.inf:
                self._announce()
            self._interrupt_after_grace()

    def _handle_alarm(self, number: int, frame: FrameType | None) -> None:
        if self._has_timer:  # the grace period is over
            self._interrupt()
        elif self.reason is None:
            self.reason = TIME_LIMIT
            self._interrupt_after_grace()

    def _interrupt_after_grace(self) -> None:
        if self._grace == 0.0:
            self._interrupt()
        if self._grace < math.inf:
            self._set_timer(self._grace)

    def _interrupt(self) -> None:
        self._interrupted = True
        raise StopRequested

    def _set_timer(self, seconds: float) -> None:
        """Interrupt after this many seconds, unless a timer is set already."""
        if not self._has_timer and _ALARM in self._former_handlers:
            self._has_timer = True
            signal.setitimer(signal.ITIMER_REAL, seconds)

    # The methods below run on the watchdog thread, which receives signals while the main thread is inside a library.

    def _watch(self) -> None:
        with self._woken:
            first, signals, last, overdue = 0, 0, -math.inf, 0.0
            while not self._closed.is_set():
                numbers = self._receive(TICK_SECONDS if first else None)
                first = first or next((number for number in numbers if number in self._former_handlers), 0)
                if any(number in STOP_SIGNALS for number in numbers) and time.monotonic() - last >= REPEAT_SECONDS:
                    signals, last = signals + 1, time.monotonic()
                is_due = self._interrupted or self._grace < math.inf or signals > 1
                overdue = overdue + TICK_SECONDS if first and is_due else 0.0
                grace = GRACE_SECONDS if self._has_timer or 0 < self._grace < math.inf else 0.0
                if overdue >= END_SECONDS + grace:
                    self.reason = self.reason or _signal_name(first)  # the main thread has not handled it
                    self._end()
        if self._interrupted:
            self._linger()

    def _receive(self, seconds: float | None) -> bytes:
        """Return the numbers of the signals that arrive within this many seconds."""
        self._woken.settimeout(seconds)
        try:
            return self._woken.recv(64)
        except TimeoutError:
            return b""

    def _linger(self) -> None:
        """End the process if the interpreter waits too long for other threads when it exits."""
        while threading.main_thread().is_alive():
            time.sleep(TICK_SECONDS)
        time.sleep(END_SECONDS)
        os._exit(Interrupted.exit_code)

    def _end(self) -> None:
        for process in active_children():
            process.kill()
        # Each may block on a lock that the main thread holds.
        threads = [threading.Thread(target=self._clean_up, daemon=True)]
        threads.append(threading.Thread(target=self._farewell, args=(str(self.error()),), daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(END_SECONDS / 4)
        os._exit(Interrupted.exit_code)


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name
    return TIME_LIMIT if name == "SIGALRM" else name


_active: Stopper | None = None


@contextmanager
def deferred(seconds: float = math.inf) -> Iterator[None]:
    """Defer a stop inside the context by at most this many seconds; the code there checks for it.

    After a stop, the code that follows has GRACE_SECONDS. Without an active Stopper this does nothing.
    """
    if _active is None:
        yield
        return
    with _active.deferring(seconds):
        yield
