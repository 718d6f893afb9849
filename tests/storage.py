"""Simulate file system errors, because tests may run as root, whom file modes do not restrict."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

CALLS = ("stat", "lstat", "open", "listdir", "scandir")


def fail_at(monkeypatch: pytest.MonkeyPatch, path: Path, number: int) -> None:
    """Make every access to a path fail, as without permission or on a broken mount. Its realpath still works."""

    def failing(module: Any, name: str) -> Any:
        real = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if arguments and isinstance(arguments[0], str | os.PathLike) and os.fspath(arguments[0]) == str(path):
                raise OSError(number, os.strerror(number), str(path))
            return real(*arguments, **options)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, failing(os, name))
    monkeypatch.setattr(io, "open", failing(io, "open"))


def no_rows() -> pa.Table:
    """Stand for the results of published images, which only sinks that write shards need."""
    raise AssertionError("image files were published, but their rows were read")
