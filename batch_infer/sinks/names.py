"""Choose image file names that are valid on every file system and, with rare exceptions, differ by more than case."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from batch_infer.records import PromptRequest

_SAFE = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]{0,78}[a-z0-9_-])?")
_SAFE_WITH_CAPITALS = re.compile(_SAFE.pattern, re.IGNORECASE | re.ASCII)
_WINDOWS_DEVICE = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)


def safe_name(text: str, *, capitals: bool = False) -> str:
    """Return a file name that is unique to a text and valid on every file system.

    Up to 80 lower-case letters, digits, `_`, `.` and `-` stay unchanged, unless `.` or `-` is first or `.` is last.
    `capitals` allows upper-case letters too, for case-sensitive file systems. Other texts and names of Windows devices
    get a `hashed_name`.
    """
    pattern = _SAFE_WITH_CAPITALS if capitals else _SAFE
    return text if pattern.fullmatch(text) and not _WINDOWS_DEVICE.fullmatch(text) else hashed_name(text)


def hashed_name(text: str) -> str:
    """Return up to 60 readable characters of a text, `~` and its digest. The name is unique even if case is ignored."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:60]
    return f"{readable}~{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def parse_path(path: str) -> tuple[str, str]:
    """Return `STEM` and `ID` of an image path such as `images/STEM-NNNNN/ID-K.png`."""
    folders, _, file = path.rpartition("/")
    return folders.rpartition("/")[2].rpartition("-")[0], file.rpartition("-")[0]


class ImageIndex(Protocol):
    """Answers questions about committed images."""

    @property
    def image_folders(self) -> Iterable[str]:
        """Folders of all committed images, relative to OUT."""

    def similar_ids(self, name: str) -> Iterable[tuple[str, str]]:
        """Return the ids that differ from this id only by case, each with the path of one of its images."""


class Collisions:
    """Finds collisions with the names of committed images. The caller must hold the lock of OUT."""

    def __init__(self, index: ImageIndex) -> None:
        self._index = index
        self._stems: dict[str, set[str]] = {}
        for folder in index.image_folders:
            stem, _ = parse_path(f"{folder}/")
            self._stems.setdefault(stem.lower(), set()).add(stem)

    def mark(self, request: PromptRequest, path: str | None) -> PromptRequest:
        """Return the request with `id_collides` and `stem_collides` set according to the names of committed images.

        `path` is the path of this request's committed image, if any, whose names are kept.
        """
        used_stem, used_id = parse_path(path or "")
        stem = request.source.stem
        stems = self._stems.get(stem.lower(), set())
        id_collides = used_id != request.id and (
            request.id_collides
            or any(parse_path(other_path)[1] == other for other, other_path in self._index.similar_ids(request.id))
        )
        stem_collides = used_stem != stem and (bool(stems - {stem}) or (request.stem_collides and not stems))
        return replace(request, id_collides=id_collides, stem_collides=stem_collides)
