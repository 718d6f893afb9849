"""What a URL says without being opened; what may be secret in it is shown nowhere."""

from __future__ import annotations

import re

URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)(://|::)")
LINK = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?:(?P<user>[^/?#]*)@)?(?P<rest>.*)", re.DOTALL)
HTTP = frozenset({"http", "https"})
NAMED_USERS = frozenset(
    {
        *("abfs", "abfss", "wasb", "wasbs"),  # CONTAINER@ACCOUNT
        *("sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs"),
    }
)
"""Protocols where a name before @ that no password follows is no secret."""
QUERY = re.compile(r"\?[\w.~%-]+=.*", re.DOTALL)
"""Of other protocols than http, where a ? alone is part of a glob."""
IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]*")


def protocol_of(argument: str) -> str | None:
    """The protocol of a URL, None for a local path."""
    found = URL.match(argument)
    return found["protocol"].lower() if found else None


def is_http(argument: str) -> bool:
    return protocol_of(argument) in HTTP


def redact_url(argument: str) -> str:
    """An argument as names, ids and messages have it: no link of a chain has its query or who asks, often a token."""
    if protocol_of(argument) is None:
        return argument
    if is_http(argument):  # no chain: what follows :: belongs to the query
        return _shown_link(argument)
    return "::".join(map(_shown_link, argument.split("::")))


def redact_urls(text: str) -> str:
    """A library's message, with the URLs in it as `shown` has them."""
    return IN_TEXT.sub(lambda match: redact_url(match[0]), text)


def split_chain(url: str) -> tuple[str, str, str]:
    """The link of a chain that has the path of the files, with what is before and after it.

    `simplecache::s3://bucket/a.csv` begins with a link that has no path.
    """
    links = url.split("::")
    place = next((place for place, link in enumerate(links) if "://" in link), 0)
    before, after = links[:place], links[place + 1 :]
    return "".join(f"{link}::" for link in before), links[place], "".join(f"::{link}" for link in after)


def split_query(link: str) -> tuple[str, str]:
    """Return a link of a chain without its query, and the query."""
    head = re.split("[?#]", link, maxsplit=1)[0] if is_http(link) else QUERY.sub("", link)
    return head, link[len(head) :]


def join_url(url: str, relative: str) -> str:
    """Return the URL of what is at a relative path below the folder that a URL means."""
    before, link, after = split_chain(url)
    head, query = split_query(link)
    return f"{before}{head.rstrip('/')}/{relative.removeprefix('./')}{query}{after}"


def _shown_link(link: str) -> str:
    found = LINK.fullmatch(link)
    if found is None:
        return link
    scheme, user, rest = found["scheme"], found["user"], found["rest"]
    protocol = scheme.removesuffix("://").lower()
    keeps_user = user is not None and protocol in NAMED_USERS
    return split_query(f"{scheme}{user.partition(':')[0] + '@' if keeps_user else ''}{rest}")[0]
