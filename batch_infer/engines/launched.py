"""The launched engine: workers that somebody else's launcher starts (torchrun, accelerate launch), on one node or many.

Rank 0 hands out the rows, and its own share is rendered by a process that it starts. It tells the other ranks its
address through a note in OUT, which all of them see. Both sides of a connection prove that they know a key: the one in
the note, which only its owner can read, or the one in the environment. No process group is formed: ranks never wait for
each other.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from threading import Thread, Timer

import msgspec

from batch_infer.engines.handle import WorkerHandle, hang_up
from batch_infer.engines.local import LocalEngine
from batch_infer.engines.messages import Hello, Stop, decode_from_worker, encode
from batch_infer.engines.rendezvous import MEETING, Note, age_of, read_note, write_note
from batch_infer.engines.worker_process import Parent, WorkerSpec, work
from batch_infer.errors import ModelError, ServiceError, SettingsError
from batch_infer.models import ModelCard
from batch_infer.settings import Device
from batch_infer.stopping import StopRequested
from batch_infer.store import PinnedFolder
from batch_infer.worker import WorkerSettings

LOOK_SECONDS = 0.5
COMING_SECONDS = 1800.0
"""How long the others look for rank 0: it may fetch a model first."""
LATE_SECONDS = 20.0
"""How long rank 0, when all is done, waits for those who have not come yet, to tell them so."""
GREETING_SECONDS = 30.0
"""How long a connection may take to prove that it knows the key."""
GREETING_BYTES = 256
STARTED = time.monotonic()
"""When this process started."""

log = logging.getLogger("batch_infer")


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Where a launcher has put this process: its rank among all, and on its own machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    """Of rank 0's machine."""
    launch: str = ""
    """Tells one start of all ranks from another."""


def read_rank_info() -> RankInfo | None:
    """This process's place, None where no launcher has started it. Raises SettingsError."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    found = [os.environ.get(name) for name in names]
    if not all(found):
        return None
    try:
        rank, world, local_rank, local_world = (int(value or "") for value in found[:4])
    except ValueError:
        raise SettingsError(f"{', '.join(names)} are set, but not to the numbers that a launcher gives") from None
    launch = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")]
    return RankInfo(rank, world, local_rank, local_world, found[4] or "", " ".join(launch))


class LaunchedEngine(LocalEngine):
    """The workers as rank 0 has them: its own, and those that come."""

    def __init__(self, asked: str, here: RankInfo, out: Path) -> None:
        super().__init__(asked, 1)
        self._here, self._out = here, out
        self._arrived: queue.Queue[WorkerHandle] = queue.Queue()
        self._missing = here.world - 1
        self._closed = False

    def __enter__(self) -> LaunchedEngine:
        self._listener = _listen(self._here)
        port = self._listener.getsockname()[1]
        self._note = Note(self._here.launch, self._here.address, port, secrets.token_hex(32))
        self._key = write_note(self._out, self._note)
        Thread(target=self._accept, daemon=True).start()
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._release_late_ranks(LATE_SECONDS if kind is None else 0.0, has_ended=kind is None)
        finally:
            self._closed = True
            self._listener.close()
            super().__exit__(kind)

    def _release_late_ranks(self, seconds: float, *, has_ended: bool) -> None:
        deadline = time.monotonic() + seconds
        while self._missing > 0 and time.monotonic() < deadline:
            for peer in self.newcomers():
                peer.send(Stop())
            time.sleep(LOOK_SECONDS)
        if self._missing > 0 and has_ended:  # those that come later need not wait
            write_note(self._out, msgspec.structs.replace(self._note, has_ended=True))
        else:
            remove_rendezvous(self._out)

    def find_device(self) -> Device:
        device = replace(super().find_device(), count=self._here.local_world)
        self.workers = self._here.world
        return device

    def newcomers(self) -> Iterable[WorkerHandle]:
        while not self._arrived.empty():
            self._missing -= 1
            yield self._arrived.get()

    def hire(self, rank: int) -> WorkerHandle | None:
        """Of the others, a launcher starts all again when one has died, this process too."""
        return self._start(rank) if rank == 0 else None

    def _accept(self) -> None:
        while not self._closed:
            with suppress(OSError):  # a connection that was gone again, or the listener's end
                link = Connection(self._listener.accept()[0].detach())
                Thread(target=self._admit, args=(link,), daemon=True).start()

    def _admit(self, link: Connection) -> None:
        """Hear who it is. On a thread of its own, since one who says nothing must keep out nobody else."""
        timer = Timer(GREETING_SECONDS, hang_up, (link,))
        timer.daemon = True
        timer.start()
        try:
            deliver_challenge(link, self._key)
            answer_challenge(link, self._key)
            message = decode_from_worker(link.recv_bytes(GREETING_BYTES))
            timer.cancel()
            if isinstance(message, Hello) and 0 < message.rank < self._here.world:
                self._arrived.put(WorkerHandle(message.rank, link))
            else:
                link.close()
        except (AuthenticationError, EOFError, OSError, msgspec.DecodeError):
            timer.cancel()
            link.close()


def remove_rendezvous(out: Path) -> None:
    """Remove the note of a launch that has ended, or was killed."""
    (out / MEETING).unlink(missing_ok=True)


def _listen(here: RankInfo) -> socket.socket:
    """Listen where the other ranks come to. Raises SettingsError where the launcher's address is not this machine's.

    From all sides where others are on other machines: the name of this one may mean its loopback here.
    """
    is_alone = here.world == here.local_world
    try:
        family, _, _, _, address = socket.getaddrinfo(here.address, 0, type=socket.SOCK_STREAM)[0]
        if is_alone:
            return socket.create_server(address[:2], family=family)
        is_dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else family
        return socket.create_server(("", 0), family=family, dualstack_ipv6=is_dual)
    except OSError as error:
        raise SettingsError(
            f"MASTER_ADDR={here.address}: rank 0 cannot listen there: {error.strerror or error}"
        ) from error


def join_launch(here: RankInfo, asked: str, out: Path, card: ModelCard, stop: Callable[[], bool]) -> None:
    """Render as one of the other ranks, with the model as it lies on this machine, until rank 0 has no more.

    Raises ServiceError where rank 0 is not found.
    """
    if (link := find_rank_0(out, here.launch, stop)) is None:
        return
    link.send_bytes(encode(Hello(here.rank)))

    def own(settings: WorkerSettings) -> WorkerSettings:
        if (card.fingerprint, card.scheduler_fingerprint) != (
            settings.card.fingerprint,
            settings.card.scheduler_fingerprint,
        ):
            raise ModelError(f"rank {here.rank}: {card.name} differs from what rank 0 has under that name")
        return replace(settings, card=card, out=replace(PinnedFolder.of(out), marker=settings.out.marker))

    with suppress(StopRequested):  # the others go on without this rank
        work(Parent(link, stop), WorkerSpec(here.rank, here.local_rank, asked, ours=False), own)


def find_rank_0(out: Path, launch: str, stop: Callable[[], bool]) -> Connection | None:
    """Find rank 0; None where `stop` said so before, or where rank 0 of this launch has ended.

    The note of another launch is not for us, and ours will follow; so is one of another user. Launches may share a
    name, so a note that rank 0 has ended counts only if it was written after this process started.
    """
    deadline, said = time.monotonic() + COMING_SECONDS, ""
    while not stop():
        found = read_note(out)
        if isinstance(found, str):
            if found != said:
                log.warning("%s", found)
            said = found
        elif found is not None and found.note.launch == launch:
            if found.note.has_ended and age_of(found, out) <= time.monotonic() - STARTED:
                return None
            if not found.note.has_ended and (link := _connect(found.note, found.key)) is not None:
                return link
        if time.monotonic() > deadline:
            raise ServiceError(f"rank 0 has not come to {out}; do all ranks see the same folder? {said}".rstrip())
        time.sleep(LOOK_SECONDS)
    return None


def _connect(note: Note, key: bytes) -> Connection | None:
    """Connect to rank 0; None where it cannot be reached, or does not know the key. Raises ServiceError."""
    link = None
    try:
        link = Connection(socket.create_connection((note.host, note.port), GREETING_SECONDS).detach())
        os.set_blocking(link.fileno(), True)
        timer = Timer(GREETING_SECONDS, hang_up, (link,))  # another server may have the port of a killed rank 0
        timer.start()
        try:
            answer_challenge(link, key)
            deliver_challenge(link, key)
        finally:
            timer.cancel()
    except socket.gaierror as error:
        raise ServiceError(f"MASTER_ADDR={note.host} is not known on this machine: {error.strerror}") from error
    except (OSError, EOFError, AuthenticationError):
        if link is not None:
            link.close()
        return None
    return link
