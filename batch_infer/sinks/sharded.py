"""Store images in shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import PurePosixPath

import pyarrow as pa

from batch_infer.errors import StorageError
from batch_infer.records import BOOKKEEPING, PromptRequest, digest
from batch_infer.sinks.folder import FolderSink
from batch_infer.sinks.shards import SHARD_FOLDER, CommitLimits, Sample, ShardFormat, parse_member
from batch_infer.store import Out

SHARD_BYTES = 256 << 20
"""Total size in bytes of images at which a shard is complete."""
SHARD_ROWS = 1024
"""Maximum number of images in a shard."""
SHARD_SECONDS = 30.0
"""Number of seconds after which rows are committed, with a shard of their images, even if there are few.

If rows were committed as often as with image files, every two seconds, a slow model would write tiny shards.
"""
OMITTED_COLUMNS = BOOKKEEPING | {
    *("generated_image", "status", "error", "nsfw_content_detected", "safety_checker", "safety_scores", "fingerprint"),
    *("source_file", "source_row"),
}
"""Result columns that are not in shards, because a rescore or the next run may change them."""


class ShardedSink(FolderSink):
    """Stores images with status ok in shards. Flagged images and their replacements are files, as in a FolderSink.

    Until its row is committed, the path of an image is `shards/KEY.png`. From then on, it is `SHARD#KEY.png`.
    """

    commit_limits: CommitLimits | None = CommitLimits(SHARD_ROWS, SHARD_SECONDS)

    def __init__(self, shard_format: ShardFormat, out: Out, suffix: str = "") -> None:
        super().__init__(out, suffix)
        self._format = shard_format

    def path_of(self, request: PromptRequest, *, is_flagged: bool = False, quarantine: bool = False) -> str:
        if is_flagged or quarantine:
            return super().path_of(request, is_flagged=is_flagged, quarantine=quarantine)
        return self._staged_path(request, self._suffix)

    def possible_paths(self, request: PromptRequest) -> set[str]:
        return super().possible_paths(request) | {
            super(ShardedSink, self).path_of(_with_unique_names(request), is_flagged=True, quarantine=quarantine)
            for quarantine in (False, True)
        }

    def path_after_rescore(
        self, path: str, request: PromptRequest, *, is_flagged: bool = False, quarantine: bool = False
    ) -> str:
        is_member = parse_member(path) is not None
        if not is_flagged:
            return path if is_member else self._staged_path(request, PurePosixPath(path).suffix)
        if not is_member:
            return self.path_in(path, quarantine=quarantine)
        return super().path_of(_with_unique_names(request), is_flagged=True, quarantine=quarantine)

    def publish(self, paths: Iterable[str], make_rows: Callable[[], pa.Table]) -> Mapping[str, str]:
        names = list(paths)
        staged = [name for name in names if name.startswith(f"{SHARD_FOLDER}/")]
        super().publish([name for name in names if not name.startswith(f"{SHARD_FOLDER}/")], make_rows)
        new_paths: dict[str, str] = {}
        if staged:
            self._store.check()
            rows = make_rows()
            for group in _split(staged, rows):
                new_paths |= self._write_shard(rows.take(group))
            self._store.discard_staged(staged)
        return new_paths

    def _write_shard(self, rows: pa.Table) -> dict[str, str]:
        """Write a shard with the staged images of these rows, and return their paths in it by their staged paths."""
        staged, hashes = rows["generated_image"].to_pylist(), rows["sha256"].to_pylist()
        keys = zip(rows["id"].to_pylist(), rows["image_index"].to_pylist(), hashes, strict=True)
        shard = f"{SHARD_FOLDER}/{digest(list(map(list, keys)))}-{len(rows)}{self._format.suffix}"
        names = [name.rpartition("/")[2] for name in staged]
        samples = (
            Sample(name, self._read_staged(path, hashes[row]), row)
            for row, (name, path) in enumerate(zip(names, staged, strict=True))
        )
        columns = [name for name in rows.column_names if name not in OMITTED_COLUMNS]
        with self._store.write(shard) as temporary:
            self._format.write(temporary, samples, rows.select(columns))
        return {path: f"{shard}#{name}" for path, name in zip(staged, names, strict=True)}

    def _read_staged(self, path: str, sha256: str) -> bytes:
        """Return the bytes of a staged image. Raises StorageError if another program has changed them."""
        content = self._store.read_staged(path)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise StorageError(f"the temporary file for {self._store.locate(path)} has changed; run again")
        return content

    def _staged_path(self, request: PromptRequest, suffix: str) -> str:
        """Return the path of an image until its row is committed. A WebDataset key ends at the first dot."""
        name = self._name(SHARD_FOLDER, request.id, collides=request.id_collides or "." in request.id)
        return f"{SHARD_FOLDER}/{name}-{request.image_index}{suffix}"


def _with_unique_names(request: PromptRequest) -> PromptRequest:
    """Return a request whose file has a name that no other image can have, without comparing it with other images."""
    return replace(request, id_collides=True, stem_collides=True)


def _split(staged: list[str], rows: pa.Table) -> Iterator[list[int]]:
    """Yield the row numbers of each shard. `staged` are the paths of the images in `rows`."""
    positions = {path: row for row, path in enumerate(rows["generated_image"].to_pylist())}
    sizes = rows["image_bytes"].to_pylist()
    group: list[int] = []
    byte_count = 0
    for path in staged:
        group.append(positions[path])
        byte_count += sizes[positions[path]]
        if byte_count >= SHARD_BYTES:
            yield group
            group, byte_count = [], 0
    if group:
        yield group
