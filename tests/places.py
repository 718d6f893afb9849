"""Places for OUT, a local folder and object stores, which tests read and change in the same way."""

from __future__ import annotations

import gc
import io
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq

from batch_infer.jobs.out import RESULTS
from batch_infer.records import BOOKKEEPING
from tests.object_servers import ObjectServer, serve_objects
from tests.tables import to_rows

OWN_FILES = (".lock", ".holder", ".lease")
"""Files of the lock, which may remain in OUT."""


class Place(ABC):
    """A place for OUT. Names are relative to OUT."""

    def __init__(self, out: str) -> None:
        self.out = out
        """The argument of the command."""

    @abstractmethod
    def all_names(self) -> list[str]: ...

    @abstractmethod
    def read(self, name: str) -> bytes: ...

    @abstractmethod
    def write(self, name: str, content: bytes) -> None: ...

    @abstractmethod
    def remove(self, name: str) -> None: ...

    def names(self, *folders: str) -> list[str]:
        """Return the sorted names of all files, or of those in these folders, without the files of the lock."""
        names = [name for name in self.all_names() if name not in OWN_FILES]
        return [name for name in names if not folders or name.startswith(tuple(f"{folder}/" for folder in folders))]

    def images(self) -> dict[str, bytes]:
        return {name: self.read(name) for name in self.names("images", "quarantine", "shards")}

    def parts(self) -> int:
        """Return the number of manifest parts."""
        return sum(name.startswith("manifest/part-") for name in self.names("manifest"))

    def results(self) -> list[dict[str, Any]]:
        """Return the rows of results.parquet, without the columns in which two runs of the same work may differ."""
        rows = to_rows(pq.read_table(io.BytesIO(self.read("results.parquet"))))
        return [{name: cell for name, cell in row.items() if name not in BOOKKEEPING} for row in rows]

    def unexpected_names(self) -> list[str]:
        """Return names other than those that a finished run leaves, for example of temporary files."""
        paths = (row["generated_image"] for row in self.results())
        images = {path.partition("#")[0] for path in paths if path}  # an image in a shard is SHARD#NAME
        return [
            name
            for name in self.names()
            if name not in images
            and not (name.startswith("manifest/part-") and name.endswith(".parquet"))
            and not (name.startswith("logs/") and name.endswith(".log"))
            and name not in ("run.json", *RESULTS, "manifest/SHA256SUMS")
        ]


class LocalPlace(Place):
    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder

    def all_names(self) -> list[str]:
        return sorted(path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*") if path.is_file())

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        (self._folder / name).write_bytes(content)

    def remove(self, name: str) -> None:
        (self._folder / name).unlink()


class ObjectPlace(Place):
    def __init__(self, server: ObjectServer, prefix: str) -> None:
        self.server, self.bucket = server, server.make_bucket()
        self._prefix = f"{prefix}/" if prefix else ""
        super().__init__(f"{self.bucket.url}/{prefix}".rstrip("/"))

    def all_names(self) -> list[str]:
        return [name.removeprefix(self._prefix) for name in self.bucket.names()]

    def read(self, name: str) -> bytes:
        return self.bucket.read(f"{self._prefix}{name}")

    def write(self, name: str, content: bytes) -> None:
        self.bucket.write(f"{self._prefix}{name}", content)

    def remove(self, name: str) -> None:
        self.bucket.remove(f"{self._prefix}{name}")


def assert_same(place: Place, reference: Place) -> None:
    """Check that two places have the same results and images, and nothing else but manifest parts and logs."""
    assert place.results() == reference.results()
    assert place.images() == reference.images()
    assert (place.unexpected_names(), reference.unexpected_names()) == ([], [])


@contextmanager
def empty_temporary_folder(folder: Path) -> Iterator[None]:
    """Put temporary files of this process and its children into a folder, and check that none is left at the end."""
    folder.mkdir()
    with mock.patch.dict("os.environ", TMPDIR=str(folder)), mock.patch.object(tempfile, "tempdir", str(folder)):
        yield
    gc.collect()  # a store in this process removes its files when it is collected
    assert [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor")] == []


@contextmanager
def object_place(kind: str, prefix: str, folder: Path) -> Iterator[ObjectPlace]:
    """Run a server, whose files are in a folder, and yield an OUT in it that commands find by the environment.

    Commands leave no temporary files.
    """
    folder.mkdir()
    with (
        empty_temporary_folder(folder / "temporary"),
        serve_objects(kind, folder / "server") as server,
        mock.patch.dict("os.environ", server.environment),
    ):
        yield ObjectPlace(server, prefix)
