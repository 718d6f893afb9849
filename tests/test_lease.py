"""Test leases with a simulated service and clock: responses are lost, the service is down, processes are suspended."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest

from batch_infer.errors import LockedError, SettingsError, StorageError
from batch_infer.stopping import StopRequested
from batch_infer.store.objects import lease as lease_module
from batch_infer.store.objects.conditional_puts import Version
from batch_infer.store.objects.lease import CHECK_SECONDS, Lease, LeaseReader
from batch_infer.store.objects.lease_object import LEASE, LEASE_SECONDS, LeaseObject

OUT = "s3://bucket/out"


class Service:
    """A service with one object, whose clock is that of the process, rounded to seconds."""

    def __init__(self) -> None:
        self.now = 1000.7
        self.object: Version | None = None
        self.requests: list[str] = []
        self.is_down = False
        self.fault: Callable[[str], None] = lambda request: None
        """Called after each request with its name. May raise an error, so that the response is lost."""
        self._versions = count()

    def create(self, path: str, content: bytes) -> str | None:
        self._receive()
        return self._put("create", content) if self.object is None else self._answer("create")

    def replace(self, path: str, content: bytes, version: str) -> str | None:
        self._receive()
        is_same = self.object is not None and self.object.version == version
        return self._put("replace", content) if is_same else self._answer("replace")

    def _put(self, request: str, content: bytes) -> str | None:
        self.object = Version(content, str(next(self._versions)), int(self.now), 0)
        return self._answer(request, self.object.version)

    def read(self, path: str) -> Version | None:
        self._receive()
        self._answer("read")
        return None if self.object is None else self.object._replace(read_at=int(self.now))

    def _receive(self) -> None:
        if self.is_down:
            raise ConnectionError("the network is down")

    def _answer(self, request: str, version: str | None = None) -> str | None:
        self.requests.append(request)
        self.fault(request)
        return version


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()
    monkeypatch.setattr(lease_module, "get_time", lambda: service.now)
    return service


def file_of(service: Any) -> LeaseObject:
    return LeaseObject(OUT, service, LEASE)


def acquire(service: Service) -> Lease:
    lease = Lease(file_of(service))
    lease.acquire()
    return lease


def lose_once(service: Service, lost: str) -> None:
    """Make the library repeat the next put of this kind because its response was lost. The second one fails."""

    def fault(request: str) -> None:
        if request == lost:
            service.fault = lambda request: None
            raise LostResponse

    service.fault = fault


class LostResponse(Exception):
    """Is caught by `repeat`."""


class RepeatingService(Service):
    def create(self, path: str, content: bytes) -> str | None:
        try:
            return super().create(path, content)
        except LostResponse:
            return super().create(path, content)

    def replace(self, path: str, content: bytes, version: str) -> str | None:
        try:
            return super().replace(path, content, version)
        except LostResponse:
            return super().replace(path, content, version)


@pytest.fixture
def repeating(monkeypatch: pytest.MonkeyPatch) -> RepeatingService:
    service = RepeatingService()
    monkeypatch.setattr(lease_module, "get_time", lambda: service.now)
    return service


def test_a_lease_is_refused_until_it_ends(service: Service) -> None:
    acquire(service)
    file = file_of(service)
    service.now += LEASE_SECONDS - 1
    holder = file.find_holder() or ""
    with pytest.raises(LockedError) as error:
        acquire(service)
    assert str(error.value) == (
        f"{OUT} is locked by another command ({holder}); run again when that has ended or, if it has crashed, when its"
        " lease ends, in 1 seconds"
    )
    service.now += 1
    assert file.find_holder() is None
    acquire(service).check()


def test_a_renewed_lease_does_not_end(service: Service) -> None:
    lease = acquire(service)
    reader = LeaseReader(file_of(service), lease.token)
    contents = set()
    for _ in range(20):
        service.now += LEASE_SECONDS / 6
        lease.renew()
        assert service.object
        contents.add(service.object.content)
        lease.check()
        reader.check()
        with pytest.raises(LockedError):
            acquire(service)
    assert len(contents) == 20, "equal contents would have equal ETags"


def test_checking_costs_no_request_while_the_lease_is_fresh(service: Service) -> None:
    lease = acquire(service)
    reader = LeaseReader(file_of(service), lease.token)
    service.requests.clear()
    for _ in range(10):
        lease.check()
        reader.check()
    assert service.requests == ["read"]
    service.now += CHECK_SECONDS
    reader.check()
    assert service.requests == ["read", "read"]


def test_the_loser_of_a_race_for_an_ended_lease_is_refused(service: Service) -> None:
    acquire(service)
    service.now += LEASE_SECONDS
    winners: list[Lease] = []

    def race(request: str) -> None:
        if request == "read" and not winners:
            winners.append(Lease(file_of(service)))
            winners[0].acquire()

    service.fault = race
    with pytest.raises(LockedError):
        acquire(service)
    winners[0].check()


def test_a_lease_that_is_released_in_the_meantime_is_acquired(service: Service) -> None:
    acquire(service)
    service.requests.clear()

    def release(request: str) -> None:
        service.fault = lambda request: None
        service.object = None

    service.fault = release
    acquire(service).check()
    assert service.requests == ["create", "read", "create"]


@pytest.mark.parametrize("lost", ["create", "replace"])
def test_acquiring_survives_a_lost_response(repeating: RepeatingService, lost: str) -> None:
    if lost == "replace":
        acquire(repeating)
        repeating.now += LEASE_SECONDS
    lose_once(repeating, lost)
    lease = acquire(repeating)
    lease.check()
    lease.renew()
    lease.check()


def test_a_renewal_survives_a_lost_response(repeating: RepeatingService) -> None:
    """The repeated renewal fails, because the first one has changed the ETag."""
    lease = acquire(repeating)
    repeating.now += 10
    lose_once(repeating, "replace")
    repeating.requests.clear()
    lease.renew()
    assert repeating.requests == ["replace", "replace", "read", "replace"]
    lease.check()
    repeating.now += LEASE_SECONDS - 15
    lease.check()
    assert repeating.requests[4:] == [], "it counts as renewed"


def test_a_lease_that_cannot_be_renewed_stops_the_run_before_it_ends(service: Service) -> None:
    lease = acquire(service)
    reader = LeaseReader(file_of(service), lease.token)
    service.is_down = True
    for _ in range(5):
        service.now += 9
        lease.renew()
        lease.check()
    service.now += 9
    with pytest.raises(StorageError) as error:
        lease.check()
    assert str(error.value) == (
        f"the lease of {OUT} could not be renewed for 54 seconds (cannot write {OUT}/.lease: the network is down);"
        " run again to continue"
    )
    service.is_down = False
    with pytest.raises(LockedError):
        acquire(service)
    with pytest.raises(StorageError, match="could not be renewed for 54 seconds; run again"):
        reader.check()


def test_a_short_outage_is_survived(service: Service) -> None:
    lease = acquire(service)
    service.is_down = True
    service.now += 40
    lease.renew()
    service.is_down = False
    lease.renew()
    service.now += 40
    lease.check()


def test_a_process_that_was_suspended_continues_if_no_other_has_taken_over(service: Service) -> None:
    lease = acquire(service)
    service.now += 600
    lease.check()
    with pytest.raises(LockedError):
        acquire(service)


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_process_that_was_suspended_stops_if_another_has_taken_over(service: Service, has_ended: bool) -> None:
    lease = acquire(service)
    reader = LeaseReader(file_of(service), lease.token)
    service.now += 600
    with Lease(file_of(service)).hold():
        if not has_ended:
            check_is_lost(lease, reader)
    if has_ended:
        check_is_lost(lease, reader)


def check_is_lost(lease: Lease, reader: LeaseReader) -> None:
    for check in (lease.check, reader.check, lease.check):
        with pytest.raises(
            StorageError, match=f"another run has taken over {OUT}, or its lease was released or removed"
        ):
            check()


def test_a_held_lease_is_renewed_in_the_background_and_released(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "RENEWALS", 1e6)
    renewed = threading.Event()
    service.fault = lambda request: renewed.set() if request == "replace" else None
    with Lease(file_of(service)).hold():
        assert renewed.wait(60)
    assert file_of(service).find_holder() is None
    acquire(service).check()


@pytest.mark.parametrize("ignored", ["create", "replace"])
def test_a_service_that_ignores_conditions_is_refused(service: Service, ignored: str) -> None:
    if ignored == "create":
        service.create = lambda path, content: service._put("create", content)  # type: ignore[method-assign]
    else:
        service.replace = lambda path, content, version: service._put("replace", content)  # type: ignore[method-assign]
    with pytest.raises(SettingsError, match="ignores the conditions of puts"), Lease(file_of(service)).hold():
        pytest.fail("it was locked")
    assert file_of(service).find_holder() is None


def test_a_worker_ignores_a_failure_while_the_lease_cannot_have_ended(service: Service) -> None:
    lease = acquire(service)
    reader = LeaseReader(file_of(service), lease.token)
    reader.check()
    service.is_down = True
    service.now += 45
    reader.check()
    service.now += 10
    with pytest.raises(StorageError, match="cannot read .*: the network is down"):
        reader.check()


def test_the_lease_of_another_run_is_not_released(service: Service) -> None:
    with Lease(file_of(service)).hold():
        service.now += LEASE_SECONDS
        other = acquire(service)
    other.renew()
    other.check()
    assert file_of(service).find_holder() is not None


def test_another_run_takes_over_while_a_release_is_delayed(service: Service) -> None:
    """The client repeats a request for a minute. When the service receives the release, the lease has ended."""
    others: list[Lease] = []
    real_replace = service.replace

    def replace(path: str, content: bytes, version: str) -> str | None:
        if b'"seconds": 0' in content and not others:
            service.now += LEASE_SECONDS
            others.append(acquire(service))
        return real_replace(path, content, version)

    with Lease(file_of(service)).hold():
        service.replace = replace  # type: ignore[method-assign]
    others[0].renew()
    others[0].check()


@pytest.mark.parametrize("age", [-2, 0, 2])
def test_a_released_lease_is_free_whatever_its_age(service: Service, age: int) -> None:
    """Two servers of one service may differ by a second."""
    with Lease(file_of(service)).hold():
        pass
    assert service.object
    service.object = service.object._replace(modified_at=int(service.now) - age)
    assert file_of(service).find_holder() is None
    acquire(service).check()


def test_a_lease_is_not_valid_after_its_release(service: Service) -> None:
    lease = Lease(file_of(service))
    with lease.hold():
        reader = LeaseReader(file_of(service), lease.token)
    check_is_lost(lease, reader)


def test_a_release_survives_a_lost_response(repeating: RepeatingService) -> None:
    with Lease(file_of(repeating)).hold():
        lose_once(repeating, "replace")
    assert file_of(repeating).find_holder() is None


def interrupt(service: Service, interrupted: str, *, is_late: bool) -> None:
    """Stop the process during its next request of this kind, whose object the service stores at once or later."""
    real_put = service._put

    def put(request: str, content: bytes) -> str | None:
        service._put = real_put  # type: ignore[method-assign]
        if request != interrupted:
            return real_put(request, content)
        if not is_late:
            real_put(request, content)
        raise StopRequested

    service._put = put  # type: ignore[method-assign]


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("request_name", ["create", "replace"])
def test_a_stop_while_a_lease_is_acquired_releases_it(service: Service, request_name: str, is_late: bool) -> None:
    """The put that was interrupted is not stored any more after that."""
    if request_name == "replace":
        acquire(service)
        service.now += LEASE_SECONDS
    old_version = service.object.version if service.object else None
    interrupt(service, request_name, is_late=is_late)
    with pytest.raises(StopRequested), Lease(file_of(service)).hold():
        pytest.fail("it was not interrupted")
    assert file_of(service).find_holder() is None
    late = service.create("", b"{}") if old_version is None else service.replace("", b"{}", old_version)
    assert late is None


def test_a_stop_during_a_renewal_releases_the_lease(service: Service) -> None:
    lease = Lease(file_of(service))
    with pytest.raises(StopRequested), lease.hold():
        interrupt(service, "replace", is_late=False)
        lease.renew()
    assert file_of(service).find_holder() is None


def test_a_refused_lease_is_not_released(service: Service) -> None:
    acquire(service)
    service.requests.clear()
    with pytest.raises(LockedError), Lease(file_of(service)).hold():
        pytest.fail("it was locked")
    assert service.requests == ["create", "read"]


def test_threads_that_wait_for_a_renewal_share_its_failure(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library repeats a request for a minute while the service is down. The threads do not do so in turn."""
    lease = acquire(service)
    service.now += LEASE_SECONDS
    renewing, waiters, requests = threading.Event(), threading.Semaphore(0), []
    calls: Counter[int] = Counter()

    def get_time() -> float:
        calls[threading.get_ident()] += 1
        if renewing.is_set() and calls[threading.get_ident()] == 2:  # it waits for the lock next
            waiters.release()
        return service.now

    def fail() -> None:
        requests.append("")
        renewing.set()
        for _ in range(3):
            assert waiters.acquire(timeout=60)
        service.now += 57
        raise ConnectionError("the network is down")

    def check(is_first: bool) -> None:
        assert is_first or renewing.wait(60)
        with pytest.raises(StorageError, match="the network is down"):
            lease.check()

    monkeypatch.setattr(lease_module, "get_time", get_time)
    service._receive = fail  # type: ignore[method-assign]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, [True, False, False, False]))
    assert len(requests) == 1


def test_threads_of_a_worker_share_a_failed_reading(service: Service) -> None:
    reader = LeaseReader(file_of(service), acquire(service).token)
    requests = []

    def fail() -> None:
        requests.append("")
        service.now += 57
        raise ConnectionError("the network is down")

    service._receive = fail  # type: ignore[method-assign]
    for _ in range(3):
        with pytest.raises(StorageError, match="the network is down"):
            reader.check()
    assert len(requests) == 1


def test_an_error_is_not_masked_by_releasing(service: Service) -> None:
    with pytest.raises(ZeroDivisionError), Lease(file_of(service)).hold():
        service.is_down = True
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"{}", b"[" * 100_000, b'{"holder": 1, "token": 2, "seconds": -3}'],
)
def test_an_edited_lease_counts_for_a_minute(service: Service, content: bytes) -> None:
    service.object = Version(content, "odd", int(service.now), 0)
    with pytest.raises(LockedError, match="its process is unknown"):
        acquire(service)
    service.now += LEASE_SECONDS
    acquire(service).check()
