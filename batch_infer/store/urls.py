"""Parse URLs, and redact parts that may be secret."""

from __future__ import annotations

import re

URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)(://|::)")
URL_PARTS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?:(?P<user>[^/?#]*)@)?(?P<rest>.*)", re.DOTALL)
HTTP_PROTOCOLS = frozenset({"http", "https"})
PUBLIC_USERS = frozenset(["abfs", "abfss", "wasb", "wasbs", "sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs"])
"""Protocols in which the text before @, except for a password, is not secret, as in abfss://CONTAINER@ACCOUNT."""
QUERY = re.compile(r"\?[\w.~%-]+=.*", re.DOTALL)
"""Matches the query in protocols other than HTTP, in which a bare ? is part of a glob."""
URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]*")


def get_protocol(argument: str) -> str | None:
    """Return the protocol of a URL, or None for a local path."""
    match = URL.match(argument)
    return match["protocol"].lower() if match else None


def is_http(argument: str) -> bool:
    return get_protocol(argument) in HTTP_PROTOCOLS


def redact_url(argument: str) -> str:
    """Remove the query, the password and usually the user, which is often a token, from a URL or the links of a chain.

    Remove the fragment too if the protocol is HTTP. Names, ids and messages contain only redacted arguments.
    """
    if get_protocol(argument) is None:
        return argument
    if is_http(argument):  # never a chain: text after :: is part of the query
        return _redact_link(argument)
    return "::".join(map(_redact_link, argument.split("::")))


def redact_urls(text: str) -> str:
    """Redact the URLs in a message from a library."""
    return URL_IN_TEXT.sub(lambda match: redact_url(match[0]), text)


def _redact_link(link: str) -> str:
    match = URL_PARTS.fullmatch(link)
    if match is None:
        return link
    scheme, user, rest = match["scheme"], match["user"], match["rest"]
    keeps_user = user is not None and scheme.removesuffix("://").lower() in PUBLIC_USERS
    return split_query(f"{scheme}{user.partition(':')[0] + '@' if keeps_user else ''}{rest}")[0]


def split_query(link: str) -> tuple[str, str]:
    """Split a link of a chain into the part before its query (with HTTP, also before its fragment), and the rest."""
    head = re.split("[?#]", link, maxsplit=1)[0] if is_http(link) else QUERY.sub("", link)
    return head, link[len(head) :]
