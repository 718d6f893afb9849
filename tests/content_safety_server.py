"""A local server with the API of Azure AI Content Safety. It is as strict as the service, and can simulate faults.

It can run as a process: `python -m tests.content_safety_server PORT [WORD=CATEGORY:SEVERITY]...`. A GET request
returns what the server has received: `{"texts": [...], "images": 2, "statuses": [...]}`.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from PIL import Image, UnidentifiedImageError

CATEGORIES = ("Hate", "SelfHarm", "Sexual", "Violence")
KEY = "0123456789abcdef0123456789abcdef"
API_VERSION = "2024-09-01"
ROUTES: dict[str, Literal["text", "image"]] = {
    "/contentsafety/text:analyze": "text",
    "/contentsafety/image:analyze": "image",
}
Severities = Mapping[str, int]


@dataclass(frozen=True)
class Fault:
    """Replaces or changes the response to one request."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """Sent unchanged. None sends an error object with the status, or the regular response for status 200."""
    alter: Callable[[dict[str, Any]], Any] = lambda answer: answer
    hang: float = 0.0
    """Seconds of silence before anything is sent."""
    reset: bool = False
    """Reset the connection without a response."""


def status(code: int, retry_after: str | None = None) -> Fault:
    return Fault(code, {} if retry_after is None else {"Retry-After": retry_after})


def malformed(body: bytes) -> Fault:
    return Fault(body=body)


def without(category: str) -> Fault:
    """Respond without a category."""
    return Fault(alter=lambda answer: {**answer, "categoriesAnalysis": [
        entry for entry in answer["categoriesAnalysis"] if entry["category"] != category
    ]})  # fmt: skip


def with_severity(category: str, severity: Any) -> Fault:
    """Respond with this severity of a category."""
    return Fault(alter=lambda answer: {**answer, "categoriesAnalysis": [
        {**entry, "severity": severity} if entry["category"] == category else entry
        for entry in answer["categoriesAnalysis"]
    ]})  # fmt: skip


RESET = Fault(reset=True)
HANG = Fault(hang=60.0)


@dataclass(frozen=True)
class ReceivedRequest:
    """A request with its time (time.monotonic) and connection."""

    kind: Literal["text", "image"]
    at: float
    client: tuple[str, int]
    body: Any
    headers: Mapping[str, str]
    api_version: str | None = None

    @property
    def content(self) -> Any:
        """The text, or the bytes of the image file, or None if it is missing."""
        if not isinstance(self.body, dict):
            return None
        if self.kind == "text":
            return self.body.get("text")
        try:
            return base64.b64decode(self.body["image"]["content"], validate=True)
        except (KeyError, TypeError, binascii.Error):
            return None


Faults = Iterable[Fault | None] | Callable[[ReceivedRequest], Fault | None]


@dataclass(frozen=True)
class Rules:
    """Responses to texts and images, and the requests that fail.

    `words` maps words in a text to category and severity, `classify` returns the severities of an image that are not 0,
    and `blocklists` maps the name of each blocklist to its words. `faults` contains the faults of the next requests in
    order (None: no fault), or is a function that chooses them. Requests need `key` or a bearer `token`. The server
    waits for `together` requests before it responds.
    """

    words: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    classify: Callable[[Image.Image], Severities] = lambda image: {}
    blocklists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    faults: Faults = ()
    key: str | None = KEY
    token: str | None = None
    api_version: str = API_VERSION
    """Requests with another version get the response of the service, 404."""
    latency: float = 0.0
    together: int = 1


class ErrorResponse(Exception):
    """An error response: status, code and message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


class Service(ThreadingHTTPServer):
    """The server and all requests that it has received."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, rules: Rules, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Exchange)
        self.rules = rules
        self.requests: list[ReceivedRequest] = []
        self.statuses: list[int] = []
        self.closing = threading.Event()
        self.together = threading.Barrier(rules.together)
        self._lock = threading.Lock()
        self.script(rules.faults)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    @property
    def texts(self) -> list[str]:
        """The texts of all requests, in order."""
        return [request.content for request in self.requests if request.kind == "text"]

    @property
    def images(self) -> list[Image.Image]:
        """The images of all requests, in order."""
        files = [request.content for request in self.requests if request.kind == "image"]
        return [Image.open(io.BytesIO(file)) for file in files]

    @property
    def connections(self) -> int:
        return len({request.client for request in self.requests})

    def script(self, faults: Faults) -> None:
        """Set the faults of the next requests."""
        with self._lock:
            remaining = iter(()) if callable(faults) else iter(faults)
            self._fault_of = faults if callable(faults) else lambda request: next(remaining, None)

    def record(self, request: ReceivedRequest) -> Fault | None:
        """Record a request and return its fault."""
        with self._lock:
            self.requests.append(request)
            return self._fault_of(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore disconnected clients, which tests cause on purpose."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Exchange(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Service

    def do_GET(self) -> None:
        service = self.server
        self._send(200, {"texts": service.texts, "images": len(service.images), "statuses": service.statuses})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        url = urlsplit(self.path)
        if url.path not in ROUTES:
            self._send(404, {"error": {"code": "404", "message": "Resource not found"}})
            return
        (version,) = parse_qs(url.query).get("api-version") or (None,)
        request = ReceivedRequest(
            ROUTES[url.path], time.monotonic(), self.client_address, _json(raw), dict(self.headers), version
        )
        fault = self.server.record(request) or Fault()
        self.server.together.wait(300)
        if self.server.closing.wait(max(fault.hang, self.server.rules.latency)) or fault.reset:
            self._reset()
            return
        code, answer = self._answer(request) if fault.status == 200 else _error(fault.status)
        body = fault.body if fault.body is not None else fault.alter(answer) if code == 200 else answer
        self._send(code, body, fault.headers)

    def _answer(self, request: ReceivedRequest) -> tuple[int, dict[str, Any]]:
        rules = self.server.rules
        try:
            _check_caller(request, rules)
            _check_body(request.body)
            return 200, _analyze_text(request.body, rules) if request.kind == "text" else _analyze_image(request, rules)
        except ErrorResponse as error:
            return error.status, {"error": {"code": error.code, "message": error.message}}

    def _send(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.server.statuses.append(status)
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *rest: Any) -> None:
        pass


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None


def _error(status: int) -> tuple[int, dict[str, Any]]:
    codes = {400: "InvalidRequestBody", 429: "TooManyRequests", 500: "InternalError", 503: "ServerBusy"}
    return status, {"error": {"code": codes.get(status, str(status)), "message": f"instructed to answer {status}"}}


def _check_caller(request: ReceivedRequest, rules: Rules) -> None:
    headers = {name.lower(): value for name, value in request.headers.items()}
    has_token = rules.token is not None and headers.get("authorization") == f"Bearer {rules.token}"
    has_key = rules.key is not None and headers.get("ocp-apim-subscription-key") == rules.key
    if not (has_token or has_key):
        raise ErrorResponse(401, "401", "Access denied due to invalid subscription key or wrong API endpoint.")
    if request.api_version != rules.api_version:
        raise ErrorResponse(404, "404", "Resource not found")


def _check_body(body: Any) -> None:
    if not isinstance(body, dict):
        raise ErrorResponse(400, "InvalidRequestBody", "The request body is not JSON.")
    if not set(body.get("categories", ())) <= set(CATEGORIES):
        raise ErrorResponse(400, "InvalidRequestBody", "A category is not known.")
    if body.get("outputType", "FourSeverityLevels") != "FourSeverityLevels":
        raise ErrorResponse(400, "InvalidRequestBody", "The output type is not known.")


def _analyze_text(body: dict[str, Any], rules: Rules) -> dict[str, Any]:
    text, names = body.get("text"), body.get("blocklistNames") or []
    if not isinstance(text, str) or not text or len(text) > 10_000:
        raise ErrorResponse(400, "InvalidRequestBody", "The text must have 1 to 10000 characters.")
    if unknown := [name for name in names if name not in rules.blocklists]:
        raise ErrorResponse(404, "ResourceNotFound", f"The blocklist {unknown[0]} does not exist.")
    words = text.split()
    severities: dict[str, int] = {}
    for word in words:
        category, severity = rules.words.get(word, ("Hate", 0))
        severities[category] = max(severity, severities.get(category, 0))
    matches = [
        {"blocklistName": name, "blocklistItemId": f"{name}-{word}", "blocklistItemText": word}
        for name in names
        for word in rules.blocklists[name]
        if word in text
    ]
    return {"blocklistsMatch": matches, **_analysis(body, severities)}


def _analyze_image(request: ReceivedRequest, rules: Rules) -> dict[str, Any]:
    file = request.content
    if file is None:
        raise ErrorResponse(400, "InvalidRequestBody", "The image is not base64.")
    if len(file) > 4 * 1024 * 1024:
        raise ErrorResponse(400, "InvalidRequestBody", f"The image of {len(file)} bytes is larger than 4194304 bytes.")
    try:
        with Image.open(io.BytesIO(file)) as image:
            image.load()
    except (UnidentifiedImageError, OSError) as error:
        raise ErrorResponse(400, "InvalidRequestBody", "The image cannot be read.") from error
    if not all(50 <= side <= 2048 for side in image.size):
        raise ErrorResponse(
            400, "InvalidRequestBody", f"The image has {image.size} pixels: sides of 50 to 2048 pixels are allowed."
        )
    return _analysis(request.body, rules.classify(image))


def _analysis(body: dict[str, Any], severities: Severities) -> dict[str, Any]:
    names = body.get("categories") or CATEGORIES
    return {"categoriesAnalysis": [{"category": name, "severity": severities.get(name, 0)} for name in names]}


@contextmanager
def serving(rules: Rules | None = None, certificate: Path | None = None, **more: Any) -> Iterator[Service]:
    """Run a server with rules, or with `more` as the fields of Rules. Uses TLS if there is a certificate file."""
    with Service(rules or Rules(**more)) as service:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            service.socket = context.wrap_socket(service.socket, server_side=True)
            service.endpoint = service.endpoint.replace("http://127.0.0.1", "https://localhost")
        thread = threading.Thread(target=service.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield service
        finally:
            service.closing.set()
            service.shutdown()
            thread.join()


def main(port: str, *words: str) -> None:
    rules = {}
    for entry in words:
        word, _, severities = entry.partition("=")
        category, _, severity = severities.partition(":")
        rules[word] = (category, int(severity))
    with Service(Rules(words=rules), int(port)) as service:
        print(service.endpoint, flush=True)
        service.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
