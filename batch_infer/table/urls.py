"""Parse paths and URLs, and redact parts that may be secret."""

from __future__ import annotations

import re
from urllib.parse import unquote

from batch_infer.table.base import replace_surrogates

URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)(://|::)")
URL_PARTS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?:(?P<user>[^/?#]*)@)?(?P<rest>.*)", re.DOTALL)
HTTP_PROTOCOLS = frozenset({"http", "https"})
PUBLIC_USERS = frozenset(["abfs", "abfss", "wasb", "wasbs", "sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs"])
"""Protocols in which the text before @, except for a password, is not secret, as in abfss://CONTAINER@ACCOUNT."""
QUERY = re.compile(r"\?[\w.~%-]+=.*", re.DOTALL)
"""Matches the query in protocols other than HTTP, in which a bare ? is part of a glob."""
URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]*")
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


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


def split_chain(url: str) -> tuple[str, str, str]:
    """Split a chain of URLs into the text before the first link with a path, that link, and the text after it.

    In `simplecache::s3://bucket/a.csv`, only the second link has a path.
    """
    links = url.split("::")
    index = next((index for index, link in enumerate(links) if "://" in link), 0)
    before = "".join(f"{link}::" for link in links[:index])
    after = "".join(f"::{link}" for link in links[index + 1 :])
    return before, links[index], after


def split_query(link: str) -> tuple[str, str]:
    """Split a link of a chain into the part before its query (with HTTP, also before its fragment), and the rest."""
    head = re.split("[?#]", link, maxsplit=1)[0] if is_http(link) else QUERY.sub("", link)
    return head, link[len(head) :]


def join_url(url: str, relative: str) -> str:
    """Return the URL of a relative path below the folder at `url`."""
    before, link, after = split_chain(url)
    head, query = split_query(link)
    return f"{before}{head.rstrip('/')}/{relative.removeprefix('./')}{query}{after}"


def parse_path_columns(name: str) -> dict[str, str | None]:
    """Return the columns in Hive's `key=value` folders of a path or URL, as written by Spark, pyarrow and DuckDB.

    Names and values are URL-decoded text: `month=05` stays 05. Folders in the argument also count, so that `ds`,
    `ds/*/*.csv` and `ds/lang=en/a.csv` give a file the same columns.
    https://spark.apache.org/docs/latest/sql-data-sources-parquet.html#partition-discovery
    """
    path = name
    if get_protocol(name) is not None:
        link = split_chain(name)[1]
        path = link.partition("://")[2]
        if is_http(link):  # skip the host, and decode the path, which HTTP encodes once more
            path = "/".join(unquote(part) for part in path.split("/")[1:])
    columns: dict[str, str | None] = {}
    for folder in path.split("/")[:-1]:
        key, equals, value = folder.partition("=")
        if key and equals:
            columns[replace_surrogates(unquote(key))] = (
                None if value == HIVE_NULL else replace_surrogates(unquote(value))
            )
    return columns
