"""Azure AI Content Safety, asked about prompts and images through Microsoft's own SDK.

The SDK's own retries are switched off: it asks again after a 429 only where the service says when, and knows nothing of
a run that stops. So every attempt is one request, and `patience` says when the next one comes.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from batch_infer import __version__
from batch_infer.errors import RowBroken, SettingsError, first_line
from batch_infer.records import Verdict
from batch_infer.safety import answers, limits
from batch_infer.safety.answers import SERVICE, Answer, Kind, NoAnswer
from batch_infer.settings import CATEGORIES, ServiceSettings

if TYPE_CHECKING:
    from azure.core.credentials import AzureKeyCredential
    from azure.core.exceptions import AzureError
    from azure.identity import DefaultAzureCredential
    from requests import Session

log = logging.getLogger("batch_infer")

KEY = "CONTENT_SAFETY_KEY"
SCOPE = "https://cognitiveservices.azure.com/.default"
CONNECTION_SECONDS, READ_SECONDS = 5.0, 10.0
LIBRARIES = ("azure.ai.contentsafety", "azure.identity", "pyrate_limiter", "requests", "tenacity")
NOISY = ("azure", "msal", "urllib3", "pyrate_limiter")
"""Whose logs would stand between a command's own lines."""
TIMED_OUT, TOO_MANY = 408, 429
UNAUTHORIZED, FORBIDDEN, NOT_FOUND = 401, 403, 404
LONGEST_REASON = 300
TOKEN = re.compile(r"(?<=Bearer )\S+|\beyJ[\w-]+\.[\w-]+\.[\w-]+")
"""What DefaultAzureCredential sends: a JSON web token."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request's worth of a prompt or an image, and the SDK's method and model for it."""

    kind: Kind
    method: str
    options: Any
    with_blocklists: bool = False

    @classmethod
    def of_text(cls, text: str, blocklists: tuple[str, ...] = ()) -> Question:
        from azure.ai.contentsafety.models import AnalyzeTextOptions

        options = AnalyzeTextOptions(
            text=text,
            categories=list(CATEGORIES),
            blocklist_names=list(blocklists),
            halt_on_blocklist_hit=False,
            output_type="FourSeverityLevels",
        )
        return cls("prompt", "analyze_text", options, bool(blocklists))

    @classmethod
    def of_image(cls, pixels: np.ndarray) -> Question:
        from azure.ai.contentsafety.models import AnalyzeImageOptions, ImageData

        image = ImageData(content=limits.image_file(pixels))
        options = AnalyzeImageOptions(image=image, categories=list(CATEGORIES), output_type="FourSeverityLevels")
        return cls("image", "analyze_image", options)

    def harmless(self) -> Question:
        """One of the same kind that no row is to blame for."""
        return self.of_text("a red square") if self.kind == "prompt" else self.of_image(np.zeros((64, 64, 3), np.uint8))


class ContentSafety:
    """The service as a gate; `stop` says whether the run stops, which ends every wait.

    Its methods may be called by `at_once` threads, which share its connections and its rate.
    """

    name = answers.NAME
    at_once = 16

    def __init__(self, settings: ServiceSettings, stop: Callable[[], bool] = lambda: False) -> None:
        """Raises SettingsError."""
        _refuse_without_libraries()
        from azure.ai.contentsafety import ContentSafetyClient
        from azure.core.pipeline.transport import RequestsTransport

        from batch_infer.safety.patience import Patience

        self._settings = settings
        self._credential = _credential(settings)
        self._session = _session(self.at_once)
        transport = RequestsTransport(
            session=self._session,
            session_owner=False,
            connection_timeout=min(CONNECTION_SECONDS, settings.patience),
            read_timeout=min(READ_SECONDS, settings.patience / 2),  # one that hangs leaves time for another
        )
        self._client = ContentSafetyClient(
            settings.endpoint.rstrip("/"),
            self._credential,
            transport=transport,
            retry_total=0,
            permit_redirects=False,
            user_agent=f"batch-infer/{__version__}",
        )
        self._patience = Patience(settings, stop)

    def check_prompt(self, prompt: str) -> Verdict:
        """What it says of a prompt; one of more than 10,000 characters is asked about in pieces that overlap."""
        blocklists = self._settings.blocklists
        found = [self._ask(Question.of_text(piece, blocklists)) for piece in limits.pieces(prompt)]
        return answers.verdict_of("prompt", found, self._settings)

    def check_image(self, image: np.ndarray) -> Verdict:
        """What it says of an image (H, W, 3) uint8, which is scaled where it is too small or too large for it."""
        return answers.verdict_of("image", [self._ask(Question.of_image(image))], self._settings)

    def close(self) -> None:
        self._patience.close()
        self._client.close()
        self._session.close()
        if close := getattr(self._credential, "close", None):
            close()

    def _ask(self, question: Question) -> Answer:
        attempt, harmless = (lambda: self._attempt(question)), (lambda: self._attempt(question.harmless()))
        return self._patience.ask(question.kind, attempt, harmless)

    def _attempt(self, question: Question) -> Answer:
        """One request. Raises NoAnswer, RowBroken, SettingsError."""
        from azure.core.exceptions import AzureError

        method = getattr(self._client, question.method)
        try:
            # The JSON itself: the SDK's model of it would not show what is missing.
            found = method(question.options, cls=lambda response, *_: response.http_response.json())
            return Answer.read(found, with_blocklists=question.with_blocklists)
        except AzureError as error:
            raise self._meaning(error, question.kind) from error
        except (ValueError, LookupError, RecursionError) as error:  # JSON and its encoding break in many ways
            raise NoAnswer(answers.UNREADABLE) from error

    def _meaning(self, error: AzureError, kind: Kind) -> Exception:
        """What an error of the SDK's is to us."""
        from azure.core.exceptions import ClientAuthenticationError

        status: int = getattr(error, "status_code", None) or 0
        reason, told = _reason(error, status), f"{SERVICE} at {self._settings.endpoint}"
        if status < 300 or status >= 500 or status in (TIMED_OUT, TOO_MANY):
            headers = getattr(getattr(error, "response", None), "headers", {})
            return NoAnswer(reason, answers.retry_after(headers.get("Retry-After")))
        # The second is told by who gives tokens, by any status.
        if status in (UNAUTHORIZED, FORBIDDEN) or isinstance(error, ClientAuthenticationError):
            return SettingsError(f"{told} refuses {_who_asks()} ({reason})")
        if self._settings.blocklists and "blocklist" in reason.lower():
            return SettingsError(f"{told} does not take the blocklists ({reason}): see CONTENT_SAFETY_BLOCKLISTS")
        if status < 400 or status == NOT_FOUND:
            return SettingsError(f"{told} is not found ({reason}): see CONTENT_SAFETY_ENDPOINT")
        return RowBroken(f"{SERVICE} does not judge this row's {kind} ({reason})")


def check_credentials(settings: ServiceSettings) -> None:
    """See that there is a key, or an identity with a token, before anything starts. Raises SettingsError."""
    _refuse_without_libraries()
    from azure.core.credentials import AzureKeyCredential
    from azure.core.exceptions import AzureError

    credential = _credential(settings)
    if isinstance(credential, AzureKeyCredential):
        return
    with credential:
        try:
            credential.get_token(SCOPE)
        except AzureError as error:
            log.debug("%s", _without_secrets(str(error)))
            raise SettingsError(
                f"{SERVICE} needs a key in {KEY}, or an identity that DefaultAzureCredential finds (a managed identity,"
                f" az login, AZURE_CLIENT_ID and its like), and there is neither: {_without_secrets(first_line(error))}"
            ) from error


def _refuse_without_libraries() -> None:
    """Also keeps the libraries' logs from the terminal, from here on. Raises SettingsError, with the way out."""
    for library in LIBRARIES:
        try:
            import_module(library)
        except ImportError as error:
            raise SettingsError(f"--safety azure needs {library}: pip install 'batch-infer[azure]'") from error
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _credential(settings: ServiceSettings) -> AzureKeyCredential | DefaultAzureCredential:
    """The key in the environment, or else what azure-identity finds, which may turn out to be nothing."""
    from azure.core.credentials import AzureKeyCredential
    from azure.identity import DefaultAzureCredential

    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise SettingsError(f"{KEY} holds characters that no key has: copy it once more from the resource")
    if key:
        return AzureKeyCredential(key)
    if settings.endpoint.startswith("http://"):
        raise SettingsError(f"{SERVICE} at {settings.endpoint} takes no identity without https: set {KEY}")
    return DefaultAzureCredential()


def _who_asks() -> str:
    if os.environ.get(KEY, "").strip():
        return f"the key in {KEY}, which must be one of that resource's"
    return "the identity that DefaultAzureCredential found, which needs the role Cognitive Services User there"


def _session(connections: int) -> Session:
    """A session with a connection for each thread; by default there would be ten."""
    from requests import Session
    from requests.adapters import HTTPAdapter

    session = Session()
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=connections))
    return session


def _reason(error: AzureError, status: int) -> str:
    """What went wrong, in one short line: the service's own code and message where it gave them."""
    if 200 <= status < 300:
        return answers.UNREADABLE
    if status:
        told = getattr(error, "error", None)
        # str: what is no text is said too.
        words = [str(word) for word in (getattr(told, "code", None), getattr(told, "message", None)) if word]
        text = ": ".join(word for word in words if word != str(status)) or getattr(error, "reason", None)
        return _short(f"HTTP {status}: {text or 'no reason given'}")
    deepest: BaseException = error.inner_exception or error
    while deepest.__context__ is not None:
        deepest = deepest.__context__
    return _short(str(deepest) or type(deepest).__name__)


def _short(text: str) -> str:
    return " ".join(_without_secrets(text).split())[:LONGEST_REASON]


def _without_secrets(text: str) -> str:
    """What somebody else said, without our key and without tokens: a proxy may echo the headers that it refuses."""
    key = os.environ.get(KEY, "").strip()
    for secret in filter(None, (key, quote(key, safe=""))):
        text = text.replace(secret, "***")
    return TOKEN.sub("***", text)
