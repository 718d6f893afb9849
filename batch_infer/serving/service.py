"""Render the requests of all clients with one loaded model, on one thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from queue import Empty
from threading import Event, Lock

from msgspec import structs

from batch_infer.chain import RowOutcome
from batch_infer.errors import RetryableError, StoppedError
from batch_infer.models import LoraFolder, ModelCard
from batch_infer.provenance import Marker
from batch_infer.records import PromptRequest
from batch_infer.serving.request_queue import RequestQueue, Submission
from batch_infer.settings import Compute, RunSettings
from batch_infer.table import FindLora, RowRules
from batch_infer.worker import ChainLoader, load_chain

DEFAULT_SLOTS = 8
"""Default denoiser batch size. It is small because a single client also waits for empty slots to be computed."""
MIN_READ_AHEAD = 8
"""Minimum read-ahead of the chain: denoiser evaluations per step of the rows that it may take beyond its slots."""
SAFETY_TIMEOUT_SECONDS = 10.0
"""Seconds for which requests to a failing safety service are repeated. It is short because clients are waiting."""
POLL_SECONDS = 0.5
"""Seconds between checks whether a client is still connected."""
CLOSED = "the service was closed before this was rendered"


class RequestCancelledError(RetryableError):
    """A request has timed out, or its client has disconnected."""


@dataclass(frozen=True, slots=True)
class Client:
    """A client that waits for at most `timeout` seconds from `start`, unless it disconnects earlier."""

    timeout: float = math.inf
    is_disconnected: Callable[[], bool] = lambda: False
    start: float = field(default_factory=time.monotonic)

    def check(self) -> float:
        """Return the remaining seconds. Raises RequestCancelledError if the client has disconnected or none remain."""
        if self.is_disconnected():
            raise RequestCancelledError("the client has disconnected: the rest of its request is not rendered")
        remaining = self.start + self.timeout - time.monotonic()
        if remaining <= 0:
            raise RequestCancelledError(
                f"the images were not ready in {self.timeout:g} seconds: request fewer images at a time, or use a batch"
                " endpoint"
            )
        return remaining


NO_TIMEOUT = Client()
"""A client that waits indefinitely."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """Everything that is fixed before the first request: settings, model, compute resources and row rules."""

    settings: RunSettings
    card: ModelCard
    compute: Compute
    rules: RowRules

    @property
    def find_lora(self) -> FindLora | None:
        """The function that finds the LoRAs of rows, or None without --lora-folder. Raises ModelError."""
        folder = self.settings.model.lora_folder
        return _open_lora_folder(folder).find if folder else None

    @property
    def marker(self) -> Marker:
        """The marker of image files. Raises SettingsError."""
        return _make_marker(self.settings.output.provenance, self.card.name, self.card.fingerprint)


_open_lora_folder = lru_cache(LoraFolder)
"""Opens a folder once per process, because its files are hashed."""
_make_marker = lru_cache(Marker)
"""Makes a marker once per process, because it reads the key of signatures."""


class Service:
    """Renders requests from any thread. Rows of all clients share the slots.

    Rows start and finish one by one, and are decoded one at a time, so that a finished row does not wait for others.
    """

    def __init__(self, deployment: Deployment, load: ChainLoader = load_chain) -> None:
        """Load the model. Raises ModelError, SettingsError."""
        requested_slots, safety = deployment.settings.compute.slots, deployment.settings.safety
        slots = requested_slots if isinstance(requested_slots, int) else DEFAULT_SLOTS
        if safety.service is not None:
            service = structs.replace(safety.service, timeout_seconds=SAFETY_TIMEOUT_SECONDS)
            safety = replace(safety, service=service)
        compute = replace(deployment.compute, slots=slots, decode_batch=1, by_size=())
        self.deployment = replace(deployment, compute=compute)
        self._closed = Event()
        self._lock = Lock()
        self._is_rendering = False
        # The thread also loads the model, because a compiled network may be bound to the thread that loaded it.
        self._pool = ThreadPoolExecutor(1, "render")
        self._chain = self._pool.submit(load, deployment.card, compute, safety, self._closed.is_set).result()
        self._queue = RequestQueue(lambda request: request.group_key, slots + max(slots, MIN_READ_AHEAD))

    def render(
        self, requests: Sequence[PromptRequest], client: Client = NO_TIMEOUT
    ) -> Generator[tuple[int, RowOutcome], None, None]:
        """Yield the outcomes of requests as they finish, each with the index of its request.

        Closing the generator cancels the rest, except for rows that the chain has already taken. Raises
        RequestCancelledError; ServiceError or SettingsError, if a safety service causes it; StoppedError once this
        service is closed; and any error that stops the chain while it has these rows.
        """
        client.check()  # the client may have disconnected while the request waited for a thread
        submission = self._queue.submit(requests)
        try:
            self._start_rendering()
            for _ in requests:
                outcome = _next_outcome(submission, client)
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
        finally:
            self._queue.cancel(submission)

    def close(self) -> None:
        """Cancel all requests and stop rendering."""
        with self._lock:
            self._closed.set()
        self._pool.shutdown()
        self._start_rendering()
        self._chain.close()

    def _start_rendering(self) -> None:
        """Start to render, unless rendering is in progress or nothing is pending."""
        with self._lock:
            if self._is_rendering:
                return
            if self._closed.is_set():
                self._queue.fail(StoppedError(CLOSED), include_pending=True)
            if not self._queue:
                return
            self._is_rendering = True
            work = self._pool.submit(self._render_pending)
        work.add_done_callback(self._finish)  # outside the lock: runs at once if the work is already done

    def _render_pending(self) -> None:
        """Render until nothing is pending. Requests that are submitted meanwhile take the next free slots."""
        for outcome in self._chain.render(self._queue):
            self._queue.deliver(outcome)

    def _finish(self, work: Future[None]) -> None:
        """Fail submissions with unfinished requests in the chain, and render requests that were submitted too late."""
        error = work.exception()
        closed = StoppedError(CLOSED) if self._closed.is_set() else None
        no_outcome = RuntimeError("the chain returned no outcome for a request that it took")
        has_failed = self._queue.fail(error or closed or no_outcome)
        if error is not None and not has_failed:
            self._queue.fail(error, include_pending=True)
        with self._lock:
            self._is_rendering = False
        self._start_rendering()


def _next_outcome(submission: Submission, client: Client) -> tuple[int, RowOutcome] | BaseException:
    while True:
        with suppress(Empty):
            return submission.outcomes.get(timeout=min(client.check(), POLL_SECONDS))
