"""Render in the processes of a launcher (torchrun, accelerate launch), on one machine or many.

Rank 0 hands out the rows, and starts a child process that renders rank 0's share. The other ranks find rank 0 through
the rendezvous file in OUT. Both ends of a connection prove that they know its key. The ranks form no torch process
group, so a late or dead rank does not block the others.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import msgspec

from batch_infer.engines.connection import SupervisorConnection
from batch_infer.engines.dial_in import accept_workers, dial_in, listen_everywhere
from batch_infer.engines.handle import WorkerHandle
from batch_infer.engines.local import LocalEngine
from batch_infer.engines.messages import Hello, StopTask, encode
from batch_infer.engines.remote import check_same_model
from batch_infer.engines.rendezvous import Rendezvous, age_seconds, read_rendezvous, remove_rendezvous, write_rendezvous
from batch_infer.engines.worker_process import WorkerSpec, work
from batch_infer.errors import ServiceError, SettingsError, StorageError
from batch_infer.models import ModelCard
from batch_infer.settings import Device
from batch_infer.stopping import StopRequested
from batch_infer.store import Store
from batch_infer.worker import WorkerSettings

POLL_SECONDS = 0.5
ARRIVAL_SECONDS = 1800.0
"""Maximum number of seconds that the other ranks wait for rank 0, which may have to download a model first."""
LATE_SECONDS = 20.0
"""Maximum number of seconds that rank 0 waits at the end for ranks that have not connected yet, to stop them."""
PROCESS_START = time.monotonic()

log = logging.getLogger("batch_infer")


@dataclass(frozen=True, slots=True)
class RankInfo:
    """The rank of this process under a launcher, among all ranks and among those of its machine.

    `master_address` is the address of rank 0's machine. `launch_id` is the same on all ranks of a launch, and usually
    differs between launches.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    launch_id: str = ""


def read_rank_info() -> RankInfo | None:
    """Return the rank of this process, or None if no launcher started it.

    Raises SettingsError if a rank or size in the environment is not a number.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    values = [os.environ.get(name, "") for name in names]
    if not all(values):
        return None
    try:
        rank, world_size, local_rank, local_world_size = map(int, values[:4])
    except ValueError:
        raise SettingsError(f"{', '.join(names[:4])} must be numbers, as a launcher sets them") from None
    launch = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")]
    return RankInfo(rank, world_size, local_rank, local_world_size, values[4], " ".join(launch))


class LaunchedEngine(LocalEngine):
    """Renders as rank 0. The workers are a child process of rank 0, and the other ranks once they have connected."""

    def __init__(self, requested_device: str, rank_info: RankInfo, store: Store) -> None:
        super().__init__(requested_device, 1)
        self._rank_info, self._store = rank_info, store
        self._arrivals: queue.Queue[WorkerHandle] = queue.Queue()
        self._missing_ranks = rank_info.world_size - 1

    def __enter__(self) -> LaunchedEngine:
        info = self._rank_info
        self._listener = _listen(info)
        port = self._listener.getsockname()[1]
        self._rendezvous = Rendezvous(info.launch_id, info.master_address, port, secrets.token_hex(32))
        with ExitStack() as stack:
            stack.callback(self._listener.close)
            key = write_rendezvous(self._store, self._rendezvous)
            accept_workers(self._listener, key, self._admit)
            super().__enter__()
            stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._stop_late_ranks()
            if kind is None and self._missing_ranks > 0:  # tell ranks that start even later not to wait
                write_rendezvous(self._store, msgspec.structs.replace(self._rendezvous, has_ended=True))
            elif kind is None:
                remove_rendezvous(self._store)
            else:
                with suppress(SettingsError, StorageError):  # it would mask the original exception
                    remove_rendezvous(self._store)
        finally:
            self._listener.close()
            super().__exit__(kind)

    def _stop_late_ranks(self) -> None:
        deadline = time.monotonic() + LATE_SECONDS
        while self._missing_ranks > 0 and time.monotonic() < deadline:
            for worker in self.arrivals():
                worker.send(StopTask())
            time.sleep(POLL_SECONDS)

    def detect_device(self) -> Device:
        device = replace(super().detect_device(), count=self._rank_info.local_world_size)
        self.worker_count = self._rank_info.world_size
        return device

    def arrivals(self) -> Iterable[WorkerHandle]:
        while not self._arrivals.empty():
            self._missing_ranks -= 1
            yield self._arrivals.get()

    def restart(self, rank: int) -> WorkerHandle | None:
        """Restart the child process. For other ranks, return None, since only the launcher can restart them."""
        return self._start_child(rank) if rank == 0 else None

    def _admit(self, rank: int, connection: Connection) -> bool:
        is_valid = 0 < rank < self._rank_info.world_size
        if is_valid:
            self._arrivals.put(WorkerHandle(rank, connection))
        return is_valid


def _listen(rank_info: RankInfo) -> socket.socket:
    """Listen for the other ranks. Raises SettingsError if this machine cannot listen at the launcher's address.

    If there are ranks on other machines, listen on all interfaces, since the address may resolve to the loopback
    interface here.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(rank_info.master_address, 0, type=socket.SOCK_STREAM)[0]
        if rank_info.world_size == rank_info.local_world_size:
            return socket.create_server(address[:2], family=family)
        return listen_everywhere(family)
    except OSError as error:
        reason = error.strerror or error
        raise SettingsError(f"MASTER_ADDR={rank_info.master_address}: rank 0 cannot listen there: {reason}") from error


def join_launch(
    rank_info: RankInfo, requested_device: str, store: Store, card: ModelCard, stop: Callable[[], bool]
) -> None:
    """Render as a rank other than 0 until rank 0 has no more rows or `stop` returns True. Loads this machine's model.

    Reports an error in rendering to rank 0 and ends the process. Raises ServiceError if rank 0 cannot be found, and
    StorageError if OUT cannot be used to find it.
    """
    if (connection := connect_to_rank_0(store, rank_info.launch_id, stop)) is None:
        return
    connection.send_bytes(encode(Hello(rank_info.rank)))

    def localize(settings: WorkerSettings) -> WorkerSettings:
        check_same_model(card, settings, f"rank {rank_info.rank}", "rank 0")
        return replace(settings, card=card, out=replace(store.address, marker=settings.out.marker))

    spec = WorkerSpec(rank_info.rank, rank_info.local_rank, requested_device, is_child=False)
    with suppress(StopRequested):  # not an error: the other ranks continue
        work(SupervisorConnection(connection, stop), spec, localize)


def connect_to_rank_0(store: Store, launch_id: str, stop: Callable[[], bool]) -> Connection | None:
    """Connect to rank 0. Return None once `stop` returns True or rank 0 of this launch has ended.

    Ignores the rendezvous of another launch or user, since rank 0 of this launch will replace it. Launches may share an
    id, so a rendezvous with `has_ended` counts only if it was written after this process started.

    Raises ServiceError if rank 0 is not found in time or its address cannot be resolved, and StorageError if the age of
    the rendezvous file cannot be determined.
    """
    deadline, warning = time.monotonic() + ARRIVAL_SECONDS, ""
    while not stop():
        result = read_rendezvous(store)
        if isinstance(result, str):
            if result != warning:
                log.warning("%s", result)
            warning = result
        elif result is not None and result.rendezvous.launch_id == launch_id:
            if not result.rendezvous.has_ended:
                if (connection := _connect(result.rendezvous, result.key)) is not None:
                    return connection
            elif age_seconds(result, store) <= time.monotonic() - PROCESS_START:
                return None
        if time.monotonic() > deadline:
            raise ServiceError(
                f"rank 0 was not found through {store.location}: do all ranks see the same folder? {warning}".rstrip()
            )
        time.sleep(POLL_SECONDS)
    return None


def _connect(rendezvous: Rendezvous, key: bytes) -> Connection | None:
    """Return a connection to rank 0, or None if it does not respond or does not know the key.

    Raises ServiceError if its address cannot be resolved.
    """
    try:
        return dial_in(rendezvous.host, rendezvous.port, key)
    except socket.gaierror as error:
        message = f"MASTER_ADDR={rendezvous.host} cannot be resolved on this machine: {error.strerror}"
        raise ServiceError(message) from error
