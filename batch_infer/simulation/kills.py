"""Simulated deaths: which mini-batches have their worker killed while it runs them, and when."""

from __future__ import annotations

import random

from batch_infer.simulation.messages import MiniBatch

GUESS_SECONDS = 0.1
"""Within this time a worker is killed where nobody knows yet how long a mini-batch takes."""


class Kills:
    """A share of mini-batches is to be killed once, at a moment drawn evenly from the time that others have taken.

    A kill that finds its mini-batch done has missed, and is spent on another.
    """

    def __init__(self, share: float, mini_batches: int, draw: random.Random) -> None:
        self._due, self._unseen, self._draw = round(share * mini_batches), mini_batches, draw
        self._killed: set[int] = set()
        self._seconds_per_file: list[float] = []

    @property
    def due(self) -> int:
        """How many are still to come, those not counted that are under way."""
        return self._due

    def waits(self, *, learning: bool) -> bool:
        """Whether what is first delivered now would have to be killed, and a while later it is known when.

        `learning`: a mini-batch that is not to be killed is under way.
        """
        return learning and not self._seconds_per_file and 0 < self._unseen <= self._due

    def arm(self, mini_batch: MiniBatch, *, first: bool) -> float | None:
        """After how many seconds to kill the worker that is handed this one, or None. `first`: it was not before."""
        left = self._unseen
        if first:
            self._unseen -= 1
        if not self._due or mini_batch.index in self._killed:
            return None
        known = bool(self._seconds_per_file)
        chance = self._due / left if first else float(not left)  # a later delivery pays what the first have not
        if (not known and self._due < left) or self._draw.random() >= chance:
            return None
        self._due -= 1
        seconds = self._draw.choice(self._seconds_per_file) * len(mini_batch.files) if known else GUESS_SECONDS
        return self._draw.random() * seconds

    def note(self, mini_batch: MiniBatch, seconds: float) -> None:
        """A mini-batch has taken so long."""
        self._seconds_per_file.append(seconds / len(mini_batch.files))

    def hit(self, mini_batch: MiniBatch) -> None:
        """Its worker was killed while it ran it."""
        self._killed.add(mini_batch.index)

    def missed(self) -> None:
        """A mini-batch was done before its worker was to be killed, or has failed by itself."""
        self._due += 1
