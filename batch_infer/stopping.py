"""Stop a command early, on a signal or at the time limit.

Killing a command at any moment loses no committed work, so outside `deferred`, a stop raises StopRequested in the main
thread immediately. Code inside `deferred` checks for a stop itself and finishes its work. A watchdog thread ends the
process if the main thread is inside a library that neither returns nor lets the exception through.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from multiprocessing import active_children
from types import FrameType
from typing import Any, ClassVar

from batch_infer.errors import StoppedError

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
GRACE_SECONDS = 3.0
"""Seconds in which a command may finish its work after a deferred stop, for example merge results."""
END_SECONDS = 1.5
"""Seconds to wait for an interrupted process to exit before the watchdog ends it."""
REPEAT_SECONDS = 0.5
"""Signals within this many seconds count as one, because `timeout` signals a process and then its group."""
TICK_SECONDS = 0.1
_ALARM = getattr(signal, "SIGALRM", None)
TIME_LIMIT = "the time limit"


class StopRequested(KeyboardInterrupt):
    """Raised in the main thread on a stop. It is not an Exception, so that libraries do not handle it."""


class Stopper:
    """Reports whether to stop, and interrupts the main thread unless the stop is deferred.

    `reason` is None until a stop is requested, then the name of a signal or TIME_LIMIT. Only one Stopper may be active
    at a time, on the main thread.
    """

    active: ClassVar[Stopper | None] = None
    reason: str | None = None

    def __init__(
        self,
        time_limit: float | None,
        hint: str,
        *,
        log_stop: Callable[[], object],
        log_error: Callable[[str], object],
        remove_files: Callable[[], object],
    ) -> None:
        """Start the time limit, in seconds, if any. `hint` ends the error message and says what to do after a stop.

        `log_stop` is called in the main thread if the first signal arrives while a stop is deferred indefinitely.
        Before the watchdog ends the process, it calls `remove_files`, and `log_error` with the error message.
        """
        self.time_limit, self._hint = time_limit, hint
        self._deadline = time.monotonic() + (math.inf if time_limit is None else time_limit)
        self._log_stop, self._log_error, self._remove_files = log_stop, log_error, remove_files
        self._grace = 0.0
        """Maximum number of seconds by which a stop would be deferred at this moment."""
        self._has_timer = self._interrupted = False
        self._first_signal_time: float | None = None
        self._previous_handlers: dict[int, Any] = {}
        self._closed = threading.Event()

    def __call__(self) -> bool:
        """Return whether to stop."""
        if self.reason is None and time.monotonic() >= self._deadline:
            self.reason = TIME_LIMIT
        return self.reason is not None

    def error(self) -> StoppedError:
        """Return the error that ends the command after StopRequested."""
        cause = f"{TIME_LIMIT} was reached" if self.reason == TIME_LIMIT else f"stopped by {self.reason}"
        return StoppedError(f"{cause}; {self._hint}")

    @contextmanager
    def deferring(self, seconds: float) -> Iterator[None]:
        """Defer a stop inside the context by at most this many seconds."""
        previous_grace, self._grace = self._grace, seconds
        if self() and seconds < math.inf:
            self._set_timer(seconds)
        try:
            yield
        finally:
            self._grace = previous_grace
        if self.reason is not None and previous_grace < math.inf:
            self._set_timer(GRACE_SECONDS)

    def __enter__(self) -> Stopper:
        Stopper.active = self
        self._wakeup_sender, self._wakeup_receiver = socket.socketpair()
        self._wakeup_sender.setblocking(False)
        for number in STOP_SIGNALS:
            if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup lets the command outlive its terminal
            self._install(number, self._handle)
        if _ALARM is not None:
            self._install(_ALARM, self._handle_alarm)
        if _ALARM in self._previous_handlers and self.time_limit is not None:
            signal.setitimer(signal.ITIMER_REAL, max(self.time_limit, 1e-6))
        self._previous_wakeup_fd = signal.set_wakeup_fd(self._wakeup_sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        Stopper.active = None
        if _ALARM in self._previous_handlers:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._closed.set()
        with suppress(OSError):
            self._wakeup_sender.send(b"\0")
        self._wakeup_sender.close()

    def _install(self, number: int, handler: Callable[[int, FrameType | None], None]) -> None:
        """Install a handler unless the embedding program installed one in C, which could not be restored."""
        if signal.getsignal(number) is not None:
            self._previous_handlers[number] = signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._first_signal_time is None:
            self._first_signal_time = time.monotonic()
        elif time.monotonic() - self._first_signal_time >= REPEAT_SECONDS:
            self._interrupt()
        if self.reason is None:
            self.reason = _signal_name(number)
            if self._grace == math.inf:
                self._log_stop()
            self._interrupt_after_grace()

    def _handle_alarm(self, number: int, frame: FrameType | None) -> None:
        if self._has_timer:  # the grace period has ended
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
        """Interrupt after this many seconds, unless this was already called or there is no SIGALRM."""
        if not self._has_timer and _ALARM in self._previous_handlers:
            self._has_timer = True
            signal.setitimer(signal.ITIMER_REAL, seconds)

    # The methods below run on the watchdog thread. It receives signals even if the main thread is inside a library.

    def _watch(self) -> None:
        with self._wakeup_receiver:
            first_signal, signal_count, last_time, overdue_seconds = 0, 0, -math.inf, 0.0
            while not self._closed.is_set():
                self._wakeup_receiver.settimeout(TICK_SECONDS if first_signal else None)
                numbers = b""
                with suppress(TimeoutError):
                    numbers = self._wakeup_receiver.recv(64)
                handled_signals = (number for number in numbers if number in self._previous_handlers)
                first_signal = first_signal or next(handled_signals, 0)
                if any(number in STOP_SIGNALS for number in numbers) and time.monotonic() - last_time >= REPEAT_SECONDS:
                    signal_count, last_time = signal_count + 1, time.monotonic()
                is_due = self._interrupted or self._grace < math.inf or signal_count > 1
                overdue_seconds = overdue_seconds + TICK_SECONDS if first_signal and is_due else 0.0
                grace = GRACE_SECONDS if self._has_timer or 0 < self._grace < math.inf else 0.0
                if overdue_seconds >= END_SECONDS + grace:
                    self.reason = self.reason or _signal_name(first_signal)  # None if the signal is unhandled
                    self._end_process()
        if self._interrupted:
            self._limit_shutdown()

    def _limit_shutdown(self) -> None:
        """End the process if the interpreter waits too long for other threads at exit."""
        while threading.main_thread().is_alive():
            time.sleep(TICK_SECONDS)
        time.sleep(END_SECONDS)
        os._exit(StoppedError.exit_code)

    def _end_process(self) -> None:
        for process in active_children():
            process.kill()
        for callback in (self._remove_files, partial(self._log_error, str(self.error()))):
            thread = threading.Thread(target=callback, daemon=True)
            thread.start()
            thread.join(END_SECONDS / 4)  # the callback may block on a lock that the main thread holds
        os._exit(StoppedError.exit_code)


class CallStopper(Stopper):
    """A Stopper for a call from Python, which never ends the process and handles no signal except SIGINT.

    SIGINT is handled only while it would raise KeyboardInterrupt, which excludes threads other than the main one and
    programs that have installed a handler. A time limit does not interrupt the main thread.
    """

    def __init__(self, time_limit: float | None, hint: str, *, log_stop: Callable[[], object]) -> None:
        super().__init__(time_limit, hint, log_stop=log_stop, log_error=lambda _: None, remove_files=lambda: None)

    def __enter__(self) -> CallStopper:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and Stopper.active is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            Stopper.active = self
            self._install(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if Stopper.active is self:
            Stopper.active = None
            signal.signal(signal.SIGINT, self._previous_handlers[signal.SIGINT])

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self.reason not in (None, TIME_LIMIT)


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name
    return TIME_LIMIT if name == "SIGALRM" else name


@contextmanager
def deferred(seconds: float = math.inf) -> Iterator[None]:
    """Defer a stop by at most this many seconds inside the context, whose code must check for a stop.

    If a stop was requested, the code after the context has up to GRACE_SECONDS to finish. This does nothing without an
    active Stopper, and in threads other than the main one, which it does not interrupt.
    """
    is_main = threading.current_thread() is threading.main_thread()
    with nullcontext() if Stopper.active is None or not is_main else Stopper.active.deferring(seconds):
        yield
