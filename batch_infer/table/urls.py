"""What a URL says without being opened; what may be secret in it is shown nowhere."""

from __future__ import annotations

import re

URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)(://|::)")
PASSWORD = re.compile(r"(?<=://)([^/@:]*):[^/@]*@")


def protocol_of(argument: str) -> str | None:
    """The protocol of a URL, None for a local path."""
    found = URL.match(argument)
    return found["protocol"].lower() if found else None


def is_http(argument: str) -> bool:
    return protocol_of(argument) in ("http", "https")


def shown(argument: str) -> str:
    """An argument as names, ids and errors have it: without passwords, and without http's query, often a signature."""
    if protocol_of(argument) is None:
        return argument
    if is_http(argument):
        argument = re.split("[?#]", argument, maxsplit=1)[0]
    return PASSWORD.sub(r"\1@", argument)
