"""Split the files of a job into mini-batches, and schedule deliveries, retries and simulated kills."""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from batch_infer.errors import TableError
from batch_infer.simulation.settings import SimulationOutcome

FIRST_KILL_SECONDS = 0.1
"""Maximum delay of a kill in seconds while the duration of a mini-batch is unknown."""


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """The absolute paths of files that are passed to the script together."""

    index: int
    files: tuple[str, ...]


def find_files(inputs: Sequence[Path]) -> list[str]:
    """Return the absolute paths of the inputs that are files, and of the files directly in the inputs that are folders.

    Raises TableError if a path cannot be read, if there are no files, or if two files have the same name, since a batch
    endpoint has one input folder.
    """
    files = list(dict.fromkeys(path for entry in inputs for path in _list_files(entry)))
    if not files:
        shown = ", ".join(map(str, inputs))
        raise TableError(f"{shown}: there are no files; name the folder that contains them (subfolders are not read)")
    by_name: dict[str, str] = {}
    for file in files:
        other = by_name.setdefault(Path(file).name, file)
        if other != file:
            raise TableError(
                f"{other} and {file} have the same name: images and ids depend on it, and a batch endpoint has one"
                " input folder; rename one of them"
            )
    return files


def _list_files(entry: Path) -> Iterator[str]:
    try:
        if entry.is_dir():
            paths = sorted(path for path in entry.iterdir() if path.is_file())
        elif entry.is_file():
            paths = [entry]
        else:
            raise TableError(f"{entry}: there is no such file or folder")
    except OSError as error:
        raise TableError(f"{entry}: {error.strerror}") from error
    yield from (os.path.abspath(path) for path in paths)  # noqa: PTH100  # Azure keeps link names, resolve() does not


def split_files(files: Sequence[str], size: int) -> list[MiniBatch]:
    """Return mini-batches of `size` files; the last one may be smaller, as in Azure."""
    starts = range(0, len(files), size)
    return [MiniBatch(index, tuple(files[start : start + size])) for index, start in enumerate(starts)]


@dataclass(slots=True, eq=False)
class MiniBatchState:
    """The progress of a mini-batch.

    `open_deliveries` counts deliveries that are waiting or running. `rows` is the number of rows from the first
    call of run() that returned, or None before that.
    """

    mini_batch: MiniBatch
    failed_tries: int = 0
    deliveries: int = 0
    open_deliveries: int = 1
    rows: int | None = None


class DeliveryQueue:
    """Holds mini-batches until each has succeeded or finally failed.

    Counts events in `outcome`. `waiting` contains the mini-batches to deliver, in order.
    """

    def __init__(self, mini_batches: Sequence[MiniBatch], max_retries: int, outcome: SimulationOutcome) -> None:
        self._states = [MiniBatchState(mini_batch) for mini_batch in mini_batches]
        self._max_retries, self._outcome = max_retries, outcome
        self.waiting = deque(self._states)

    def duplicate(self, share: float, rng: random.Random) -> None:
        """Add a second delivery for a share of the mini-batches, for about half of them directly after the first."""
        for state in rng.sample(self._states, round(share * len(self._states))):
            second = self.waiting.index(state) + 1
            self.waiting.insert(rng.choice([second, rng.randint(second, len(self.waiting))]), state)
            state.open_deliveries += 1
            self._outcome.duplicates += 1

    @property
    def is_finished(self) -> bool:
        """Whether no delivery is waiting or running."""
        return not any(state.open_deliveries for state in self._states)

    def record_success(self, state: MiniBatchState, rows: int) -> None:
        """Count a run that returned. A mini-batch whose first such run had no row has failed, and is not retried."""
        state.open_deliveries -= 1
        self._outcome.rows += rows
        if state.rows is None:
            state.rows = rows
            self._outcome.succeeded += bool(rows)
            self._outcome.failed += not rows
            self._outcome.failed_files += max(0, len(state.mini_batch.files) - rows)

    def record_failure(self, state: MiniBatchState) -> tuple[bool, str]:
        """Count a failed run. Return whether to deliver the mini-batch again, and a description of this try."""
        state.failed_tries += 1
        must_retry = state.rows is None and state.failed_tries <= self._max_retries
        if must_retry:
            self._outcome.retries += 1
        else:
            state.open_deliveries -= 1
            if state.rows is None and not state.open_deliveries:
                self._outcome.failed += 1
                self._outcome.failed_files += len(state.mini_batch.files)
        return must_retry, f"try {state.failed_tries} of {self._max_retries + 1}"


class KillSchedule:
    """Schedules kills of a share of the mini-batches, once each, at random times within measured durations.

    While no duration is known, FIRST_KILL_SECONDS replaces it. If a run ends before its kill, the caller increases
    `remaining`, so that another delivery can be killed instead.
    """

    def __init__(self, share: float, mini_batches: int, rng: random.Random) -> None:
        self.remaining = round(share * mini_batches)
        """Number of kills that are not assigned to a delivery."""
        self.killed: set[int] = set()
        """Indices of mini-batches whose worker has been killed."""
        self._new_count, self._rng = mini_batches, rng
        self._seconds_per_file: list[float] = []

    def must_wait(self, *, is_measuring: bool) -> bool:
        """Return whether to hold back new mini-batches, since all of them must be killed and their duration is unknown.

        `is_measuring` says whether a mini-batch is running that will not be killed.
        """
        return is_measuring and not self._seconds_per_file and 0 < self._new_count <= self.remaining

    def assign(self, mini_batch: MiniBatch, *, is_new: bool) -> float | None:
        """Return the seconds after which to kill the worker that runs this delivery, or None."""
        new_count = self._new_count
        if is_new:
            self._new_count -= 1
        if not self.remaining or mini_batch.index in self.killed:
            return None
        is_known = bool(self._seconds_per_file)
        # Retries and duplicates are killed only once no new mini-batch is left.
        chance = self.remaining / new_count if is_new else float(not new_count)
        if (not is_known and self.remaining < new_count) or self._rng.random() >= chance:
            return None
        self.remaining -= 1
        seconds = FIRST_KILL_SECONDS
        if is_known:
            seconds = self._rng.choice(self._seconds_per_file) * len(mini_batch.files)
        return self._rng.random() * seconds

    def record_duration(self, mini_batch: MiniBatch, seconds: float) -> None:
        self._seconds_per_file.append(seconds / len(mini_batch.files))
