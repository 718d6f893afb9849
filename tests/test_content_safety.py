"""Azure AI Content Safety through the real SDK, with a local server that is as strict and fails on request."""

from __future__ import annotations

import ipaddress
import json
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tenacity
from PIL import Image
from pyrate_limiter import Rate

from batch_infer.errors import FailedRowError, ServiceError, SettingsError, StoppedError
from batch_infer.records import Verdict
from batch_infer.safety import Gate, content_safety, payloads, retries
from batch_infer.safety.content_safety import ContentSafety, check_credentials
from batch_infer.settings import ServiceSettings
from tests.clocks import Clock
from tests.content_safety_server import (
    HANG,
    KEY,
    RESET,
    Fault,
    ReceivedRequest,
    Service,
    malformed,
    serving,
    status,
    with_severity,
    without,
)
from tests.deaths import eventually

CLEAN = {"Hate": 0, "SelfHarm": 0, "Sexual": 0, "Violence": 0}
WORDS = {"gore": ("Violence", 4), "slur": ("Hate", 2), "nude": ("Sexual", 6)}
GREY = np.full((64, 64, 3), 128, np.uint8)
REJECTION = Fault(400, body=b'{"error": {"code": "InvalidRequestBody", "message": "The text is too odd."}}')


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTENT_SAFETY_KEY", KEY)


@pytest.fixture
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Set the backoff to 5 ms, and return a list of the numbers of failed attempts."""
    failed: list[int] = []

    def backoff(state: Any) -> float:
        failed.append(state.attempt_number)
        return 0.005

    monkeypatch.setattr(retries, "BACKOFF", backoff)
    return failed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace the clock of retries with one that only sleeping advances."""
    clock = Clock()
    monkeypatch.setattr(retries, "time", clock)
    monkeypatch.setattr(tenacity, "time", clock)
    return clock


@contextmanager
def gate_to(service: Service, stop: Callable[[], bool] = lambda: False, **settings: Any) -> Iterator[ContentSafety]:
    gate = ContentSafety(ServiceSettings(service.endpoint, **{"timeout_seconds": 120.0, **settings}), stop)
    try:
        yield gate
    finally:
        gate.close()


def max_requests_within(seconds: float, times: Sequence[float]) -> int:
    """Return the largest number of requests in any period of `seconds`."""
    ordered = sorted(times)
    return max(sum(start <= time < start + seconds for time in ordered) for start in ordered)


def test_a_prompt_is_one_request_and_has_the_severities_of_all_categories() -> None:
    with serving(words=WORDS) as service, gate_to(service) as gate:
        protocol: Gate = gate
        clean, unsafe = protocol.check_prompt("a red square"), protocol.check_prompt("gore and slur")
    assert clean == Verdict(False, "azure_content_safety", CLEAN)
    assert unsafe.nsfw is True and unsafe.scores == {**CLEAN, "Violence": 4, "Hate": 2}
    assert unsafe.reason == "Azure AI Content Safety refused the prompt (Hate 2, Violence 4)"
    assert service.texts == ["a red square", "gore and slur"]
    body = service.requests[0].body
    assert body["categories"] == list(CLEAN) and body["outputType"] == "FourSeverityLevels"


def test_an_image_is_one_request_and_is_sent_unchanged() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (72, 96, 3), np.uint8)
    with serving(classify=lambda image: {"Sexual": 6} if image.size == (96, 72) else {}) as service:
        with gate_to(service) as gate:
            clean, unsafe = gate.check_image(GREY), gate.check_image(pixels)
        sent = [np.asarray(image) for image in service.images]
    assert clean == Verdict(False, "azure_content_safety", CLEAN)
    assert unsafe.nsfw is True and unsafe.scores == {**CLEAN, "Sexual": 6}
    assert unsafe.reason == "Azure AI Content Safety flagged the image (Sexual 6)"
    assert len(sent) == 2 and np.array_equal(sent[0], GREY) and np.array_equal(sent[1], pixels)


@pytest.mark.parametrize(
    ("thresholds", "unsafe"),
    [((1, 1, 1, 1), True), ((1, 1, 1, 4), True), ((2, 1, 1, 4), False), ((2, 0, 0, 3), True), ((7, 7, 7, 7), False)],
)
def test_each_category_has_a_threshold(thresholds: tuple[int, ...], unsafe: bool) -> None:
    with serving(words=WORDS) as service, gate_to(service, thresholds=thresholds) as gate:
        verdict = gate.check_prompt("gore and slur")
    assert verdict.nsfw is unsafe and verdict.scores == {**CLEAN, "Violence": 4, "Hate": 2}


def test_a_blocklist_hit_blocks_the_prompt() -> None:
    lists = {"brands": ["acme"], "names": ["bob"], "unused": ["square"]}
    with serving(blocklists=lists) as service, gate_to(service, blocklists=("brands", "names")) as gate:
        clean, hit = gate.check_prompt("a red square"), gate.check_prompt("bob has an acme hat")
    assert clean == Verdict(False, "azure_content_safety", CLEAN)
    assert hit.nsfw is True and hit.scores == {**CLEAN, "blocklist brands": 1, "blocklist names": 1}
    assert hit.reason == "Azure AI Content Safety refused the prompt (blocklist brands, blocklist names)"


def test_a_long_prompt_gets_the_highest_severities_of_its_pieces() -> None:
    prompt = "slur " + "word " * 4500 + "gore"
    with serving(words=WORDS) as service, gate_to(service) as gate:
        verdict = gate.check_prompt(prompt)
        gate.check_prompt("\U0001f600" * 10_000)
    assert verdict.scores == {**CLEAN, "Violence": 4, "Hate": 2}
    assert len(service.texts) == 3 + 1 and set(service.statuses) == {200}


@pytest.mark.parametrize("cut", [9_800, 10_000, 19_600, 19_800])
@pytest.mark.parametrize("before", [0, 1, 100, 150, 198])
def test_a_phrase_at_a_cut_is_whole_in_one_piece(cut: int, before: int) -> None:
    phrase = "never these words together".ljust(200, "!")
    text = "x" * (cut - before) + phrase + "x" * 8_000
    assert any(phrase in piece for piece in payloads.split_text(text))


@pytest.mark.parametrize("length", [0, 1, 200, 201, 9_999, 10_000, 10_001, 19_800, 19_801, 50_000])
def test_pieces_cover_the_text(length: int) -> None:
    text = "".join(chr(32 + k % 90) for k in range(length))
    results = list(payloads.split_text(text))
    assert all(len(piece) <= 10_000 for piece in results)
    assert results[0] + "".join(piece[200:] for piece in results[1:]) == text
    assert len(results) == max(1, -(-(length - 200) // 9_800))


@pytest.mark.parametrize(
    ("size", "sent"),
    [
        ((64, 64), (64, 64)),
        ((50, 2048), (50, 2048)),
        ((8, 8), (50, 50)),
        ((32, 64), (50, 100)),
        ((16, 512), (50, 1600)),
        ((3000, 1500), (2048, 1024)),
        ((8, 512), (50, 2048)),
        ((4096, 64), (2048, 50)),
        ((1, 4096), (50, 2048)),
    ],
    ids=str,
)
def test_an_image_is_scaled_to_the_size_limits(size: tuple[int, int], sent: tuple[int, int]) -> None:
    pixels = np.full((size[1], size[0], 3), 200, np.uint8)
    with serving() as service, gate_to(service) as gate:
        assert gate.check_image(pixels).nsfw is False
        assert [image.size for image in service.images] == [sent]


@pytest.mark.parametrize(("size", "shown"), [((8, 512), (32, 2048)), ((4096, 64), (2048, 32))], ids=str)
def test_an_image_too_narrow_for_both_limits_gets_borders(size: tuple[int, int], shown: tuple[int, int]) -> None:
    framed = np.asarray(payloads.fit_image(Image.new("RGB", size, (255, 0, 0))))
    red = (framed == (255, 0, 0)).all(axis=-1)
    assert red.sum() == shown[0] * shown[1]
    assert (framed[~red] == 0).all()


def test_an_image_above_4_mb_as_png_is_sent_as_jpeg() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), np.uint8)
    with serving() as service, gate_to(service) as gate:
        assert gate.check_image(noise).nsfw is False
        (request,) = service.requests
    assert 1024 * 1024 < len(request.content) <= 4 * 1024 * 1024
    assert request.content.startswith(b"\xff\xd8")


MALFORMED = {
    "no category": without("SelfHarm"),
    "null": with_severity("Sexual", None),
    "text": with_severity("Hate", "0"),
    "true": with_severity("Hate", True),
    "8": with_severity("Violence", 8),
    "-1": with_severity("Violence", -1),
    "2.0": with_severity("Violence", 2.0),
    "no severity": Fault(alter=lambda answer: {"categoriesAnalysis": [{"category": name} for name in CLEAN]}),
    "no analysis": Fault(alter=lambda answer: {"blocklistsMatch": []}),
    "nameless blocklist": Fault(alter=lambda answer: {**answer, "blocklistsMatch": [{"blocklistName": 1}]}),
    "odd blocklists": Fault(alter=lambda answer: {**answer, "blocklistsMatch": 1}),
    "odd analysis": malformed(b'{"categoriesAnalysis": 1}'),
    "analysis of lists": malformed(b'{"categoriesAnalysis": [[]]}'),
    "list": malformed(b"[]"),
    "nothing": malformed(b""),
    "null body": malformed(b"null"),
    "half": malformed(b'{"categoriesAnalysis": ['),
    "bytes": malformed(b"\xff\xfe\x00"),
    "deep": malformed(b"[" * 100_000),
    "html": Fault(headers={"Content-Type": "text/html"}, body=b"<html>"),
    "xml": Fault(headers={"Content-Type": "application/xml"}, body=b"<html>"),
    "unknown charset": Fault(headers={"Content-Type": "application/json; charset=none"}, body=b"\xe9"),
    "not gzip": Fault(headers={"Content-Encoding": "gzip"}),
    "204": Fault(204, body=b""),
}
TRANSIENT = {str(code): status(code) for code in (408, 429, 500, 502, 503, 504)} | {"reset": RESET}


@pytest.mark.parametrize("fault", [*MALFORMED.values(), *TRANSIENT.values()], ids=[*MALFORMED, *TRANSIENT])
def test_failed_requests_are_retried_and_each_attempt_is_one_request(fault: Fault, short_backoff: list[int]) -> None:
    with serving(words=WORDS, faults=[fault, fault]) as service, gate_to(service) as gate:
        assert gate.check_prompt("gore").nsfw is True
        assert len(service.requests) == 3 and short_backoff == [1, 2]
        service.script([fault])
        assert gate.check_image(GREY).nsfw is False
        assert len(service.requests) == 3 + 2 and short_backoff == [1, 2, 1]


@pytest.mark.usefixtures("short_backoff")
def test_a_request_that_hangs_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_safety, "READ_SECONDS", 1.0)
    with serving(faults=[HANG]) as service, gate_to(service) as gate:
        assert gate.check_prompt("a red square").nsfw is False
        assert len(service.requests) >= 2  # on a very busy machine another may time out too


def test_a_429_without_retry_after_is_retried(clock: Clock) -> None:
    """The SDK itself would not retry."""
    with serving(faults=[status(429)]) as service, gate_to(service) as gate:
        assert gate.check_prompt("a red square").nsfw is False
    assert service.statuses == [429, 200] and 0.5 <= clock.now <= 1


def test_retry_after_is_respected(clock: Clock) -> None:
    """A date is relative to the real clock, which advances during the test."""
    dated = format_datetime(datetime.now(timezone.utc) + timedelta(hours=2), usegmt=True)
    faults = iter([status(429, dated), status(429, "0.7"), status(503, "0"), None])
    times = []

    def fault(request: ReceivedRequest) -> Fault | None:
        times.append(clock.now)
        return next(faults)

    with serving(faults=fault) as service, gate_to(service, timeout_seconds=10_000) as gate:
        assert gate.check_prompt("a red square").nsfw is False
    assert service.statuses == [429, 429, 503, 200]
    dated_gap, seconds_gap, zero_gap = (after - before for before, after in pairwise(times))
    assert 3600 < dated_gap <= 7200
    assert seconds_gap == pytest.approx(0.7)
    assert zero_gap == pytest.approx(0.5), "a retry without any delay would not help the service"


def test_formats_of_retry_after() -> None:
    now = datetime.now(timezone.utc)
    ahead = payloads.parse_retry_after(format_datetime(now + timedelta(hours=1)))
    assert ahead is not None and 0 < ahead <= 3600
    assert payloads.parse_retry_after(format_datetime(now - timedelta(seconds=60), usegmt=True)) == 0
    assert [payloads.parse_retry_after(text) for text in ("7", "0", "0.5", "-3")] == [7, 0, 0.5, 0]
    assert [payloads.parse_retry_after(text) for text in ("soon", "", None, "nan", "inf", "1 day")] == [None] * 6


def test_backoff_grows_to_twenty_seconds() -> None:
    states: list[Any] = [SimpleNamespace(attempt_number=n) for n in range(1, 12)]
    waits = [retries.BACKOFF(state) for state in states]
    for wait, minimum in zip(waits, [0.5, 1, 2, 4, 8, 16, 20, 20, 20, 20, 20], strict=True):
        assert minimum <= wait <= minimum + 0.5
    assert len({retries.BACKOFF(states[0]) for _ in range(9)}) > 1


@pytest.mark.usefixtures("short_backoff")
@pytest.mark.parametrize(
    "fault", [status(500), status(429, "3600"), RESET, without("Hate")], ids=["500", "429", "reset", "no category"]
)
def test_a_service_that_never_answers_is_an_error_after_the_timeout(fault: Fault, clock: Clock) -> None:
    with serving(faults=lambda request: fault) as service, gate_to(service, timeout_seconds=0.2) as gate:
        checks: list[Callable[[], Verdict]] = [
            lambda: gate.check_prompt("a red square"),
            lambda: gate.check_image(GREY),
        ]
        for check in checks:
            started = clock.now
            with pytest.raises(
                ServiceError,
                match=f"at {service.endpoint} has not answered for .* Run the same command again to continue",
            ):
                check()
            assert 0.2 <= clock.now - started + 1e-9 < 0.4
    assert all(text in ("a red square", None) for text in service.texts)


@pytest.mark.usefixtures("short_backoff")
def test_a_refused_connection_is_an_error_after_the_timeout() -> None:
    with serving() as service:
        pass
    with gate_to(service, timeout_seconds=0.2) as gate, pytest.raises(ServiceError, match="Connection refused"):
        gate.check_prompt("a red square")


def fail_odd(request: ReceivedRequest) -> Fault | None:
    return status(500) if request.kind == "text" and "odd" in request.content else None


@pytest.mark.usefixtures("short_backoff")
def test_a_row_without_an_answer_fails_if_others_are_answered(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another request is answered between two attempts."""

    def sleep(seconds: float) -> None:
        before = service.texts.count("another")
        assert eventually(lambda: service.texts.count("another") > before)
        Clock.sleep(clock, seconds)

    monkeypatch.setattr(clock, "sleep", sleep)
    with serving(faults=fail_odd) as service, gate_to(service, timeout_seconds=0.2, requests_per_second=1e6) as gate:
        with ThreadPoolExecutor(1) as pool:
            results = pool.submit(gate.check_prompt, "an odd one")
            while not results.done():
                assert gate.check_prompt("another").nsfw is False
        with pytest.raises(
            FailedRowError, match=r"no answer for this row's prompt \(HTTP 500: InternalError: instructed"
        ):
            results.result()
    assert "a red square" not in service.texts, "no probe is needed if others are answered"


@pytest.mark.usefixtures("short_backoff")
def test_a_row_without_an_answer_fails_if_a_probe_is_answered() -> None:
    """Otherwise the last row of a table could end every run."""
    with (
        serving(faults=fail_odd) as service,
        gate_to(service, timeout_seconds=0.2) as gate,
        pytest.raises(FailedRowError),
    ):
        gate.check_prompt("an odd one")
    assert service.texts[-1] == "a red square" and service.texts.count("a red square") == 1


@pytest.mark.usefixtures("short_backoff")
def test_the_service_can_be_down_for_images_alone() -> None:
    faults = {"image": status(503), "text": None}
    with serving(faults=lambda request: faults[request.kind]) as service, gate_to(service, timeout_seconds=0.3) as gate:
        with ThreadPoolExecutor(1) as pool:
            image = pool.submit(gate.check_image, GREY)
            while not image.done():
                assert gate.check_prompt("a red square").nsfw is False
        with pytest.raises(ServiceError):
            image.result()


@pytest.mark.usefixtures("short_backoff")
def test_an_outage_fails_no_row_even_if_others_were_answered_before() -> None:
    """The service answers most prompts for half a second and then none, for longer than the timeout."""

    def outage(request: ReceivedRequest) -> Fault | None:
        return status(500) if request.at > end or request.content == "the first to fail" else None

    with (
        serving(faults=outage, latency=0.02) as service,
        gate_to(service, timeout_seconds=2.0) as gate,
        ThreadPoolExecutor(gate.concurrency) as pool,
    ):
        end = time.monotonic() + 0.5
        results = [pool.submit(gate.check_prompt, "the first to fail")]
        results += [pool.submit(_check_repeatedly, gate) for _ in range(gate.concurrency - 1)]
    assert {type(error.exception()) for error in results} == {ServiceError}


def _check_repeatedly(gate: ContentSafety) -> Verdict:
    while gate.check_prompt("a blue ball").nsfw is False:
        pass
    pytest.fail("a blue ball is not unsafe")


def test_a_refused_row_fails_at_once_with_the_message_of_the_service() -> None:
    with serving(faults=[REJECTION, status(413), status(415)]) as service, gate_to(service) as gate:
        with pytest.raises(
            FailedRowError, match=r"this row's prompt \(HTTP 400: InvalidRequestBody: The text is too odd\.\)"
        ):
            gate.check_prompt("an odd one")
        for code in (413, 415):
            with pytest.raises(FailedRowError, match=f"this row's image .*HTTP {code}"):
                gate.check_image(GREY)
        with pytest.raises(FailedRowError, match="1 to 10000 characters"):
            gate.check_prompt("")
    assert len(service.requests) == 4


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (status(401), "refuses the key in CONTENT_SAFETY_KEY"),
        (status(403), "refuses the key in CONTENT_SAFETY_KEY"),
        (status(404), "see CONTENT_SAFETY_ENDPOINT"),
        (Fault(307, {"Location": "/contentsafety/text:analyze?api-version=2024-09-01"}), "see CONTENT_SAFETY_ENDPOINT"),
    ],
    ids=["401", "403", "404", "307"],
)
def test_wrong_settings_are_an_error_at_once(fault: Fault, words: str) -> None:
    with (
        serving(faults=lambda request: fault) as service,
        gate_to(service) as gate,
        pytest.raises(SettingsError, match=words),
    ):
        gate.check_prompt("a red square")
    assert len(service.requests) == 1


def test_requests_name_the_version_of_the_api() -> None:
    """The SDK's own default, 2023-10-01, is one that the service no longer supports."""
    with serving() as service, gate_to(service) as gate:
        gate.check_prompt("a red square")
        gate.check_image(GREY)
    assert [request.api_version for request in service.requests] == ["2024-09-01"] * 2
    with serving(api_version="2024-09-15-preview") as service:
        with gate_to(service, api_version="2024-09-15-preview") as gate:
            assert gate.check_prompt("a red square").nsfw is False
        with gate_to(service) as gate, pytest.raises(SettingsError, match="not found.*CONTENT_SAFETY_API_VERSION"):
            gate.check_prompt("a red square")


def test_a_response_that_refuses_the_version_is_a_settings_error() -> None:
    error = {"code": "UnsupportedApiVersion", "message": "The api-version '2020-01-01' is not supported."}
    fault = Fault(400, body=json.dumps({"error": error}).encode())
    with (
        serving(faults=lambda request: fault) as service,
        gate_to(service, api_version="2020-01-01") as gate,
        pytest.raises(SettingsError, match="see CONTENT_SAFETY_API_VERSION"),
    ):
        gate.check_prompt("a red square")
    assert len(service.requests) == 1


@pytest.mark.parametrize("code", [400, 401, 403, 404, 500])
def test_a_response_that_echoes_the_key_does_not_put_it_into_messages(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = f"{KEY}/+="
    monkeypatch.setenv("CONTENT_SAFETY_KEY", key)
    echo = f"no: key {key}, key%3D{KEY}%2F%2B%3D, Authorization: Bearer abc.def, {'x' * 280}{key}, eyJh.eyJi.c-_"
    fault = Fault(code, body=json.dumps({"error": {"code": "Denied", "message": echo}}).encode())
    with (
        serving(faults=lambda request: fault) as service,
        gate_to(service, timeout_seconds=0.2) as gate,
        pytest.raises((SettingsError, FailedRowError, ServiceError), match=f"HTTP {code}: Denied: no: key") as caught,
    ):
        gate.check_prompt("a red square")
    assert KEY not in str(caught.value)
    assert "abc.def" not in str(caught.value)


def test_a_wrong_key_and_an_unknown_blocklist_are_settings_errors() -> None:
    with serving(key="another") as service, gate_to(service) as gate, pytest.raises(SettingsError, match="HTTP 401"):
        gate.check_image(GREY)
    with (
        serving(blocklists={"brands": []}) as service,
        gate_to(service, blocklists=("brands", "bands")) as gate,
        pytest.raises(SettingsError, match="The blocklist bands does not exist.*CONTENT_SAFETY_BLOCKLISTS"),
    ):
        gate.check_prompt("a red square")


@pytest.mark.parametrize("fault", [status(500), status(429, "3600")], ids=["backoff", "Retry-After"])
def test_a_stop_ends_the_wait_before_a_retry(fault: Fault) -> None:
    stopping = threading.Event()
    with (
        serving(faults=lambda request: fault) as service,
        gate_to(service, stopping.is_set, timeout_seconds=7200) as gate,
    ):
        with ThreadPoolExecutor(1) as pool:
            request = pool.submit(gate.check_prompt, "a red square")
            assert eventually(lambda: bool(service.statuses))
            stopping.set()
            with pytest.raises(StoppedError):
                request.result(120)
        count = len(service.requests)
        with pytest.raises(StoppedError):
            gate.check_image(GREY)
        assert len(service.requests) == count


def test_a_stop_ends_the_wait_for_the_rate_limit() -> None:
    stopping = threading.Event()
    with serving() as service, gate_to(service, stopping.is_set, requests_per_second=0.001) as gate:
        gate.check_prompt("a red square")
        threading.Timer(0.2, stopping.set).start()
        with pytest.raises(StoppedError):
            gate.check_prompt("a red square")
        assert stopping.is_set()
    assert len(service.requests) == 1


def check_from_threads(service: Service, count: int, **settings: Any) -> list[Verdict]:
    with gate_to(service, **settings) as gate, ThreadPoolExecutor(gate.concurrency) as pool:
        return list(pool.map(gate.check_prompt, [f"prompt {k}" for k in range(count)]))


def test_threads_share_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows are 0.5 s instead of 10 s, so that requests on a busy machine have 2 s to arrive."""
    monkeypatch.setattr(retries, "SERVICE_WINDOW_SECONDS", 0.5)
    monkeypatch.setattr(retries, "WINDOW_SECONDS", 2.5)
    with serving() as service:
        check_from_threads(service, 40, requests_per_second=40)
    times = [request.at for request in service.requests]
    assert len(times) == 40 and max_requests_within(0.5, times) <= 20


@pytest.mark.soak
def test_threads_share_the_rate_in_the_windows_of_the_service() -> None:
    with serving() as service:
        check_from_threads(service, 64, requests_per_second=3.0)
    times = [request.at for request in service.requests]
    assert len(times) == 64 and max_requests_within(10.0, times) <= 30


@pytest.mark.parametrize(
    ("per_second", "limit", "milliseconds"),
    [(100, 1000, 10_500), (12.55, 125, 10_500), (0.1, 1, 10_500), (0.05, 1, 21_000)],
)
def test_a_rate_is_a_count_per_window(per_second: float, limit: int, milliseconds: int) -> None:
    rate: Rate = retries.make_rate(per_second)
    assert (rate.limit, rate.interval) == (limit, milliseconds)


def test_threads_keep_their_connections(caplog: pytest.LogCaptureFixture) -> None:
    """The default session would keep only ten of sixteen connections."""
    with (
        serving(together=ContentSafety.concurrency) as service,
        gate_to(service) as gate,
        ThreadPoolExecutor(gate.concurrency) as pool,
    ):
        for _ in range(3):
            assert len(list(pool.map(gate.check_prompt, ["a red square"] * gate.concurrency))) == gate.concurrency
        assert service.connections == gate.concurrency
    assert not caplog.records


@pytest.mark.usefixtures("short_backoff")
def test_no_verdict_is_lost_or_swapped_if_every_other_request_fails(caplog: pytest.LogCaptureFixture) -> None:
    """Many threads send requests, and all kinds of faults occur."""
    caplog.set_level(0)
    faults = [*MALFORMED.values(), *TRANSIENT.values(), status(429, "0"), Fault(hang=0.05)]
    rng = random.Random(0)
    prompts = [f"{'gore' if k % 3 == 0 else 'peace'} {k}" for k in range(150)]
    with (
        serving(words=WORDS, faults=(rng.choice([None, rng.choice(faults)]) for _ in iter(int, 1))) as service,
        gate_to(service, timeout_seconds=20) as gate,
        ThreadPoolExecutor(gate.concurrency) as pool,
    ):
        verdicts = list(pool.map(gate.check_prompt, prompts))
    assert [verdict.nsfw for verdict in verdicts] == [k % 3 == 0 for k in range(150)]
    assert len(service.requests) > 200 and set(service.texts) == set(prompts)
    logger_names = {record.name for record in caplog.records} - {"asyncio"}
    assert not logger_names, "the loggers of libraries are muted"


def test_credentials_are_a_key_or_an_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServiceSettings("https://name.cognitiveservices.azure.com")
    check_credentials(settings)
    monkeypatch.setenv("CONTENT_SAFETY_KEY", "\u2018key\u2019")
    with pytest.raises(SettingsError, match="characters that no key has"):
        check_credentials(settings)
    monkeypatch.setenv("CONTENT_SAFETY_KEY", " ")
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "EnvironmentCredential")
    for name in ("AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_CLIENT_SECRET"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match="needs a key in CONTENT_SAFETY_KEY, or an identity"):
        check_credentials(settings)
    with pytest.raises(SettingsError, match="no identity without https: set CONTENT_SAFETY_KEY"):
        check_credentials(ServiceSettings("http://127.0.0.1:1"))


class Identity(BaseHTTPRequestHandler):
    """The token endpoint of a managed identity on an Azure machine."""

    def do_GET(self) -> None:
        results = {"access_token": "the-token", "expires_on": str(int(time.time()) + 86_400), "token_type": "Bearer"}
        raw = json.dumps(results).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *rest: Any) -> None:
        pass


@pytest.fixture
def managed_identity(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CONTENT_SAFETY_KEY")
    with ThreadingHTTPServer(("127.0.0.1", 0), Identity) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "ManagedIdentityCredential")
        monkeypatch.setenv("IDENTITY_ENDPOINT", f"http://127.0.0.1:{server.server_port}/token")
        monkeypatch.setenv("IDENTITY_HEADER", "secret")
        yield
        server.shutdown()
        thread.join()


def certificate(folder: Path) -> Path:
    """Write a self-signed certificate for localhost with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    alternatives = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]
    )
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    builder = builder.add_extension(alternatives, False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = folder / "localhost.pem"
    file.write_bytes(private + builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return file


@pytest.mark.usefixtures("managed_identity")
def test_without_a_key_the_managed_identity_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = certificate(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(file))
    with serving(certificate=file, key=None, token="the-token", words=WORDS) as service:
        check_credentials(ServiceSettings(service.endpoint))
        with gate_to(service) as gate:
            assert gate.check_prompt("gore").nsfw is True
            assert gate.check_image(GREY).nsfw is False
    with (
        serving(certificate=file, key=None, token="another") as service,
        gate_to(service) as gate,
        pytest.raises(SettingsError, match="identity .* role Cognitive Services User"),
    ):
        gate.check_prompt("a red square")


@pytest.mark.parametrize("library", ["azure.ai.contentsafety", "tenacity"])
def test_a_missing_library_is_an_error_with_the_pip_command(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    settings = ServiceSettings("http://127.0.0.1:1")
    for start in (check_credentials, ContentSafety):
        with pytest.raises(SettingsError, match=rf"needs {library}: pip install azure-ai-contentsafety "):
            start(settings)


def test_the_server_can_run_as_a_process() -> None:
    command = [sys.executable, "-m", "tests.content_safety_server", "0", "gore=Violence:4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            endpoint = process.stdout.readline().strip()
            gate = ContentSafety(ServiceSettings(endpoint, timeout_seconds=5))
            assert gate.check_prompt("gore").nsfw is True
            gate.close()
            with urllib.request.urlopen(endpoint) as answer:
                assert json.load(answer) == {"texts": ["gore"], "images": 0, "statuses": [200]}
        finally:
            process.kill()
