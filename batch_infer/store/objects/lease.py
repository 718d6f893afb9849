"""Lock OUT in an object store with a lease, which ends a minute after its holder has died."""

from __future__ import annotations

import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from batch_infer.errors import BatchInferError, LockedError, SettingsError, StorageError
from batch_infer.records import utc_now
from batch_infer.store.objects.lease_object import LEASE_SECONDS, LeaseObject, LeaseRecord

RENEWALS = 6
"""Number of renewals in LEASE_SECONDS."""
MARGIN = 1 / 6
"""Fraction of LEASE_SECONDS by which the holder stops early, because the service rounds times to seconds."""
CHECK_SECONDS = 2.0
"""Seconds for which a worker relies on its last reading of the lease. Parts are committed every two seconds."""
RELEASE_SECONDS = 5.0
"""Seconds that the end of a run waits for a renewal that has not ended, for example because the service is down."""
_ATTEMPTS = 3


def get_time() -> float:
    """Return seconds by a clock that also runs while the machine is suspended, where there is one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


@dataclass
class Lease:
    """A lease that this process acquires, renews in the background and releases."""

    file: LeaseObject
    seconds: float = LEASE_SECONDS
    token: str = field(default_factory=lambda: secrets.token_hex(16))

    def __post_init__(self) -> None:
        started = f"{utc_now():%Y-%m-%d %H:%M:%S} UTC"
        self._holder = f"{platform.node()}, process {os.getpid()}, since {started}"
        self._lock = threading.Lock()
        self._renewals = 0
        self._version: str | None = None
        self._renewed_at = self._attempted_at = float("-inf")
        self._is_lost = False
        """Whether this process does not hold the lease for certain: it was refused, taken over or released."""
        self._error: Exception | None = None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Acquire the lease, renew it until the context ends, and release it.

        Raises LockedError with the holder, SettingsError, StorageError.
        """
        stop = threading.Event()
        try:
            self.acquire()
            self.check_conditions()
            threading.Thread(target=self._renew_until, args=(stop,), name="lease", daemon=True).start()
            yield
        finally:
            stop.set()
            self._release()

    def acquire(self) -> None:
        """Acquire the lease. Raises LockedError with the holder, SettingsError, StorageError."""
        try:
            self._acquire()
        except BatchInferError:  # there is nothing to release; if only the response was lost, the lease ends later
            self._is_lost = True
            raise

    def _acquire(self) -> None:
        self._renewed_at = get_time()  # not later than the put, of which the response may be lost
        for _ in range(_ATTEMPTS):
            version = self.file.create(self._make_content())
            if version is None:
                record = self.file.read()
                if record is None:  # removed since then
                    continue
                if record.token == self.token:  # created, but the response was lost
                    version = record.version
                elif record.remaining > 0:
                    raise self._make_locked_error(record)
                else:
                    version = self.file.replace(self._make_content(), record.version)
            if version is not None:
                self._version = version
                return
        raise LockedError(f"{self.file.out} is locked by another command; run again when that has ended")

    def check_conditions(self) -> None:
        """Raise SettingsError if the service ignores the conditions of puts, as some with the API of S3 do.

        Several runs would then get the lock.
        """
        old_version = self._version or ""
        self._renew()
        content = self._make_content()
        if self.file.create(content) is not None or self.file.replace(content, old_version) is not None:
            raise SettingsError(
                f"{self.file.out} cannot be locked, because its service ignores the conditions of puts (If-None-Match,"
                " If-Match): give an --out on another service or in a folder"
            )

    def _make_locked_error(self, record: LeaseRecord) -> LockedError:
        return LockedError(
            f"{self.file.out} is locked by another command ({record.holder}); run again when that has ended or, if it"
            f" has crashed, when its lease ends, in {max(1, round(record.remaining))} seconds"
        )

    def _make_content(self, *, is_released: bool = False) -> bytes:
        """Return new content. The ETag of S3 is a hash of the content, which must therefore differ in each renewal."""
        self._renewals += 1
        seconds = 0 if is_released else self.seconds
        record = {"holder": self._holder, "token": self.token, "seconds": seconds, "renewal": self._renewals}
        return json.dumps(record).encode()

    def _renew_until(self, stop: threading.Event) -> None:
        while not self._is_lost and not stop.wait(self.seconds / RENEWALS):
            self.renew()

    def renew(self, *, if_stale: bool = False) -> None:
        """Renew the lease, and keep an error for `check`."""
        started = get_time()
        with self._lock:
            if self._is_lost or (if_stale and (not self._is_stale or self._attempted_at > started)):
                return  # another thread has renewed or released it, or has tried to, while this one has waited
            try:
                self._renew()
            except (SettingsError, StorageError) as error:
                self._error = error
            finally:
                self._attempted_at = get_time()

    def _renew(self) -> None:
        started = get_time()
        version = self.file.replace(self._make_content(), self._version or "")
        if version is None:
            record = self.file.read()
            if record is None or record.token != self.token:
                self._is_lost = True
                return
            self._version = record.version  # of an earlier renewal, the response of which was lost
            version = self.file.replace(self._make_content(), self._version)
        if version is not None:
            self._version, self._renewed_at, self._error = version, started, None

    @property
    def _is_stale(self) -> bool:
        return not self._is_lost and get_time() - self._renewed_at > self.seconds * (1 - MARGIN)

    def check(self) -> None:
        """Check that no other run can have taken over. Raises StorageError.

        Costs no request, unless this process or the service was suspended for so long that another run may have taken
        over. In that case, a renewal shows whether one has.
        """
        if self._is_stale:
            self.renew(if_stale=True)
        if self._is_lost:
            raise make_lost_error(self.file.out)
        if self._is_stale:
            raise make_stale_error(self.file.out, get_time() - self._renewed_at, self._error)

    def _release(self) -> None:
        """Replace the lease by one that has ended, unless another run has taken over. If that fails, it ends later.

        The object is not removed: a DELETE is unconditional in some services, and when a client repeats it after an
        outage, it may remove the lease of the next run.
        """
        if not self._lock.acquire(timeout=RELEASE_SECONDS):
            return
        try:
            if not self._is_lost and not self._is_stale:
                self._is_lost = True  # before the request, after which another run may begin
                with suppress(SettingsError, StorageError):  # these would mask the original exception
                    self._replace_by_released()
        finally:
            self._lock.release()

    def _replace_by_released(self) -> None:
        """Store a released lease on the condition that no other run has stored its own.

        If a signal has interrupted a put of this process, the put may still succeed. A put of another version makes its
        condition fail. So without a known version, this creates the object, or replaces a lease that has ended.
        """
        for _ in range(_ATTEMPTS):
            content = self._make_content(is_released=True)
            version = self._version
            if (self.file.create(content) if version is None else self.file.replace(content, version)) is not None:
                return
            record = self.file.read()
            if record is not None and record.token != self.token and record.remaining > 0:
                return
            self._version = None if record is None else record.version


class LeaseReader:
    """Checks the lease that another process holds for this one."""

    def __init__(self, file: LeaseObject, token: str) -> None:
        self._file, self._token = file, token
        self._lock = threading.Lock()
        self._checked_at = self._valid_until = float("-inf")
        self._error: StorageError | None = None

    def check(self) -> None:
        """Check that the lease is still the same, with at most one request in CHECK_SECONDS. Raises StorageError.

        If it cannot be read, that is an error only when the lease as it was last read has ended. Threads that wait for
        a request share its result, because the library may repeat a request for a minute.
        """
        with self._lock:
            if get_time() - self._checked_at >= CHECK_SECONDS:
                self._update()
            if self._error is not None:
                raise self._error

    def _update(self) -> None:
        started = get_time()
        self._error = None
        try:
            record = self._file.read()
        except StorageError as error:
            self._checked_at = get_time()
            self._error = error if self._checked_at >= self._valid_until else None
            return
        self._checked_at = started
        if record is None or record.token != self._token or record.seconds <= 0:
            self._error = make_lost_error(self._file.out)
            return
        remaining = record.seconds * (1 - MARGIN) - record.age
        self._valid_until = started + remaining
        if remaining < 0:
            self._error = make_stale_error(self._file.out, record.age)


def make_lost_error(out: str) -> StorageError:
    return StorageError(
        f"another run has taken over {out}, or its lease was released or removed; run again when that run has ended to"
        " continue"
    )


def make_stale_error(out: str, seconds: float, error: Exception | None = None) -> StorageError:
    message = f"the lease of {out} could not be renewed for {seconds:.0f} seconds{f' ({error})' if error else ''}"
    return StorageError(f"{message}; run again to continue")
