"""Open the service that a URL of OUT names. A new service needs an implementation of `ConditionalPuts` and an entry."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from batch_infer.errors import SettingsError
from batch_infer.store.clients import StorageErrors, connect, describe
from batch_infer.store.objects.conditional_puts import ConditionalPuts
from batch_infer.store.urls import get_protocol, redact_url

SERVICES = {
    **dict.fromkeys(("s3", "s3a"), ("s3", "S3Puts")),
    **dict.fromkeys(("abfss", "abfs", "az"), ("azure", "AzurePuts")),
    **dict.fromkeys(("gs", "gcs"), ("google", "GooglePuts")),
}
"""The module and class of the conditional puts of each protocol that OUT can have."""


class Service(NamedTuple):
    """fsspec's file system, the path of OUT in it, and its conditional puts."""

    system: Any
    root: str
    puts: ConditionalPuts


def parse_location(url: str) -> str:
    """Return the URL of OUT without slashes at its end. Raises SettingsError if OUT cannot be at this URL."""
    protocol, name = get_protocol(url), redact_url(url)
    if protocol not in SERVICES:
        names = ", ".join(f"{protocol}://" for protocol in SERVICES)
        raise SettingsError(
            f"{name}: OUT cannot be on {protocol}://, because a lock needs conditional puts; give a folder, or a URL"
            f" that begins with one of {names}"
        )
    path = url.partition("://")[2].rstrip("/")
    if name != url or "?" in path or "#" in path or "::" in path:
        raise SettingsError(
            f"{name}: the URL of OUT must not contain a query, a fragment, a chain or credentials; the libraries read"
            " credentials from environment variables and configuration files"
        )
    if not path.isprintable() or {"", ".", ".."}.intersection(path.split("/")):
        raise SettingsError(f"{name!r}: the URL of OUT must consist of a bucket and names without . and ..")
    return f"{protocol}://{path}"


def open_service(location: str) -> Service:
    """Connect to the service of a location from `parse_location`. Raises SettingsError, StorageError."""
    module, name = SERVICES[get_protocol(location) or ""]
    with StorageErrors("open", location):
        try:
            system, root = connect(location, location, SettingsError, "writing to")
        except (OSError, ValueError, TypeError, LookupError, RuntimeError) as error:  # configuration, credentials
            raise SettingsError(f"cannot open {location}: {describe(error)}") from None
    puts = getattr(import_module(f"batch_infer.store.objects.{module}"), name)
    return Service(system, root.rstrip("/"), puts(system))
