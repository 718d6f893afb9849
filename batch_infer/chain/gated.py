"""Send prompts to a safety service before rendering, and images afterwards."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace

from batch_infer.chain.base import (
    BatchSizes,
    Chain,
    DeviceChain,
    NoRequest,
    RenderedImage,
    RequestSource,
    RowOutcome,
    UnrenderedRow,
    as_source,
)
from batch_infer.errors import BatchInferError, FailedRowError, StoppedError
from batch_infer.records import PromptRequest, Verdict
from batch_infer.safety import Gate

PROMPTS_AHEAD = 32
"""Maximum number of rows whose prompts are checked before slots are free for them."""
IMAGES_AHEAD = 32
"""Number of images that may wait for a verdict before rendering pauses."""
CACHED_PROMPTS = 1024
"""Maximum number of cached verdicts on prompts. Images of one row share a verdict, as do rows with equal prompts."""
BLOCKED_AHEAD = 64
"""Maximum number of rows, blocked or failed because of their prompts, that are collected before they are yielded."""
POLL_SECONDS = 0.2
"""Maximum number of seconds between checks whether to stop while only verdicts on images are missing."""
GRACE_SECONDS = 5.0
"""Maximum number of seconds to wait for verdicts on rendered images after a stop."""


class GatedChain(Chain):
    """Lets another chain render requests whose prompts pass, and yields only images that the service has checked."""

    def __init__(
        self,
        chain: DeviceChain,
        make_gate: Callable[[Callable[[], bool]], Gate],
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """`make_gate` creates the gate from a function that returns whether the gate must stop waiting."""
        self._chain, self._stop = chain, stop
        self._has_ended, self._grace_end = False, math.inf
        self._gate = make_gate(self._must_stop_gate)
        self.model = chain.model
        self.stages_by_size = chain.stages_by_size

    @property
    def batch_sizes(self) -> BatchSizes:
        return self._chain.batch_sizes

    def close(self) -> None:
        self._gate.close()

    def render(self, requests: Iterable[PromptRequest] | RequestSource) -> Iterator[RowOutcome]:
        """Render requests whose prompts pass, and yield outcomes in the order in which they finish.

        A request may overtake others whose prompts take longer to check. After a stop, rendered images are yielded if
        the service checks them within GRACE_SECONDS. Raises ServiceError and SettingsError, after yielding the outcomes
        of image checks that had started.
        """
        with ThreadPoolExecutor(self._gate.concurrency, "gate") as pool:
            images = _ImageGate(self._gate, pool)
            prompts = _PromptGate(as_source(requests), self._gate, pool, images)
            try:
                with suppress(StoppedError):
                    for outcomes in self._chain.steps(prompts):
                        for outcome in outcomes:
                            yield from images.add(outcome, prompts.pop_verdict(outcome.request))
                        yield from images.take_checked()
                        yield from prompts.take_blocked()
                    yield from prompts.take_blocked()
                    while images.pending and not self._stop():
                        wait(images.pending, POLL_SECONDS, FIRST_COMPLETED)
                        yield from images.take_checked()
                for future in prompts.futures:
                    future.cancel()
                yield from images.finish(GRACE_SECONDS)
                yield from prompts.take_blocked()
            except BatchInferError:
                yield from images.finish()
                yield from prompts.take_blocked()
                raise
            finally:
                self._has_ended = True
                pool.shutdown(wait=False, cancel_futures=True)

    def _must_stop_gate(self) -> bool:
        """After a stop, return True once `render` has ended or GRACE_SECONDS have passed."""
        if not self._stop():
            return False
        self._grace_end = min(self._grace_end, time.monotonic() + GRACE_SECONDS)
        return self._has_ended or time.monotonic() >= self._grace_end


class _PromptGate:
    """A request source that passes on the requests whose prompts are safe, and collects the outcomes of the others."""

    def __init__(self, source: RequestSource, gate: Gate, pool: ThreadPoolExecutor, images: _ImageGate) -> None:
        self._source, self._gate, self._pool, self._images = source, gate, pool, images
        self._is_at_end = False
        self._pending: list[tuple[PromptRequest, Future[Verdict]]] = []
        self._cache: OrderedDict[str, Future[Verdict]] = OrderedDict()
        self._passed: dict[tuple[str, int], Verdict] = {}
        self._blocked: list[UnrenderedRow] = []

    def poll(self, timeout: float = 0.0) -> PromptRequest | NoRequest:
        """Return the oldest request whose prompt has passed. See `RequestSource`.

        A verdict on an image or a refused prompt also ends the wait, so that the chain can yield the outcome.
        """
        while len(self._blocked) < BLOCKED_AHEAD:
            self._submit_ahead(timeout)
            if self._is_at_end and not self._pending:
                return NoRequest.END
            if timeout and not self._blocked:
                wait([*self.futures, *self._images.pending], timeout, FIRST_COMPLETED)
            index = next((index for index, future in enumerate(self.futures) if future.done()), None)
            if index is None:
                break
            if (request := self._take(index)) is not None:
                return request
        return NoRequest.NOT_YET

    @property
    def futures(self) -> list[Future[Verdict]]:
        return [future for _, future in self._pending]

    def take_blocked(self) -> Iterator[UnrenderedRow]:
        blocked, self._blocked = self._blocked, []
        yield from blocked

    def pop_verdict(self, request: PromptRequest) -> Verdict:
        """Remove and return the verdict on the prompt of a request that `poll` returned."""
        return self._passed.pop(request.key)

    def _submit_ahead(self, timeout: float) -> None:
        """Read requests, and submit prompts to the service.

        Requests with the same prompt share a check while it is cached. After a check that raised an error, the next
        request with the same prompt gets a new one.
        """
        while len(self._pending) < PROMPTS_AHEAD:
            is_idle = not self._pending and not self._images.pending
            request = self._source.poll(timeout if is_idle else 0.0)
            if not isinstance(request, PromptRequest):
                self._is_at_end = request is NoRequest.END
                return
            future = self._cache.pop(request.prompt, None)
            if future is None or (future.done() and future.exception() is not None):
                future = self._pool.submit(self._gate.check_prompt, request.prompt)
            self._cache[request.prompt] = future
            if len(self._cache) > CACHED_PROMPTS:
                self._cache.popitem(last=False)
            self._pending.append((request, future))

    def _take(self, index: int) -> PromptRequest | None:
        """Remove a request whose check is done. Return it if its prompt has passed, otherwise collect its outcome."""
        request, future = self._pending.pop(index)
        try:
            verdict = future.result()
        except FailedRowError as error:
            self._blocked.append(UnrenderedRow(request, "failed", str(error)))
            return None
        if verdict.nsfw is not False:
            self._blocked.append(UnrenderedRow(request, "blocked", verdict.reason or "the prompt was refused", verdict))
            return None
        self._passed[request.key] = verdict
        return request


class _ImageGate:
    """Submits rendered images to the service and collects the verdicts."""

    def __init__(self, gate: Gate, pool: ThreadPoolExecutor) -> None:
        self._gate, self._pool = gate, pool
        self.pending: dict[Future[Verdict], tuple[RenderedImage, Verdict]] = {}
        """Submitted images by future, each with the verdict on its prompt."""

    def add(self, outcome: RowOutcome, prompt_verdict: Verdict) -> Iterator[RowOutcome]:
        """Submit an image, or yield a row without one. Then yield checked images."""
        if isinstance(outcome, UnrenderedRow):
            yield outcome
        else:
            self.pending[self._pool.submit(self._gate.check_image, outcome.pixels)] = outcome, prompt_verdict
        yield from self.take_checked()

    def take_checked(self) -> Iterator[RowOutcome]:
        """Yield the outcomes of finished checks, after waiting for one if more than IMAGES_AHEAD are pending."""
        if len(self.pending) > IMAGES_AHEAD:
            wait(self.pending, return_when=FIRST_COMPLETED)
        for future in list(self.pending):
            if future.done():
                yield self._take(future)

    def finish(self, seconds: float | None = None) -> Iterator[RowOutcome]:
        """Yield the outcomes of checks that finish within `seconds`. Errors other than FailedRowError are ignored.

        Without a time limit, wait for checks that have started and cancel the rest.
        """
        if seconds is None:
            wait([future for future in self.pending if not future.cancel()])
        else:
            wait(self.pending, seconds)
        for future in list(self.pending):
            if future.done() and not future.cancelled():
                error = future.exception()
                if error is None or isinstance(error, FailedRowError):
                    yield self._take(future)

    def _take(self, future: Future[Verdict]) -> RowOutcome:
        rendered, prompt_verdict = self.pending.pop(future)
        try:
            verdict = future.result()
        except FailedRowError as error:
            return UnrenderedRow(rendered.request, "failed", str(error))
        if verdict.nsfw is None:
            return UnrenderedRow(rendered.request, "failed", f"{self._gate.name} returned no verdict on the image")
        return replace(rendered, verdict=rendered.verdict.merge(prompt_verdict).merge(verdict))
