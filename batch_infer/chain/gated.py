"""A chain whose prompts and images are checked by a safety service: prompts before rendering, images after."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace

from batch_infer.chain.base import BatchSizes, Chain, DeviceChain, RenderedImage, RowOutcome, UnrenderedRow
from batch_infer.chain.sources import NoRequest, RequestSource, as_source
from batch_infer.errors import BatchInferError, FailedRowError, StoppedError
from batch_infer.records import PromptRequest, Verdict
from batch_infer.safety import Gate

PROMPTS_AHEAD = 32
"""Prompts that are checked before a slot is free for them."""
IMAGES_AHEAD = 32
"""Images that are being checked. Beyond this the device waits."""
PROMPTS_KEPT = 1024
"""Prompts whose verdict is cached: the images of a row share one, and so do rows with the same prompt."""
BLOCKED_AHEAD = 64
"""Blocked rows that are held back while the device is busy."""
BATCHING_SECONDS = 1.0
"""How long a prompt that is being checked holds up rows that are rendered by one pipeline call."""
POLL_SECONDS = 0.2
"""How often a wait for the service checks whether to stop."""
GRACE_SECONDS = 5.0
"""How long a stopped run waits for verdicts on images that are rendered."""


class GracePeriod:
    """Returns whether the gate must stop: GRACE_SECONDS after the run stops, or after `end`.

    Until then the service can check images that are already rendered.
    """

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop, self._ended = stop, False
        self._stopped_at: float | None = None

    def __call__(self) -> bool:
        if not self._stop():
            return False
        now = time.monotonic()
        self._stopped_at = now if self._stopped_at is None else self._stopped_at
        return self._ended or now >= self._stopped_at + GRACE_SECONDS

    def end(self) -> None:
        self._ended = True


class GatedChain(Chain):
    """A chain with a gate. A prompt or image without a verdict gives no image."""

    def __init__(
        self,
        chain: DeviceChain,
        gate: Gate,
        stop: Callable[[], bool] = lambda: False,
        grace: GracePeriod | None = None,
    ) -> None:
        """`grace`: the `stop` of the gate, if it has one."""
        self._chain, self._gate, self._stop = chain, gate, stop
        self._grace = grace or GracePeriod(stop)
        self.model, self.uses_pipeline_call = chain.model, chain.uses_pipeline_call
        self.stages_by_size = chain.stages_by_size

    @property
    def batch_sizes(self) -> BatchSizes:
        return self._chain.batch_sizes

    def close(self) -> None:
        self._gate.close()

    def render(self, requests: Iterable[PromptRequest] | RequestSource) -> Iterator[RowOutcome]:
        """Render requests whose prompts pass, and yield outcomes in the order in which they finish.

        A request overtakes those whose prompts take longer to check. If the run stops, rendered images are yielded if
        the service checks them within GRACE_SECONDS. Raises ServiceError and SettingsError, after yielding everything
        that was checked before.
        """
        with ThreadPoolExecutor(self._gate.concurrency, "gate") as pool:
            images = _ImageGate(self._gate, pool)
            prompts = _PromptGate(as_source(requests), self._gate, pool, images, batching=self.uses_pipeline_call)
            try:
                for outcomes in self._chain.steps(prompts):
                    for outcome in outcomes:
                        yield from images.add(outcome, prompts.pop_verdict(outcome.request))
                    yield from images.take_checked()
                    yield from prompts.take_blocked()
                while images.futures and not self._stop():
                    wait(images.futures, POLL_SECONDS, FIRST_COMPLETED)
                    yield from images.take_checked()
                    yield from prompts.take_blocked()
                yield from self._finish(prompts, images)
            except StoppedError:
                yield from self._finish(prompts, images)
            except BatchInferError:
                yield from images.finish()
                yield from prompts.take_blocked()
                raise
            finally:
                self._grace.end()
                pool.shutdown(wait=False, cancel_futures=True)

    def _finish(self, prompts: _PromptGate, images: _ImageGate) -> Iterator[RowOutcome]:
        """Yield what is checked in time. No more prompts are sent to the service."""
        prompts.cancel()
        yield from images.finish(GRACE_SECONDS)
        yield from prompts.take_blocked()


class _PromptGate:
    """A source of the requests whose prompts pass."""

    def __init__(
        self, source: RequestSource, gate: Gate, pool: ThreadPoolExecutor, images: _ImageGate, *, batching: bool
    ) -> None:
        """`batching`: wait for a prompt that is being checked, since rows are rendered by one call per batch."""
        self._source, self._gate, self._pool, self._images = source, gate, pool, images
        self._batching = batching
        self._at_end = False
        self._pending: list[tuple[PromptRequest, Future[Verdict]]] = []
        self._cache: OrderedDict[str, Future[Verdict]] = OrderedDict()
        self._passed: dict[tuple[str, int], Verdict] = {}
        self._blocked: list[UnrenderedRow] = []

    def poll(self, timeout: float = 0.0) -> PromptRequest | NoRequest:
        """Return the first request whose prompt passes. See `RequestSource`.

        A verdict on an image ends the wait as well, so that the image is yielded at once.
        """
        while len(self._blocked) < BLOCKED_AHEAD:
            self._submit_ahead(timeout)
            if self._at_end and not self._pending:
                return NoRequest.END
            self._wait(timeout)
            index = _first_done(self.futures)
            if index is None:
                break
            if (request := self._take(index)) is not None:
                return request
        return NoRequest.NOT_YET

    @property
    def futures(self) -> list[Future[Verdict]]:
        return [future for _, future in self._pending]

    def cancel(self) -> None:
        """Cancel checks that have not started, so that images are checked first."""
        for future in self.futures:
            future.cancel()

    def take_blocked(self) -> Iterator[UnrenderedRow]:
        blocked, self._blocked = self._blocked, []
        yield from blocked

    def pop_verdict(self, request: PromptRequest) -> Verdict:
        """Return the verdict on the prompt of a request that has passed. Can be called once per request."""
        return self._passed.pop(request.key)

    def _submit_ahead(self, timeout: float) -> None:
        while len(self._pending) < PROMPTS_AHEAD:
            is_idle = not self._pending and not self._images.futures
            request = self._source.poll(timeout if is_idle else 0.0)
            if not isinstance(request, PromptRequest):
                self._at_end = request is NoRequest.END
                return
            self._pending.append((request, self._submit(request.prompt)))

    def _submit(self, prompt: str) -> Future[Verdict]:
        future = self._cache.pop(prompt, None)
        if future is None or (future.done() and future.exception() is not None):
            future = self._pool.submit(self._gate.check_prompt, prompt)
        self._cache[prompt] = future
        while len(self._cache) > PROMPTS_KEPT:
            self._cache.popitem(last=False)
        return future

    def _wait(self, timeout: float) -> None:
        futures = self.futures
        if timeout:
            if not self._blocked and _first_done(futures) is None:
                wait([*futures, *self._images.futures], timeout, FIRST_COMPLETED)
        elif self._batching and futures:
            wait(futures[:1], BATCHING_SECONDS)

    def _take(self, index: int) -> PromptRequest | None:
        """Take a request whose prompt is checked. Returns None if it does not pass."""
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
    """Rendered images that are being checked."""

    def __init__(self, gate: Gate, pool: ThreadPoolExecutor) -> None:
        self._gate, self._pool = gate, pool
        self._pending: list[tuple[RenderedImage, Verdict, Future[Verdict]]] = []

    @property
    def futures(self) -> list[Future[Verdict]]:
        return [future for *_, future in self._pending]

    def add(self, outcome: RowOutcome, prompt_verdict: Verdict) -> Iterator[RowOutcome]:
        """Submit an image, and yield what is checked."""
        if isinstance(outcome, UnrenderedRow):
            yield outcome
        else:
            future = self._pool.submit(self._gate.check_image, outcome.pixels)
            self._pending.append((outcome, prompt_verdict, future))
        yield from self.take_checked()

    def take_checked(self) -> Iterator[RowOutcome]:
        """Yield images that are checked, after waiting until at most IMAGES_AHEAD are not."""
        while self._pending:
            if len(self._pending) > IMAGES_AHEAD:
                wait(self.futures, return_when=FIRST_COMPLETED)
            index = _first_done(self.futures)
            if index is None:
                return
            yield self._take(index)

    def finish(self, seconds: float | None = None) -> Iterator[RowOutcome]:
        """Yield images that are checked within `seconds`, in any order, and drop the others.

        Without a time limit, wait for the checks that have started and cancel the others.
        """
        if seconds is None:
            wait([future for future in self.futures if not future.cancel()])
        else:
            wait(self.futures, seconds)
        self._pending = [entry for entry in self._pending if _has_verdict(entry[2])]
        while self._pending:
            yield self._take(0)

    def _take(self, index: int) -> RowOutcome:
        rendered, prompt_verdict, future = self._pending.pop(index)
        try:
            verdict = future.result()
        except FailedRowError as error:
            return UnrenderedRow(rendered.request, "failed", str(error))
        if verdict.nsfw is None:
            return UnrenderedRow(rendered.request, "failed", f"{self._gate.name} has no verdict on the image")
        return replace(rendered, verdict=rendered.verdict.merge(prompt_verdict).merge(verdict))


def _first_done(futures: list[Future[Verdict]]) -> int | None:
    return next((index for index, future in enumerate(futures) if future.done()), None)


def _has_verdict(future: Future[Verdict]) -> bool:
    """Return whether a check is done, if only with a failure of its row."""
    is_done = future.done() and not future.cancelled()
    return is_done and (future.exception() is None or isinstance(future.exception(), FailedRowError))
