"""Store images as files in OUT."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath

from batch_infer.records import PromptRequest, Source, StoredImage
from batch_infer.sinks.names import Collisions, ImageIndex, hashed_name, safe_name
from batch_infer.store import IMAGE_FOLDERS, Out, is_inside, open_store, original_name, unique_name

ROWS_PER_FOLDER = 1000
BACKUP_PREFIX = ".original-"


class FolderSink:
    """Stores images in OUT as images/STEM-NNNNN/ID-K.png, or as quarantine/STEM-NNNNN/ID-K.png if requested.

    Ids keep their dots, although a webdataset key would end at the first dot.
    """

    def __init__(self, out: Out, suffix: str = "") -> None:
        self._store, self._suffix = open_store(out), suffix
        self._case_sensitive: dict[str, bool] = {}
        self._case_lock = threading.Lock()

    def path_of(self, request: PromptRequest, *, quarantine: bool = False) -> str:
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

    def publish(self, paths: Iterable[str]) -> None:
        if names := list(paths):
            self._store.check()
            self._store.publish(names)

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
        return is_image_path(path) and self._store.has_image(path)

    def list_images(self, folder: str) -> set[str]:
        return self._store.list_images(folder) if is_image_path(f"{folder}/_") else set()

    def read(self, path: str, length: int | None = None) -> bytes | None:
        return self._store.read_image(path, length) if is_image_path(path) else None


def is_image_path(path: str) -> bool:
    """Return whether a path from a manifest part, which anyone may have edited, stays in images/ or quarantine/."""
    top, slash, _ = path.partition("/")
    return bool(slash) and top in IMAGE_FOLDERS and is_inside(path)


def original_path(path: str) -> str | None:
    """Return the path that a file had before a process backed it up, or None if the file is not a backup."""
    backup = PurePosixPath(path)
    name = original_name(BACKUP_PREFIX, backup.name)
    return None if name is None else backup.with_name(name).as_posix()
