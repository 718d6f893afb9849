"""Request actors, admit the workers in them, and notice which actors have ended."""

from __future__ import annotations

import platform
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from threading import Lock
from typing import TYPE_CHECKING

from batch_infer.engines.connection import SupervisorConnection
from batch_infer.engines.dial_in import accept_workers, dial_in, listen_everywhere
from batch_infer.engines.handle import WorkerHandle, shut_down
from batch_infer.engines.messages import Hello, encode
from batch_infer.engines.remote import localize
from batch_infer.engines.worker_process import WorkerSpec, work
from batch_infer.errors import ServiceError
from batch_infer.settings import ModelSettings

if TYPE_CHECKING:
    from batch_infer.engines.ray import ActorProcess, RayCluster
    from batch_infer.worker import ChainLoader

EXIT_SECONDS = 3.0
"""Maximum number of seconds to wait until Ray knows why an actor's connection broke."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What an actor reserves on its node."""

    cpus: int
    gpus: int = 0

    def __str__(self) -> str:
        parts = [f"{self.gpus} GPU"] * bool(self.gpus) + [f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}"]
        return " and ".join(parts)


@dataclass(frozen=True, slots=True)
class SupervisorAddress:
    host: str
    port: int
    key: bytes


def run_actor(address: SupervisorAddress, number: int, spec: WorkerSpec, model: ModelSettings) -> None:
    """Run a worker in the process of an actor. `number` identifies its request. Raises ServiceError."""
    node = platform.node()
    connection = dial_in(address.host, address.port, address.key)
    if connection is None:
        raise ServiceError(f"node {node} cannot connect to the driver at {address.host}, port {address.port}")
    connection.send_bytes(encode(Hello(number)))
    work(SupervisorConnection(connection), spec, partial(localize, model=model, node=node))


class ActorHandle(WorkerHandle):
    """The supervisor's view of a worker in an actor."""

    def __init__(self, rank: int, connection: Connection, actor: ActorProcess) -> None:
        super().__init__(rank, connection)
        self._actor = actor
        self.is_restartable = True

    def describe_exit(self) -> str:
        return self._actor.find_cause(EXIT_SECONDS) or super().describe_exit()

    def disconnect(self) -> None:
        """Shut down the connection to an actor that has ended, since a node that was lost does not close it."""
        shut_down(self._connection)

    def kill(self) -> None:
        super().kill()
        self._actor.kill()


@dataclass(slots=True, eq=False)
class _Request:
    """An actor that was requested. `worker` is None until it connects, and pending until the supervisor has it."""

    rank: int
    actor: ActorProcess
    worker: ActorHandle | None = None
    is_pending: bool = True


class ActorPool:
    """The actors of a run. As a context manager, it listens for their connections, and kills them on exit."""

    def __init__(
        self, cluster: RayCluster, model: ModelSettings, needs: Resources, load: ChainLoader | None = None
    ) -> None:
        self._cluster, self._model, self._load, self.needs = cluster, model, load, needs
        self._requests: dict[int, _Request] = {}
        self._lock, self._numbers = Lock(), count()
        """The lock guards `_requests`, which the threads that admit workers read too."""
        self._failed_starts: list[tuple[int, str]] = []

    def __enter__(self) -> ActorPool:
        with ExitStack() as stack:
            listener = stack.enter_context(listen_everywhere())
            port = listener.getsockname()[1]
            self._address = SupervisorAddress(self._cluster.host, port, secrets.token_bytes(32))
            accept_workers(listener, self._address.key, self._admit)
            stack.callback(self.kill_all)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def request(self, rank: int) -> None:
        """Request an actor for this rank. It starts once a node has room."""
        device = "cuda" if self.needs.gpus else "cpu"
        spec = WorkerSpec(rank, 0, device, self._load, is_child=False)  # an actor sees only its own GPU
        number = next(self._numbers)
        with self._lock:
            actor = self._cluster.start(self.needs, run_actor, self._address, number, spec, self._model)
            self._requests[number] = _Request(rank, actor)

    def _admit(self, number: int, connection: Connection) -> bool:
        with self._lock:
            request = self._requests.get(number)
            if request is None or request.worker is not None:  # it counts as dead, or has connected already
                return False
            request.worker = ActorHandle(request.rank, connection, request.actor)
            return True

    def arrivals(self) -> Iterator[WorkerHandle]:
        """Yield the workers that have connected since the last call."""
        with self._lock:
            requests = [request for request in self._requests.values() if request.is_pending]
        for request in requests:
            if request.worker is not None:
                request.is_pending = False
                yield request.worker

    def pending(self) -> set[int]:
        """Return the ranks that were requested and have not been in `arrivals`."""
        with self._lock:
            return {request.rank for request in self._requests.values() if request.is_pending}

    def count_connected(self) -> int:
        with self._lock:
            return sum(not request.is_pending for request in self._requests.values())

    def failed_starts(self) -> list[tuple[int, str]]:
        """Return the rank of each actor that ended while it was pending, and why, since the last call."""
        failed, self._failed_starts = self._failed_starts, []
        return failed

    def forget_ended(self) -> None:
        """Forget actors that have ended, and disconnect them or record that they did not start."""
        with self._lock:
            numbers = {request.actor: number for number, request in self._requests.items()}
        for actor in self._cluster.wait_for_ends(numbers):
            cause = actor.find_cause(0.0)
            with self._lock:
                request = self._requests.pop(numbers[actor])
            actor.kill()  # even if its function has returned, since it would keep its resources
            if request.is_pending:
                self._failed_starts.append((request.rank, cause or "its process ended"))
            if request.worker is not None and (request.is_pending or cause is not None):
                request.worker.disconnect()

    def kill_all(self, seconds: float = 0.0, grace_seconds: float = 0.0) -> None:
        """Kill all actors, and wait up to `seconds` until they have ended.

        First wait up to `grace_seconds` for the connected ones to end by themselves, since they may still upload logs.
        """
        with self._lock:
            requests, self._requests = list(self._requests.values()), {}
        self._cluster.wait_for_ends([request.actor for request in requests if request.worker], grace_seconds)
        for request in requests:
            (request.worker or request.actor).kill()
        self._cluster.wait_for_ends([request.actor for request in requests], seconds)
