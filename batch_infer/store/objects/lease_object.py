"""Read and write the object that contains the lease of an OUT."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

from batch_infer.store.clients import StorageErrors
from batch_infer.store.objects.conditional_puts import ConditionalPuts, Version

LEASE = ".lease"
LEASE_SECONDS = 60.0
"""Seconds after which another run may take over a lease that has not been renewed, by the clock of the service."""


class LeaseRecord(NamedTuple):
    """What a lease object contains, its version, and its age in seconds by the clock of the service."""

    holder: str
    token: str | None
    seconds: float
    version: str
    age: float

    @property
    def remaining(self) -> float:
        """Return the seconds until another run may take over. A lease of 0 seconds is released, whatever its age."""
        return self.seconds - self.age if self.seconds > 0 else 0.0

    @classmethod
    def parse(cls, version: Version) -> LeaseRecord:
        """Parse an object, which anyone may have edited."""
        try:
            record = json.loads(version.content)
        except (ValueError, RecursionError):
            record = None
        record = record if isinstance(record, dict) else {}
        holder, token, seconds = (record.get(name) for name in ("holder", "token", "seconds"))
        return cls(
            holder if isinstance(holder, str) else "its process is unknown",
            token if isinstance(token, str) else None,
            seconds if isinstance(seconds, int | float) and 0 <= seconds <= LEASE_SECONDS else LEASE_SECONDS,
            version.version,
            version.read_at - version.modified_at,
        )


@dataclass(frozen=True, slots=True)
class LeaseObject:
    """The object that contains the lease of `out`. Methods raise StorageError and SettingsError."""

    out: str
    puts: ConditionalPuts
    path: str

    def create(self, content: bytes) -> str | None:
        with StorageErrors("write", self.location):
            return self.puts.create(self.path, content)

    def replace(self, content: bytes, version: str) -> str | None:
        with StorageErrors("write", self.location):
            return self.puts.replace(self.path, content, version)

    def read(self) -> LeaseRecord | None:
        with StorageErrors("read", self.location):
            version = self.puts.read(self.path)
            return None if version is None else LeaseRecord.parse(version)

    def find_holder(self) -> str | None:
        """Return a description of the holder, or None if the lease is missing, released or ended."""
        record = self.read()
        return None if record is None or record.remaining <= 0 else record.holder

    @property
    def location(self) -> str:
        return f"{self.out}/{LEASE}"
