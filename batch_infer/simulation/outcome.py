"""What a simulated job has come to, at its end or until now."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """Counts of mini-batches, of what befell them, and of files and rows.

    A delivery is a mini-batch that a worker began to run; some are retries, some duplicates. `timeouts` and `kills`
    are workers that were killed for the one reason or the other, `deaths` those that died by themselves;
    `kills_missed` are kills that were asked for and hit no run. `rows` are those returned, also twice by a
    mini-batch that was delivered twice. `seconds` is all the time, `running_seconds` that from the first delivery on.
    `fault` says why the job has failed, if it has.
    """

    mini_batches: int
    files: int
    succeeded: int = 0
    failed: int = 0
    failed_files: int = 0
    deliveries: int = 0
    retries: int = 0
    duplicates: int = 0
    kills: int = 0
    kills_missed: int = 0
    timeouts: int = 0
    deaths: int = 0
    rows: int = 0
    seconds: float = 0.0
    running_seconds: float = 0.0
    predictions: Path | None = None
    logs: Path | None = None
    fault: str | None = None

    @property
    def settled(self) -> int:
        """How many mini-batches have succeeded, or failed for good."""
        return self.succeeded + self.failed

    @property
    def rows_per_second(self) -> float | None:
        return self.rows / self.running_seconds if self.rows and self.running_seconds else None

    def as_dict(self) -> dict[str, Any]:
        paths = {name: str(path) if (path := getattr(self, name)) else None for name in ("predictions", "logs")}
        return {**asdict(self), **paths, "rows_per_second": self.rows_per_second}
