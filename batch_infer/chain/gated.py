"""The gated chain: a service is asked about each prompt before it is rendered, and about each image after."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING

from batch_infer.chain.outcomes import Rendered, Size, Unrendered
from batch_infer.chain.pipeline_call import PipelineCallChain
from batch_infer.chain.shape import BatchSizes
from batch_infer.chain.step_level import StepLevelChain
from batch_infer.errors import BatchInferError, Interrupted, RowBroken
from batch_infer.records import PromptRequest, Verdict
from batch_infer.safety import Gate
from batch_infer.stages import Stages

if TYPE_CHECKING:
    from batch_infer.models import AnyPipeline, LatentDiffusion

PROMPTS_AHEAD = 32
"""Prompts that are asked about before a slot wants them."""
IMAGES_AHEAD = 32
"""Images that the service has not judged yet: beyond this the device waits."""
PROMPTS_KEPT = 1024
"""Prompts whose verdict is kept: the images of a row have one, and so have rows that say the same."""
REFUSED_AHEAD = 64
"""Refused rows that are held back while the chain is at work."""
PATIENT_SECONDS = 1.0
"""For how long a row is waited for that would be made together with others."""
LOOK_SECONDS = 0.2
"""How often one who waits for the service looks whether to stop."""
GRACE_SECONDS = 5.0
"""How long a run that stops waits for the service's word on images that are rendered."""


class GracePeriod:
    """Stops a gate GRACE_SECONDS after the run is stopped, or once `end` is called.

    Until then the service can answer for images that are rendered already.
    """

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop, self._ended = stop, False
        self._since: float | None = None

    def __call__(self) -> bool:
        if not self._stop():
            return False
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        return self._ended or now >= self._since + GRACE_SECONDS

    def end(self) -> None:
        self._ended = True


class GatedChain:
    """A chain with a gate; asked as the chain in it is. What the service does not answer for gives no image."""

    def __init__(
        self,
        chain: StepLevelChain | PipelineCallChain,
        gate: Gate,
        stop: Callable[[], bool] = lambda: False,
        grace: GracePeriod | None = None,
    ) -> None:
        """`grace` is what tells the gate to stop, where anything does."""
        self._chain, self._gate, self._stop = chain, gate, stop
        self._grace = grace or GracePeriod(stop)

    @property
    def model(self) -> LatentDiffusion | AnyPipeline:
        return self._chain.model

    @property
    def uses_pipeline_call(self) -> bool:
        return self._chain.uses_pipeline_call

    @property
    def batch_sizes(self) -> BatchSizes:
        return self._chain.batch_sizes

    @property
    def stages_by_size(self) -> Mapping[Size, Stages]:
        return self._chain.stages_by_size

    @property
    def stages(self) -> Stages:
        return self._chain.stages

    def close(self) -> None:
        """Ask nothing more."""
        self._gate.close()

    def render(self, requests: Iterable[PromptRequest]) -> Iterator[Rendered | Unrendered]:
        """Render requests whose prompts pass, in the order in which they finish.

        One that the service is slow to answer for is overtaken by those behind it. Where the run stops, images that
        are rendered are given if the service answers within GRACE_SECONDS. Raises ServiceError and SettingsError, once
        all that was judged before has been given.
        """
        with ThreadPoolExecutor(self._gate.at_once, "gate") as pool:
            prompts = _Prompts(iter(requests), self._gate, pool, patient=self._chain.uses_pipeline_call)
            images = _Images(self._gate, pool)
            judged: list[Rendered | Unrendered] = []

            def ready() -> Iterator[Rendered | Unrendered]:
                for outcome in (*images.through(), *prompts.take_refused()):
                    judged.append(outcome)
                    yield outcome

            try:
                while not self._stop():
                    if prompts.has_one():
                        for outcome in self._chain.render(prompts, ready):
                            if judged and outcome is judged[-1]:
                                judged.clear()
                                yield outcome
                                continue
                            yield from images.add(outcome, prompts)
                            yield from prompts.take_refused()
                    elif awaited := [*prompts.awaited, *images.awaited]:
                        wait(awaited, LOOK_SECONDS, FIRST_COMPLETED)
                    else:
                        break
                    yield from images.through()
                    yield from prompts.take_refused()
                else:
                    yield from self._finish(prompts, images)
            except Interrupted:
                yield from self._finish(prompts, images)
            except BatchInferError:
                yield from images.judged()
                yield from prompts.take_refused()
                raise
            finally:
                self._grace.end()
                pool.shutdown(wait=False, cancel_futures=True)

    def _finish(self, prompts: _Prompts, images: _Images) -> Iterator[Rendered | Unrendered]:
        """Yield what is rendered and checked in time. No more prompts are sent to the service."""
        prompts.give_up()
        yield from images.judged(GRACE_SECONDS)
        yield from prompts.take_refused()


class _Prompts(Iterator[PromptRequest]):
    """Requests whose prompts have passed.

    It says that there are none where there is none at this moment, and may have more later: the device goes on with
    what it has. A `patient` one waits, for a chain that makes rows together which come together.
    """

    def __init__(self, source: Iterator[PromptRequest], gate: Gate, pool: ThreadPoolExecutor, *, patient: bool) -> None:
        self._source, self._gate, self._pool, self._patient = source, gate, pool, patient
        self._asked: deque[tuple[PromptRequest, Future[Verdict]]] = deque()
        self._known: OrderedDict[str, Future[Verdict]] = OrderedDict()
        self._passed: dict[tuple[str, int], Verdict] = {}
        self._refused: list[Unrendered] = []

    def __next__(self) -> PromptRequest:
        while len(self._refused) < REFUSED_AHEAD and self.has_one(self._patient):
            if (request := self._judge()) is not None:
                return request
        raise StopIteration

    def has_one(self, patient: bool = False) -> bool:
        """Whether there is a word on a prompt, be it that it is refused; `patient`: or will be in a moment."""
        self._ask_ahead()
        if patient and self._asked:
            wait(self.awaited[:1], PATIENT_SECONDS)
        return any(answer.done() for answer in self.awaited)

    @property
    def awaited(self) -> list[Future[Verdict]]:
        """The words that are waited for."""
        return [answer for _, answer in self._asked]

    def give_up(self) -> None:
        """Send images to the service before prompts that were not sent yet."""
        for answer in self.awaited:
            answer.cancel()

    def take_refused(self) -> Iterator[Unrendered]:
        refused, self._refused = self._refused, []
        yield from refused

    def verdict_of(self, request: PromptRequest) -> Verdict:
        """What was said of the prompt of a request that has passed, to be asked for once."""
        return self._passed.pop(request.key)

    def _ask_ahead(self) -> None:
        while len(self._asked) < PROMPTS_AHEAD and (request := next(self._source, None)) is not None:
            self._asked.append((request, self._verdict(request.prompt)))

    def _verdict(self, prompt: str) -> Future[Verdict]:
        known = self._known.pop(prompt, None)
        if known is None or (known.done() and known.exception() is not None):
            known = self._pool.submit(self._gate.check_prompt, prompt)
        self._known[prompt] = known
        while len(self._known) > PROMPTS_KEPT:
            self._known.popitem(last=False)
        return known

    def _judge(self) -> PromptRequest | None:
        """The first request that there is a word on, None where it is refused."""
        place = next(place for place, answer in enumerate(self.awaited) if answer.done())
        request, answer = self._asked[place]
        del self._asked[place]
        try:
            verdict = answer.result()
        except RowBroken as error:
            self._refused.append(Unrendered(request, "failed", str(error)))
            return None
        if verdict.nsfw is not False:
            self._refused.append(Unrendered(request, "blocked", verdict.reason or "the prompt was refused", verdict))
            return None
        self._passed[request.key] = verdict
        return request


class _Images:
    """Rendered images on their way through the gate."""

    def __init__(self, gate: Gate, pool: ThreadPoolExecutor) -> None:
        self._gate, self._pool = gate, pool
        self._asked: deque[tuple[Rendered, Verdict, Future[Verdict]]] = deque()

    def add(self, outcome: Rendered | Unrendered, prompts: _Prompts) -> Iterator[Rendered | Unrendered]:
        """Take an outcome in; gives those that are through."""
        before = prompts.verdict_of(outcome.request)
        if isinstance(outcome, Unrendered):
            yield outcome
        else:
            self._asked.append((outcome, before, self._pool.submit(self._gate.check_image, outcome.pixels)))
        yield from self.through()

    def through(self, ahead: int = IMAGES_AHEAD) -> Iterator[Rendered | Unrendered]:
        """Give those that are judged; waits while more than `ahead` are not."""
        while self._asked:
            if len(self._asked) > ahead:
                wait(self.awaited, return_when=FIRST_COMPLETED)
            place = next((place for place, answer in enumerate(self.awaited) if answer.done()), None)
            if place is None:
                return
            yield self._judge(place)

    @property
    def awaited(self) -> list[Future[Verdict]]:
        """The words that are waited for."""
        return [answer for *_, answer in self._asked]

    def judged(self, seconds: float | None = None) -> Iterator[Rendered | Unrendered]:
        """Yield what the service has answered, in any position. Nothing more is sent to it.

        Or, with `seconds`, about no more than it answers for in that time.
        """
        if seconds is None:
            wait([answer for _, _, answer in self._asked if not answer.cancel()])
        else:
            wait(self.awaited, seconds)
        self._asked = deque(entry for entry in self._asked if _has_word(entry[2]))
        while self._asked:
            yield self._judge(0)

    def _judge(self, place: int) -> Rendered | Unrendered:
        rendered, of_prompt, answer = self._asked[place]
        del self._asked[place]
        try:
            of_image = answer.result()
        except RowBroken as error:
            return Unrendered(rendered.request, "failed", str(error))
        if of_image.nsfw is None:
            return Unrendered(rendered.request, "failed", f"{self._gate.name} has no word on the image")
        return replace(rendered, verdict=rendered.verdict.merge(of_prompt).merge(of_image))


def _has_word(answer: Future[Verdict]) -> bool:
    return (
        answer.done()
        and not answer.cancelled()
        and (answer.exception() is None or isinstance(answer.exception(), RowBroken))
    )
