"""What workers and the one who hands out rows say to each other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from batch_infer.engines.ledger import Chunk
from batch_infer.records import ResultRow
from batch_infer.settings import Device
from batch_infer.worker import Account, WorkerSettings


@dataclass(frozen=True, slots=True)
class Found:
    """The device that a worker will compute on."""

    device: Device


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded."""


@dataclass(frozen=True, slots=True)
class Wants:
    """A worker will soon have rendered what it has; it is answered at once, with None where there is no more."""


@dataclass(frozen=True, slots=True)
class Idle:
    """A worker has committed all that it had; it is answered when there is something for it again."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker has ended in order."""

    account: Account


@dataclass(frozen=True, slots=True)
class Alive:
    """A worker's device has come a step further."""


@dataclass(frozen=True, slots=True)
class Committed:
    """These rows, without their texts, are in the manifest."""

    rows: Sequence[ResultRow]
    account: Account


@dataclass(frozen=True, slots=True)
class Logged:
    record: logging.LogRecord


@dataclass(frozen=True, slots=True)
class Broken:
    """A worker ends with an error: the name of its class, what it says, and the traceback of one that is a bug."""

    kind: str
    told: str
    trace: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Give up what is under way, commit what is finished, and end."""


FromWorker: TypeAlias = "Found | Ready | Wants | Idle | Alive | Committed | Logged | Broken | Ended"
ToWorker: TypeAlias = "WorkerSettings | Chunk | Stop | None"
