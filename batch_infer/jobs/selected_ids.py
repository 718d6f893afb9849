"""Select rows by their ids, which may be too many for memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from batch_infer.errors import SettingsError, UsageError
from batch_infer.manifest import ManifestIndex
from batch_infer.store import temporary_database
from batch_infer.table import read_keys

MAX_LISTED = 5
"""Maximum number of unknown ids in an error message."""
ALL_IMAGES = -1
"""Stored instead of an image index if all images of a row are selected."""


@contextmanager
def select_ids(ids: Iterable[str], file: str | None) -> Iterator[SelectedIds | None]:
    """Yield the selected ids, or None if neither ids nor a file is given. Raises TableError, StorageError."""
    keys = [(name, None) for name in ids]
    if not keys and file is None:
        yield None
        return
    selected = SelectedIds()
    try:
        selected.add(keys)
        if file is not None:
            selected.add(read_keys(file))
        yield selected
    finally:
        selected.close()


class SelectedIds:
    """The ids of rows, or of single images of rows, in a temporary database."""

    def __init__(self) -> None:
        self._database = temporary_database()
        self._database.execute(
            "CREATE TABLE keys (id, image_index, is_in_tables, PRIMARY KEY (id, image_index)) WITHOUT ROWID"
        )

    def close(self) -> None:
        self._database.close()

    def add(self, keys: Iterable[tuple[str, int | None]]) -> None:
        """Select images. The index None selects all images of a row."""
        rows = ((name, ALL_IMAGES if index is None else index) for name, index in keys)
        self._database.executemany("INSERT OR IGNORE INTO keys VALUES (?, ?, 0)", rows)

    def match(self, key: tuple[str, int]) -> bool:
        """Return whether an image of the tables is selected, and remember that the tables have it."""
        where = f"WHERE id = ? AND image_index IN (?, {ALL_IMAGES})"
        matches = self._database.execute(f"SELECT is_in_tables FROM keys {where}", key).fetchall()
        if (0,) in matches:
            self._database.execute(f"UPDATE keys SET is_in_tables = 1 {where}", key)
        return bool(matches)

    def check(self, location: str, index: ManifestIndex) -> None:
        """Check that OUT has a result of each selected image, and that `match` was called with it.

        Raises UsageError, which names OUT by its location.
        """
        if unknown := list(self._find_unknown(index)):
            raise SettingsError(
                f"{location} has no result with {_list(unknown)}: check the ids, or render new rows with "
                "`batch-infer run`"
            )
        rows = self._database.execute("SELECT id, image_index FROM keys WHERE NOT is_in_tables")
        if missing := list(rows):
            raise UsageError(
                f"the tables of the run have no row with {_list(missing)}: it was removed or changed since"
            )

    def _find_unknown(self, index: ManifestIndex) -> Iterator[tuple[str, int]]:
        for name, image_index in self._database.execute("SELECT id, image_index FROM keys"):
            is_known = index.has_id(name) if image_index == ALL_IMAGES else index.find((name, image_index)) is not None
            if not is_known:
                yield name, image_index


def _list(keys: list[tuple[str, int]]) -> str:
    """Format the first ids: `the ids 'a' and 'b'`."""
    shown = [repr(name) + ("" if index == ALL_IMAGES else f" (image {index})") for name, index in keys[:MAX_LISTED]]
    more = [f"{len(keys) - len(shown):,} more"] if len(keys) > len(shown) else []
    parts = [*shown, *more]
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"the id{'s' * (len(keys) > 1)} {text}"
