"""Define what stores need from a service besides fsspec: conditional puts, its clock, and complete copies."""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, Protocol

from batch_infer.store.clients import CONFLICT, NOT_FOUND

PRECONDITION_FAILED = 412
REFUSALS = {NOT_FOUND, CONFLICT, PRECONDITION_FAILED}
"""HTTP status codes of conditional puts whose condition is not met."""


class Version(NamedTuple):
    """An object as it was read. `version` is its ETag or generation. Times are in seconds by the service's clock."""

    content: bytes
    version: str
    modified_at: float
    read_at: float


class ConditionalPuts(Protocol):
    """Conditional puts to paths of a file system. All methods raise the errors of the client libraries.

    A put whose response was lost is repeated by the library, and then seems to have failed. The caller can read the
    object to see whether it has its own content.
    """

    def __init__(self, system: Any) -> None: ...

    def create(self, path: str, content: bytes) -> str | None:
        """Store an object unless it exists, and return its version, or None if it exists."""
        ...

    def replace(self, path: str, content: bytes, version: str) -> str | None:
        """Replace this version of an object, and return the new version, or None if it has changed or is missing."""
        ...

    def read(self, path: str) -> Version | None:
        """Return an object, or None if it is missing."""
        ...

    def now(self, path: str) -> float:
        """Return the time by the service's clock. `path` may be missing."""
        ...

    def copy(self, path: str, new_path: str) -> None:
        """Copy an object within the service. Raises FileNotFoundError."""
        ...


def get_response_time(headers: Mapping[str, str]) -> float:
    """Return the time in seconds at which a server responded, or this machine's time if a proxy has removed it."""
    date = next((value for name, value in headers.items() if name.lower() == "date"), None)
    return time.time() if date is None else parsedate_to_datetime(date).timestamp()
