"""Call Azure AI Content Safety through Microsoft's SDK.

The SDK's own retries are off, because they cannot be stopped and handle a 429 only if it has a Retry-After header. Each
attempt is one request, and `retries` decides when to send the next one.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from batch_infer import __version__
from batch_infer.errors import FailedRowError, SettingsError, first_line
from batch_infer.extras import install_command
from batch_infer.records import Verdict
from batch_infer.safety import payloads
from batch_infer.safety.payloads import SERVICE, Analysis, Kind, NoAnswerError
from batch_infer.settings import CATEGORIES, DEFAULT_API_VERSION, ServiceSettings

if TYPE_CHECKING:
    from azure.core.credentials import AzureKeyCredential
    from azure.core.exceptions import AzureError
    from azure.identity import DefaultAzureCredential
    from requests import Session

log = logging.getLogger("batch_infer")

KEY_VARIABLE = "CONTENT_SAFETY_KEY"
SCOPE = "https://cognitiveservices.azure.com/.default"
CONNECTION_SECONDS, READ_SECONDS = 5.0, 10.0
LIBRARIES = ("azure.ai.contentsafety", "azure.identity", "pyrate_limiter", "requests", "tenacity")
MUTED_LOGGERS = ("azure", "msal", "urllib3", "pyrate_limiter")
TRANSIENT = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
MAX_REASON_LENGTH = 300
TOKEN = re.compile(r"(?<=Bearer )\S+|\beyJ[\w-]+\.[\w-]+\.[\w-]+")
"""Matches bearer tokens and JSON web tokens, the credentials that DefaultAzureCredential sends."""
BLACK_IMAGE = payloads.encode_image(np.zeros((64, 64, 3), np.uint8))


class ContentSafety:
    """Gate that calls the service. Up to `concurrency` threads may use it, and share its connections and rate limit."""

    name = payloads.CHECKER_NAME
    concurrency = 16

    def __init__(self, settings: ServiceSettings, stop: Callable[[], bool] = lambda: False) -> None:
        """Waits between requests end when `stop` returns True. Raises SettingsError."""
        _import_libraries()
        from azure.ai.contentsafety import ContentSafetyClient
        from azure.core.pipeline.transport import RequestsTransport

        from batch_infer.safety.retries import RetryingClient

        self._settings = settings
        self._credential = _make_credential(settings)
        self._session = _make_session(self.concurrency)
        transport = RequestsTransport(
            session=self._session,
            session_owner=False,
            connection_timeout=min(CONNECTION_SECONDS, settings.timeout_seconds),
            read_timeout=min(READ_SECONDS, settings.timeout_seconds / 2),  # leaves time for a second attempt
        )
        self._client = ContentSafetyClient(
            settings.endpoint.rstrip("/"),
            self._credential,
            api_version=settings.api_version or DEFAULT_API_VERSION,
            transport=transport,
            retry_total=0,
            permit_redirects=False,
            user_agent=f"batch-infer/{__version__}",
        )
        self._retrying = RetryingClient(settings, stop)

    def check_prompt(self, prompt: str) -> Verdict:
        """Check a prompt. A prompt of more than 10,000 characters is sent in overlapping pieces."""
        probe = partial(self._send_text, "a red square")
        attempts = [partial(self._send_text, piece, self._settings.blocklists) for piece in payloads.split_text(prompt)]
        analyses = [self._retrying.call("prompt", attempt, probe) for attempt in attempts]
        return payloads.make_verdict("prompt", analyses, self._settings)

    def check_image(self, image: np.ndarray) -> Verdict:
        """Check an image (H, W, 3) uint8. One outside the service's limits is scaled, padded or sent as JPEG."""
        attempt = partial(self._send_image, payloads.encode_image(image))
        analysis = self._retrying.call("image", attempt, partial(self._send_image, BLACK_IMAGE))
        return payloads.make_verdict("image", [analysis], self._settings)

    def close(self) -> None:
        self._retrying.close()
        self._client.close()
        self._session.close()
        if close := getattr(self._credential, "close", None):
            close()

    def _send_text(self, text: str, blocklists: tuple[str, ...] = ()) -> Analysis:
        from azure.ai.contentsafety.models import AnalyzeTextOptions

        options = AnalyzeTextOptions(
            text=text,
            categories=list(CATEGORIES),
            blocklist_names=list(blocklists),
            halt_on_blocklist_hit=False,
            output_type="FourSeverityLevels",
        )
        return self._send("prompt", self._client.analyze_text, options, with_blocklists=bool(blocklists))

    def _send_image(self, content: bytes) -> Analysis:
        from azure.ai.contentsafety.models import AnalyzeImageOptions, ImageData

        options = AnalyzeImageOptions(
            image=ImageData(content=content), categories=list(CATEGORIES), output_type="FourSeverityLevels"
        )
        return self._send("image", self._client.analyze_image, options)

    def _send(self, kind: Kind, method: Callable[..., Any], options: Any, *, with_blocklists: bool = False) -> Analysis:
        """Send one request. Raises NoAnswerError, FailedRowError, SettingsError."""
        from azure.core.exceptions import AzureError

        try:
            # The callback returns the plain JSON, because the SDK's model would hide missing values.
            body = method(options, cls=lambda response, *_: response.http_response.json())
            return Analysis.parse(body, with_blocklists=with_blocklists)
        except AzureError as error:
            raise self._translate(error, kind) from error
        except (ValueError, LookupError, RecursionError) as error:  # invalid JSON or encoding
            raise NoAnswerError(payloads.UNREADABLE) from error

    def _translate(self, error: AzureError, kind: Kind) -> Exception:
        """Convert an exception of the SDK to one of this package."""
        from azure.core.exceptions import ClientAuthenticationError

        status: int = getattr(error, "status_code", None) or 0
        reason, service = _describe(error, status), f"{SERVICE} at {self._settings.endpoint}"
        if status < 300 or status >= 500 or status in TRANSIENT:
            headers = getattr(getattr(error, "response", None), "headers", {})
            return NoAnswerError(reason, payloads.parse_retry_after(headers.get("Retry-After")))
        # A ClientAuthenticationError from the issuer of tokens may have any status.
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN) or isinstance(error, ClientAuthenticationError):
            credential = "identity from DefaultAzureCredential, which needs the role Cognitive Services User there"
            if _read_key():
                credential = f"key in {KEY_VARIABLE}, which must belong to that resource"
            return SettingsError(f"{service} refuses the {credential} ({reason})")
        if self._settings.blocklists and "blocklist" in reason.lower():
            return SettingsError(f"{service} refuses the blocklists ({reason}): see CONTENT_SAFETY_BLOCKLISTS")
        if re.search("api-?version", reason, re.IGNORECASE):
            return SettingsError(f"{service} refuses the version of its API ({reason}): see CONTENT_SAFETY_API_VERSION")
        if status < 400 or status == HTTPStatus.NOT_FOUND:
            variables = "CONTENT_SAFETY_ENDPOINT and CONTENT_SAFETY_API_VERSION"
            return SettingsError(f"{service} is not found ({reason}): see {variables}")
        return FailedRowError(f"{SERVICE} refuses this row's {kind} ({reason})")


def check_credentials(settings: ServiceSettings) -> None:
    """Check that there is a key, or an identity that can get a token. Raises SettingsError."""
    _import_libraries()
    from azure.core.credentials import AzureKeyCredential
    from azure.core.exceptions import AzureError

    credential = _make_credential(settings)
    if isinstance(credential, AzureKeyCredential):
        return
    with credential:
        try:
            credential.get_token(SCOPE)
        except AzureError as error:
            log.debug("%s", _redact(str(error)))
            raise SettingsError(
                f"{SERVICE} needs a key in {KEY_VARIABLE}, or an identity that DefaultAzureCredential finds (a managed"
                f" identity, az login, AZURE_CLIENT_ID and so on), and there is neither: {_redact(first_line(error))}"
            ) from error


def _import_libraries() -> None:
    """Import the libraries of the `azure` extra and mute their loggers. Raises SettingsError with the pip command."""
    for library in LIBRARIES:
        try:
            import_module(library)
        except ImportError as error:
            raise SettingsError(f"--safety azure needs {library}: {install_command('azure')}") from error
    for name in MUTED_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _read_key() -> str:
    return os.environ.get(KEY_VARIABLE, "").strip()


def _make_credential(settings: ServiceSettings) -> AzureKeyCredential | DefaultAzureCredential:
    """Return the key from the environment, or else azure-identity's default credential, without testing it.

    Raises SettingsError if the key contains invalid characters, or if an identity would be sent without https.
    """
    from azure.core.credentials import AzureKeyCredential
    from azure.identity import DefaultAzureCredential

    key = _read_key()
    if not (key.isascii() and key.isprintable()):
        raise SettingsError(f"{KEY_VARIABLE} contains characters that no key has: copy it again from the resource")
    if key:
        return AzureKeyCredential(key)
    if settings.endpoint.startswith("http://"):
        raise SettingsError(f"{SERVICE} at {settings.endpoint} accepts no identity without https: set {KEY_VARIABLE}")
    return DefaultAzureCredential()


def _make_session(connections: int) -> Session:
    """Create a session that keeps up to `connections` connections open, instead of the default of ten."""
    from requests import Session
    from requests.adapters import HTTPAdapter

    session = Session()
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=connections))
    return session


def _describe(error: AzureError, status: int) -> str:
    """Return one short line about an error.

    It contains the HTTP status with the service's error code and message, or the cause of a connection error. After a
    successful status, it says that the response is unreadable.
    """
    if 200 <= status < 300:
        return payloads.UNREADABLE
    if status:
        details = getattr(error, "error", None)
        # str, because values may have any JSON type.
        parts = [str(part) for part in (getattr(details, "code", None), getattr(details, "message", None)) if part]
        message = ": ".join(part for part in parts if part != str(status)) or getattr(error, "reason", None)
        text = f"HTTP {status}: {message or 'no reason given'}"
    else:
        cause: BaseException = error.inner_exception or error
        while cause.__context__ is not None:
            cause = cause.__context__
        text = str(cause) or type(cause).__name__
    return " ".join(_redact(text).split())[:MAX_REASON_LENGTH]


def _redact(text: str) -> str:
    """Replace the key and tokens in a text. A proxy may echo the headers of a request that it rejects."""
    for secret in filter(None, (_read_key(), quote(_read_key(), safe=""))):
        text = text.replace(secret, "***")
    return TOKEN.sub("***", text)
