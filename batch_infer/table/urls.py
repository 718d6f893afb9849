"""Split and join the URLs of tables, and parse the columns in their paths."""

from __future__ import annotations

from urllib.parse import unquote

from batch_infer.store import get_protocol, is_http, split_query
from batch_infer.table.base import replace_surrogates

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


def split_chain(url: str) -> tuple[str, str, str]:
    """Split a chain of URLs into the text before the first link with a path, that link, and the text after it.

    In `simplecache::s3://bucket/a.csv`, only the second link has a path.
    """
    links = url.split("::")
    index = next((index for index, link in enumerate(links) if "://" in link), 0)
    before = "".join(f"{link}::" for link in links[:index])
    after = "".join(f"::{link}" for link in links[index + 1 :])
    return before, links[index], after


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
