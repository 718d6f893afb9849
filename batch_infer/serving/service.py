"""A model that is loaded, and one thread that renders with it for whoever asks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from queue import Empty
from threading import Event, Lock

from batch_infer.chain import GatedChain
from batch_infer.errors import Interrupted, TryAgainLater
from batch_infer.records import PromptRequest
from batch_infer.serving.deployment import Deployment
from batch_infer.serving.request_queue import Mailbox, Order, Outcome
from batch_infer.settings import Compute, SafetySettings
from batch_infer.stages import Stages
from batch_infer.worker import Chain, ChainLoader, load_chain

SLOTS = 8
"""Row-forwards in a UNet call where nobody says. A single caller pays for the empty ones too, with his time."""
AHEAD = 8
"""Row-forwards, at the least, that wait for the slots or are being judged after them."""
CLOSED = "the service was closed before this was rendered"
PATIENCE = 10.0
"""For how many seconds callers wait for a safety service that is silent or failing."""
LOOK_SECONDS = 0.5
"""How often it is looked whether a caller still waits."""


class GivenUp(TryAgainLater):
    """A caller's time is over, or he has gone."""


@dataclass(frozen=True, slots=True)
class Caller:
    """One who waits: for how many seconds at most, since when, and whether he has gone before that."""

    seconds: float = math.inf
    has_gone: Callable[[], bool] = lambda: False
    since: float = field(default_factory=time.monotonic)

    def check(self) -> float:
        """For how many seconds he waits yet. Raises GivenUp."""
        if self.has_gone():
            raise GivenUp("the client has hung up: what it asked for is not rendered any further")
        left = self.since + self.seconds - time.monotonic()
        if left <= 0:
            raise GivenUp(
                f"the images were not ready in {self.seconds:g} seconds: ask for fewer at a time, or score them by a"
                " batch endpoint"
            )
        return left


PATIENT = Caller()
"""Waits for as long as it takes."""


class Service:
    """Renders what callers ask for, from any thread; rows of all callers share the slots, and come and go one by one.

    Rows are decoded one at a time, so that a row that is finished does not wait for others to be.
    """

    def __init__(self, deployment: Deployment, load: ChainLoader = load_chain) -> None:
        """Loads the model. Raises ModelError, SettingsError."""
        self.deployment = replace(deployment, compute=_real_time(deployment))
        self._closed = Event()
        self._lock = Lock()
        self._working = False
        self._pool = ThreadPoolExecutor(1, "render")  # loads too: what is compiled may stay with its thread
        self._chain = self._pool.submit(self._load, load).result()
        driven, slots = self._chain.uses_pipeline_call, self.deployment.compute.slots
        self._mailbox = Mailbox(
            lambda request: request.batch_key if driven else (request.params.height, request.params.width),
            slots + max(slots, AHEAD),
        )

    @property
    def stages(self) -> Stages:
        """Where the time went, so far."""
        return self._chain.stages

    def outcomes(
        self, requests: Sequence[PromptRequest], caller: Caller = PATIENT
    ) -> Generator[tuple[int, Outcome], None, None]:
        """What comes of these requests, as it comes, with the place of each. Who closes this gives the rest up.

        What is given up is not rendered, but for the rows that the chain has taken in by then. Raises GivenUp where the
        caller has gone or has no time left, ServiceError and SettingsError of a safety service, Interrupted once this
        is closed, and what the rendering of these or of rows beside them raised.
        """
        caller.check()  # who has gone while he waited for a thread is not served at all
        order = self._mailbox.post(requests)
        try:
            self._wake()
            for _ in requests:
                found = _next(order, caller)
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            self._mailbox.withdraw(order)

    def close(self) -> None:
        """Give up what is under way, and render no more."""
        with self._lock:
            self._closed.set()
        self._pool.shutdown()
        self._wake()
        if isinstance(self._chain, GatedChain):
            self._chain.close()

    def _load(self, load: ChainLoader) -> Chain:
        deployment = self.deployment
        return load(deployment.card, deployment.compute, _impatient(deployment.settings.safety), self._closed.is_set)

    def _wake(self) -> None:
        """Begin to render, unless that is being done."""
        with self._lock:
            if self._working:
                return
            if self._closed.is_set():
                self._mailbox.fail(Interrupted(CLOSED), waiting_too=True)
            if not self._mailbox:
                return
            self._working = True
            work = self._pool.submit(self._work)
        work.add_done_callback(self._ended)  # calls it at once where that is over already

    def _work(self) -> None:
        """Render until nothing waits. What is posted meanwhile is taken in as slots come free."""
        for outcome in self._chain.render(self._mailbox):
            self._mailbox.deliver(outcome)

    def _ended(self, work: Future[None]) -> None:
        """See that nobody waits in vain, and that those are served who came too late for this time."""
        error = work.exception()
        closed = Interrupted(CLOSED) if self._closed.is_set() else None
        told = self._mailbox.fail(error or closed or RuntimeError("the chain gave no word on a request that it took"))
        if error is not None and not told:
            self._mailbox.fail(error, waiting_too=True)
        with self._lock:
            self._working = False
        self._wake()


def _next(order: Order, caller: Caller) -> tuple[int, Outcome] | BaseException:
    """The next that comes of an order. Raises GivenUp."""
    while True:
        left = caller.check()
        try:
            return order.outcomes.get(timeout=min(left, LOOK_SECONDS))
        except Empty:
            continue


def _real_time(deployment: Deployment) -> Compute:
    """Batch sizes for callers who wait, not for a table."""
    asked = deployment.settings.compute.slots
    return replace(deployment.compute, slots=asked if isinstance(asked, int) else SLOTS, decode_batch=1, by_size=())


def _impatient(safety: SafetySettings) -> SafetySettings:
    if safety.service is None:
        return safety
    return replace(safety, service=replace(safety.service, patience=PATIENCE))
