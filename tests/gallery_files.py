"""Read the data files of a gallery as its page does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batch_infer.galleries import GalleryInfo, GalleryTotals, Snapshot, TileOptions, write_gallery
from batch_infer.manifest import SCHEMA
from batch_infer.records import utc_now
from batch_infer.store import open_store

_SCRIPT = re.compile(r'BatchInferGallery\.receive\("[a-z]+", [0-9]+, (\{.*\})\);\n', re.DOTALL)
_UNSAFE = (b"<", b"\xe2\x80\xa8", b"\xe2\x80\xa9")
"""The end of an element, and two characters that end a line in scripts."""


def parse_script(content: bytes) -> Any:
    """Return the JSON value of a data file, after checking that the file is inert."""
    assert not [text for text in _UNSAFE if text in content]
    match = _SCRIPT.fullmatch(content.decode("utf-8"))
    assert match
    return json.loads(match[1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def read_meta(folder: Path) -> dict[str, Any]:
    return dict(parse_script((folder / "data/meta.js").read_bytes()))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return all rows with their details. Categories are decoded, and details replace cut texts."""
    meta = read_meta(folder)
    categories = {column["name"]: column["values"] for column in meta["columns"] if column["kind"] == "category"}
    rows: list[dict[str, Any]] = []
    for number in range(meta["chunks"]):
        start = len(rows)
        for kind in ("rows", "details"):
            columns = parse_script((folder / f"data/{kind}-{number:05d}.js").read_bytes())["columns"]
            rows += [{} for _ in range(len(columns["_thumb"]) if kind == "rows" else 0)]
            for name, values in columns.items():
                assert len(values) == len(rows) - start
                for row, value in zip(rows[start:], values, strict=True):
                    text = categories[name][value] if name in categories and value is not None else value
                    if kind == "rows" or name not in row or text is not None:
                        row[name] = text
    assert len(rows) == meta["rows"] == sum(meta["counts"].values())
    return rows


def pictures(folder: Path, name: str = "thumbs") -> dict[str, Path]:
    """Return the pictures in thumbs/ or previews/ by their names."""
    top = folder / name
    return {path.relative_to(top).as_posix(): path for path in top.rglob("*") if path.is_file()}


def make_table(rows: list[dict[str, Any]], **carried: pa.DataType) -> pa.Table:
    """Return results with these cells. Required columns have defaults."""
    defaults = {"image_index": 0, "attempt": 1, "finished_at": utc_now(), "source_file": "t.csv", "source_row": 0}
    texts = {"prompt": "a red circle", "status": "ok", "fingerprint": "f"}
    cells = [{"id": f"r{number}", **texts, **defaults, **row} for number, row in enumerate(rows)]
    return pa.Table.from_pylist(cells, pa.schema([*SCHEMA, *carried.items()]))


class MemoryImages:
    """Images in memory, which the page cannot link to unless `is_linked`."""

    def __init__(self, images: dict[str, bytes], *, is_linked: bool = True) -> None:
        self.images, self.is_linked = images, is_linked
        self.read_paths: list[str] = []

    def has(self, path: str) -> bool:
        return path in self.images

    def read(self, path: str) -> bytes | None:
        self.read_paths.append(path)
        return self.images.get(path)

    def link(self, path: str) -> str | None:
        return f"../{path}" if self.is_linked else None


def write(
    folder: Path,
    table: pa.Table,
    images: dict[str, bytes] | MemoryImages | None = None,
    size: int = 64,
    on_progress: Callable[[int], object] = lambda _: None,
) -> GalleryTotals:
    """Write a gallery of these results."""
    reader = images if isinstance(images, MemoryImages) else MemoryImages(images or {})
    with snapshot_of(table) as snapshot, open_store(folder).locked() as store:
        info = GalleryInfo("out", "out", "id", 0, 0.0, {})
        return write_gallery(store, snapshot, reader, info, TileOptions(size, 2), on_progress)


@contextmanager
def snapshot_of(table: pa.Table) -> Iterator[Snapshot]:
    with Snapshot(table.schema) as snapshot:
        snapshot.add(table)
        yield snapshot
