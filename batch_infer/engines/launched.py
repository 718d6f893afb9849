"""The launched engine: workers that somebody else's launcher starts (torchrun, accelerate launch), on one node or many.

Rank 0 hands out the rows, and its own share is rendered by a process that it starts. It tells the other ranks through
OUT, which all of them see, where to come, and a key without which nobody is heard. No process group is formed: ranks
never wait for each other.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from threading import Thread

from batch_infer.atomic import KnownFolder, replacing
from batch_infer.engines.local import Local
from batch_infer.engines.messages import Stop
from batch_infer.engines.peers import Peer
from batch_infer.engines.rank import Parent, Seat, work
from batch_infer.errors import ModelError, ServiceError, SettingsError
from batch_infer.models import ModelCard
from batch_infer.settings import Device
from batch_infer.worker import WorkerSettings

MEETING = ".crew"
"""Where rank 0 says, in OUT, how it is reached."""
LOOK_SECONDS = 0.5
COMING_SECONDS = 1800.0
"""How long the others look for rank 0: it may fetch a model first."""
LATE_SECONDS = 20.0
"""How long rank 0, when all is done, waits for those who have not come yet, to tell them so."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a launcher has put this process: its rank among all, and on its own machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    """Of rank 0's machine."""
    launch: str = ""
    """Tells one start of all ranks from another."""


def place() -> Place | None:
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
    return Place(rank, world, local_rank, local_world, found[4] or "", " ".join(launch))


class Launched(Local):
    """The workers as rank 0 has them: its own, and those that come."""

    def __init__(self, asked: str, here: Place, out: Path) -> None:
        super().__init__(asked, 1)
        self._here, self._out = here, out
        self._arrived: queue.Queue[Peer] = queue.Queue()
        self._missing = here.world - 1
        self._closed = False

    def __enter__(self) -> Launched:
        self._key = secrets.token_bytes(32)
        # From all sides where others are on other machines: the name of this one may mean its loopback here.
        alone = self._here.world == self._here.local_world
        self._listener = Listener((self._here.address if alone else "", 0))
        with replacing(self._out / MEETING, parents=False) as temporary:
            temporary.touch(mode=0o600)
            address = [self._here.address, self._listener.address[1]]
            note = {"launch": self._here.launch, "address": address, "key": self._key.hex()}
            temporary.write_text(json.dumps(note))
        Thread(target=self._accept, daemon=True).start()
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        deadline = time.monotonic() + (LATE_SECONDS if kind is None else 0.0)
        while self._missing > 0 and time.monotonic() < deadline:
            for peer in self.newcomers():
                peer.send(Stop())
            time.sleep(LOOK_SECONDS)
        (self._out / MEETING).unlink(missing_ok=True)
        self._closed = True
        self._listener.close()
        super().__exit__(kind)

    def find_device(self, stop: Callable[[], bool] = lambda: False) -> Device:
        device = replace(super().find_device(stop), count=self._here.local_world)
        self.workers = self._here.world
        return device

    def newcomers(self) -> Iterable[Peer]:
        while not self._arrived.empty():
            self._missing -= 1
            yield self._arrived.get()

    def hire(self, rank: int) -> Peer | None:
        """Of the others, a launcher starts all again when one has died, this process too."""
        return self._start(rank) if rank == 0 else None

    def _accept(self) -> None:
        while not self._closed:
            with suppress(OSError):  # a connection that was gone again, or the listener's end
                Thread(target=self._admit, args=(self._listener.accept(),), daemon=True).start()

    def _admit(self, link: Connection) -> None:
        """Hear who it is. On a thread of its own, since one who says nothing must keep out nobody else."""
        try:
            deliver_challenge(link, self._key)
            answer_challenge(link, self._key)
            self._arrived.put(Peer(link.recv(), link))
        except (AuthenticationError, EOFError, OSError):
            link.close()


def join(here: Place, asked: str, out: Path, card: ModelCard, stop: Callable[[], bool]) -> None:
    """Render as one of the other ranks, with the model as it lies on this machine, until rank 0 has no more.

    Raises ServiceError where rank 0 is not found.
    """
    if (link := find_rank_0(out, here.launch, stop)) is None:
        return
    link.send(here.rank)

    def own(settings: WorkerSettings) -> WorkerSettings:
        if (card.fingerprint, card.scheduler_fingerprint) != (
            settings.card.fingerprint,
            settings.card.scheduler_fingerprint,
        ):
            raise ModelError(f"rank {here.rank}: {card.name} differs from what rank 0 has under that name")
        return replace(settings, card=card, out=replace(KnownFolder.of(out), marker=settings.out.marker))

    work(Parent(link, stop), Seat(here.rank, here.local_rank, asked, ours=False), own)


def find_rank_0(out: Path, launch: str, stop: Callable[[], bool]) -> Connection | None:
    """Find rank 0; None where `stop` said so before. The note of another launch is not for us, and ours will follow."""
    deadline = time.monotonic() + COMING_SECONDS
    while not stop():
        try:
            told = json.loads((out / MEETING).read_text())
            if told["launch"] == launch:
                return Client(tuple(told["address"]), authkey=bytes.fromhex(told["key"]))
        except (OSError, EOFError, ValueError, LookupError, AuthenticationError):
            pass
        if time.monotonic() > deadline:
            raise ServiceError(f"rank 0 has not come to {out}; do all ranks see the same folder?")
        time.sleep(LOOK_SECONDS)
    return None
