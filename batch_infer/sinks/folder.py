"""Store images as files in OUT, and read images from files and shards."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import PurePosixPath

import pyarrow as pa

from batch_infer.records import PromptRequest, Source, StoredImage
from batch_infer.sinks.names import Collisions, ImageIndex, hashed_name, safe_name
from batch_infer.sinks.parquet import ParquetFormat
from batch_infer.sinks.shards import CommitLimits, ShardReader, parse_member
from batch_infer.sinks.webdataset import TarFormat
from batch_infer.store import IMAGE_FOLDERS, FileDigest, Out, is_inside, open_store, original_name, unique_name

ROWS_PER_FOLDER = 1000
BACKUP_PREFIX = ".original-"


class FolderSink:
    """Stores images in OUT as images/STEM-NNNNN/ID-K.png, or as quarantine/STEM-NNNNN/ID-K.png if requested."""

    commit_limits: CommitLimits | None = None

    def __init__(self, out: Out, suffix: str = "") -> None:
        self._store, self._suffix = open_store(out), suffix
        self._shards = ShardReader(self._store, (TarFormat(), ParquetFormat()))
        self._case_sensitive: dict[str, bool] = {}
        self._case_lock = threading.Lock()

    def path_of(self, request: PromptRequest, *, is_flagged: bool = False, quarantine: bool = False) -> str:
        """Return a path that no other image has, even if case is ignored, so that OUT can be copied to any file system.

        Only paths of tables that different workers of an Azure ML job read may differ by case alone.
        """
        paths = self._list_paths(request, IMAGE_FOLDERS[quarantine], lambda text: {hashed_name(text)})
        previous_path = self.path_in(request.replaces or "", quarantine=quarantine)
        return previous_path if previous_path in paths else paths[0]

    def possible_paths(self, request: PromptRequest) -> set[str]:
        def hash_unsafe(text: str) -> set[str]:  # earlier versions hashed only unsafe names
            return {safe_name(text)} - {text}

        return {path for top in IMAGE_FOLDERS for path in self._list_paths(request, top, hash_unsafe)}

    def path_in(self, path: str, *, quarantine: bool) -> str:
        return f"{IMAGE_FOLDERS[quarantine]}/{path.partition('/')[2]}"

    def path_after_rescore(
        self, path: str, request: PromptRequest, *, is_flagged: bool = False, quarantine: bool = False
    ) -> str:
        return self.path_in(path, quarantine=quarantine)

    def folders_of(self, files: Iterable[str]) -> list[str]:
        stems = {Source(file, 0).stem for file in files}
        spellings = ({safe_name(stem), safe_name(stem, capitals=True), hashed_name(stem)} for stem in stems)
        names = set[str]().union(*spellings)
        folders = [(top, name) for top in IMAGE_FOLDERS for name in self._store.list_folder(top)]
        matches = [f"{top}/{name}" for top, name in folders if re.sub(r"-[0-9]+$", "", name) in names]
        return [*IMAGE_FOLDERS, *matches]

    def collisions(self, index: ImageIndex) -> Collisions:
        return Collisions(index)

    def _list_paths(self, request: PromptRequest, top: str, other_names: Callable[[str], set[str]]) -> list[str]:
        """Return the path for a new image, then the paths under other names of its folder and its id."""
        stem, name = request.source.stem, request.id
        folders = [self._name(top, stem, collides=request.stem_collides), *other_names(stem)]
        files = [self._name(top, name, collides=request.id_collides), *other_names(name)]
        return [self._path(request, top, folder, file) for folder in folders for file in files]

    def _path(self, request: PromptRequest, top: str, folder: str, name: str) -> str:
        """Return an image's path in the folder `top` of OUT.

        `folder` and `name` are safe path components for the request's file and id. If case is ignored, `name`
        may be unique only within `folder`.
        """
        number = request.source.row // ROWS_PER_FOLDER
        return f"{top}/{folder}-{number:05d}/{name}-{request.image_index}{self._suffix}"

    def _name(self, top: str, text: str, *, collides: bool) -> str:
        """Return a path component for a text: hashed if it collides, else with capitals if `top` is case-sensitive."""
        if collides:
            return hashed_name(text)
        lower, mixed = safe_name(text), safe_name(text, capitals=True)
        return mixed if lower != mixed and self._is_case_sensitive(top) else lower

    def _is_case_sensitive(self, top: str) -> bool:
        """Return whether images/ or quarantine/ is case-sensitive. The folder's disk may differ from OUT's."""
        with self._case_lock:
            if top not in self._case_sensitive:
                self._case_sensitive[top] = self._store.is_case_sensitive(top)
            return self._case_sensitive[top]

    def write(self, path: str, content: bytes) -> StoredImage:
        self._store.stage(path, content)
        return StoredImage(path, hashlib.sha256(content).hexdigest(), len(content))

    def publish(self, paths: Iterable[str], make_rows: Callable[[], pa.Table]) -> Mapping[str, str]:
        if names := list(paths):
            self._store.check()
            self._store.publish(names)
        return {}

    def back_up(self, paths: Iterable[str]) -> None:
        """Keep images under hidden names.

        An image that this process has already backed up is skipped: the file at its path was never committed.
        """
        if backups := {path: self.backup_path(path) for path in paths}:
            self._store.check()
            self._store.back_up(backups)

    def backup_path(self, path: str) -> str:
        image = PurePosixPath(path)
        return image.with_name(unique_name(BACKUP_PREFIX, image.name)).as_posix()

    def restore(self, backup: str) -> None:
        self._store.check()
        self._store.rename(backup, original_path(backup) or backup)

    def remove(self, *paths: str) -> None:
        if images := [path for path in paths if is_image_path(path)]:
            self._store.check()
            self._store.remove(images)

    def has(self, path: str) -> bool:
        if (member := parse_member(path)) is not None:
            return member.image in self._shards.get_sizes(member.shard)
        return is_image_path(path) and self._store.has_image(path)

    def list_shards(self) -> list[str]:
        return self._shards.list_shards()

    def list_files(self, folder: str) -> set[str]:
        return self._store.list_images(folder) if is_image_path(f"{folder}/_") else set()

    def list_images(self, *, needs_sizes: bool = True) -> Iterator[tuple[str, int | None]]:
        yield from self._store.list_image_files(needs_sizes=needs_sizes)
        yield from self._shards.list_members()

    def read(self, path: str, length: int | None = None) -> bytes | None:
        if (member := parse_member(path)) is not None:
            content = self._shards.read(member, length)
            return content if content is not None and length in (None, len(content)) else None
        return self._store.read_image(path, length) if is_image_path(path) else None

    def hash(self, images: Sequence[tuple[str, int]]) -> list[FileDigest | None]:
        digests = {path: self._hash_member(path) for path, _ in images if parse_member(path)}
        files = [image for image in images if image[0] not in digests]
        digests |= {path: digest for (path, _), digest in zip(files, self._store.hash_images(files), strict=True)}
        return [digests[path] for path, _ in images]

    def _hash_member(self, path: str) -> FileDigest | None:
        content = self.read(path)
        return None if content is None else FileDigest(hashlib.sha256(content).hexdigest(), len(content))

    def remove_unnamed(self, paths: Iterable[str], committed: Collection[str] = ()) -> None:
        named = set[str]()
        for shard, group in groupby(paths, lambda path: path.partition("#")[0]):
            named.add(shard)
            members = [member for path in group if (member := parse_member(path)) is not None]
            if members and len(members) < members[0].count:
                self._store.check()
                self._shards.keep(shard, {member.image for member in members})
        unnamed = [shard for shard in self._shards.list_shards() if shard not in named]
        if unnamed and named.issuperset(committed):
            self._store.check()
            self._store.remove(unnamed)


def is_image_path(path: str) -> bool:
    """Return whether a path from a manifest part, which anyone may have edited, stays in images/ or quarantine/."""
    top, slash, _ = path.partition("/")
    return bool(slash) and top in IMAGE_FOLDERS and is_inside(path)


def original_path(path: str) -> str | None:
    """Return the path that a file had before a process backed it up, or None if the file is not a backup."""
    backup = PurePosixPath(path)
    name = original_name(BACKUP_PREFIX, backup.name)
    return None if name is None else backup.with_name(name).as_posix()
