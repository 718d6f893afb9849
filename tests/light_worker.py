"""A model without torch for workers in other processes, so that a machine has room for many of them.

Importing this module replaces the detection of the device, which would import torch. A worker imports it to unpickle
one of its functions. LIGHT_COMMIT_ROWS is the maximum number of rows in a manifest part.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from batch_infer.engines import worker_process
from batch_infer.settings import Device
from batch_infer.worker import committing
from tests.dummies import BATCH_SECONDS, DummyChain


def _detect_device(requested: str) -> Device:
    return Device("cpu", "")


vars(worker_process)["detect_device"] = _detect_device
committing.COMMIT_ROWS = int(os.environ.get("LIGHT_COMMIT_ROWS", committing.COMMIT_ROWS))


def load(card: Any, compute: Any, safety: Any, stop: Callable[[], bool]) -> Any:
    return DummyChain(stop)


def load_slow(card: Any, compute: Any, safety: Any, stop: Callable[[], bool]) -> Any:
    """Return a chain that, like one on a GPU, takes time for a batch of rows but no CPU time."""
    return DummyChain(stop, seconds=BATCH_SECONDS)


def load_dying(card: Any, compute: Any, safety: Any, stop: Callable[[], bool]) -> Any:
    os._exit(3)
