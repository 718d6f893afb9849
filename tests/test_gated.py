"""The gated chain sends prompts and images to a service, blocks rows, and handles failures of the service."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from batch_infer.chain import GatedChain, NoRequest, RenderedImage, RequestSource, StepLevelChain, UnrenderedRow
from batch_infer.chain import gated as gated_chain
from batch_infer.chain.base import IteratorSource
from batch_infer.chain.gated import BLOCKED_AHEAD, IMAGES_AHEAD, PROMPTS_AHEAD
from batch_infer.errors import FailedRowError, ServiceError, StoppedError
from batch_infer.manifest import Manifest
from batch_infer.models import read_card
from batch_infer.records import PromptRequest, Verdict
from batch_infer.settings import Compute, ModelSettings, OutputSettings, SafetySettings
from batch_infer.stages import Stages
from batch_infer.store import LocalStore
from batch_infer.worker import WorkerSettings
from batch_infer.worker.loading import load_chain
from batch_infer.worker.worker import Worker
from tests.deaths import eventually
from tests.dummies import DummyChain
from tests.rendering import make_request

COMPUTE = Compute("cpu", "float32", 16, 8, 1)


class WordGate:
    """A gate controlled by words in prompts and by seeds, which the images contain as shades.

    `bad` prompts are blocked, and images with seeds from 100 on are flagged. `broken` prompts and seed 200 fail.
    """

    name, concurrency = "words", 4

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self.prompts: Counter[str] = Counter()
        self.images: Counter[int] = Counter()
        self._wait, self._lock = wait, threading.Lock()

    def check_prompt(self, prompt: str) -> Verdict:
        with self._lock:
            self.prompts[prompt] += 1
        self._raise_error(prompt)
        bad = "bad" in prompt
        scores = {"Hate": 4.0 if bad else 0.0, "Sexual": 1.0}
        return Verdict(bad, self.name, scores, "the words are bad" if bad else None)

    def check_image(self, image: np.ndarray) -> Verdict:
        shade = int(image[0, 0, 0])
        with self._lock:
            self.images[shade] += 1
        if shade == 200:
            raise FailedRowError("this image was not checked")
        if shade == 201:
            raise ServiceError("the service is down")
        return Verdict(shade >= 100, self.name, {"Hate": float(shade >= 100)}, "a bad image" if shade >= 100 else None)

    def _raise_error(self, prompt: str) -> None:
        match prompt.split()[0]:
            case "broken":
                raise FailedRowError("this prompt was not checked")
            case "gone":
                self._wait()
                raise ServiceError("the service is down")
            case "stopped":
                raise StoppedError("the run stops")
            case "slow":
                self._wait()

    def close(self) -> None:
        pass


def requests(*prompts: str) -> list[PromptRequest]:
    return [make_request(f"row-{k}", prompt, seed=k % 50) for k, prompt in enumerate(prompts)]


def gated(gate: WordGate, stop: Callable[[], bool] = lambda: False) -> GatedChain:
    chain: Any = DummyChain(stop)
    return GatedChain(chain, lambda _: gate, stop)


def by_id(outcomes: Iterable[RenderedImage | UnrenderedRow]) -> dict[str, RenderedImage | UnrenderedRow]:
    results = list(outcomes)
    assert len({outcome.request.id for outcome in results}) == len(results)
    return {outcome.request.id: outcome for outcome in results}


def test_a_blocked_prompt_is_checked_once_and_not_rendered() -> None:
    gate = WordGate()
    chain = gated(gate)
    results = by_id(chain.render(requests("good 1", "bad 2", "good 3", "bad 4")))
    assert gate.prompts == Counter(["good 1", "bad 2", "good 3", "bad 4"])
    assert gate.images == Counter([0, 2])
    assert chain.stages.images == 2
    refused = results["row-1"]
    assert isinstance(refused, UnrenderedRow)
    assert (refused.status, refused.error) == ("blocked", "the words are bad")
    assert refused.verdict == Verdict(True, "words", {"Hate": 4.0, "Sexual": 1.0}, "the words are bad")
    good = results["row-0"]
    assert isinstance(good, RenderedImage)
    assert good.verdict == Verdict(False, "words", {"Hate": 0.0, "Sexual": 1.0})


def test_a_prompt_is_checked_once_and_each_of_its_images_once() -> None:
    received = threading.Event()
    gate = WordGate(wait=lambda: received.wait(60))

    def rows() -> Iterator[PromptRequest]:
        for k in range(40):
            if k == 20:  # so that the only check of the prompt ends after many rows have asked for it
                received.set()
            yield replace(make_request("row", "slow", seed=k), image_index=k)

    assert len(list(gated(gate).render(rows()))) == 40
    assert gate.prompts == Counter({"slow": 1})
    assert gate.images == Counter(range(40))


@pytest.mark.parametrize(
    ("word", "error"), [("broken", "this prompt was not checked"), ("good", "this image was not checked")]
)
def test_without_an_answer_the_row_fails(word: str, error: str) -> None:
    rows = [make_request("unchecked", f"{word} prompt", seed=200), make_request("other", "good other", seed=1)]
    results = by_id(gated(WordGate()).render(rows))
    unchecked = results["unchecked"]
    assert isinstance(unchecked, UnrenderedRow)
    assert (unchecked.status, unchecked.error) == ("failed", error)
    assert isinstance(results["other"], RenderedImage)


def test_verdicts_of_checker_and_gate_are_merged_with_the_highest_scores() -> None:
    class Checked(DummyChain):
        def steps(self, source: RequestSource) -> Iterator[list[RenderedImage | UnrenderedRow]]:
            for outcomes in super().steps(source):
                for outcome in outcomes:
                    assert isinstance(outcome, RenderedImage)
                    yield [replace(outcome, verdict=Verdict(True, "own", {"concept_0": -0.5, "Hate": 0.5}))]

    chain: Any = Checked(lambda: False)
    (outcome,) = GatedChain(chain, lambda _: WordGate()).render([make_request("row", "good", seed=120)])
    assert isinstance(outcome, RenderedImage)
    scores = {"concept_0": -0.5, "Hate": 1.0, "Sexual": 1.0}
    assert outcome.verdict == Verdict(True, "own+words", scores, "a bad image")


def test_a_service_error_is_raised_after_everything_checked_is_yielded() -> None:
    rows = requests(*(f"good {k}" for k in range(20)), *["bad"] * 3, "gone 0", *(f"good {k}" for k in range(20, 40)))
    gate = WordGate(wait=lambda: eventually(lambda: len(gate.images) >= 8 and gate.prompts["good 22"] > 0))
    results = set()
    with pytest.raises(ServiceError, match="the service is down"):
        for outcome in gated(gate).render(rows):
            results.add(outcome.request.id)
    checked = {f"row-{shade}" for shade in gate.images}
    assert results == checked | {"row-20", "row-21", "row-22"}
    assert len(checked) >= 8


def test_finished_rows_are_committed_before_a_service_error_is_raised(tmp_path: Path) -> None:
    class LateError(WordGate):
        """Fails only after twenty images have been checked."""

        checked = 0

        def check_image(self, image: np.ndarray) -> Verdict:
            if image[0, 0, 0] == 201:
                eventually(lambda: self.checked >= 20)
            verdict = super().check_image(image)
            with self._lock:
                self.checked += 1
            return verdict

    rows = [make_request(f"row-{k}", f"good {k}", seed=k) for k in range(30)]
    rows[25] = make_request("row-25", "good 25", seed=201)
    folder = LocalStore(tmp_path).address
    settings = WorkerSettings(
        read_card(ModelSettings()), COMPUTE, SafetySettings(), OutputSettings(), folder, pa.schema([])
    )
    worker = Worker(settings, "w", lambda *_: gated(LateError()))
    with pytest.raises(ServiceError, match="the service is down"):
        worker.render(rows, lambda _: None)
    with Manifest(tmp_path).index() as index:
        done = [k for k in range(30) if index.find((f"row-{k}", 0))]
    assert len(done) >= 20 and 25 not in done
    assert len(list(tmp_path.rglob("*.png"))) == len(done)
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_prompt_with_a_slow_check_is_overtaken() -> None:
    answered = threading.Event()
    gate = WordGate(wait=lambda: answered.wait(60))
    ids = []
    for outcome in gated(gate).render(requests("good", "good", "slow", *["good"] * 60)):
        ids.append(outcome.request.id)
        if len(ids) == 62:
            answered.set()
    assert ids[-1] == "row-2" and len(set(ids)) == 63


def test_rendered_images_are_checked_after_a_stop() -> None:
    """The service answers only after the stop. Rows that are not rendered by then are not finished."""
    stop = threading.Event()
    rendered = threading.Event()

    class Late(WordGate):
        def check_image(self, image: np.ndarray) -> Verdict:
            rendered.set()
            assert stop.wait(60)
            return super().check_image(image)

    def stop_after_the_first() -> None:
        rendered.wait(60)
        stop.set()

    gate = Late()
    thread = threading.Thread(target=stop_after_the_first)
    thread.start()
    chain = gated(gate, stop.is_set)
    results = by_id(chain.render(requests(*[f"good {k}" for k in range(200)])))
    thread.join()
    assert len(results) == chain.stages.images == gate.images.total() > 0
    assert all(isinstance(outcome, RenderedImage) for outcome in results.values())


def test_a_stopped_run_does_not_wait_for_a_service_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_chain, "GRACE_SECONDS", 0.05)
    stop = threading.Event()
    hung = threading.Event()

    class Hanging(WordGate):
        def __init__(self, must_stop: Callable[[], bool]) -> None:
            super().__init__()
            self._must_stop = must_stop

        def check_image(self, image: np.ndarray) -> Verdict:
            if image[0, 0, 0] == 3:
                hung.set()
                eventually(self._must_stop)
                raise StoppedError("stopped")
            return super().check_image(image)

    def stop_once_it_hangs() -> None:
        hung.wait(60)
        stop.set()

    threading.Thread(target=stop_once_it_hangs).start()
    chain: Any = DummyChain(stop.is_set)
    results = by_id(GatedChain(chain, Hanging, stop.is_set).render(requests(*[f"good {k}" for k in range(8)])))
    assert "row-3" not in results


def test_outcomes_of_the_gate_are_yielded_while_the_device_is_busy() -> None:
    """These are a checked image and a blocked prompt. No other row finishes."""
    ids: list[str] = []

    class Slow(DummyChain):
        def steps(self, source: RequestSource) -> Iterator[list[RenderedImage | UnrenderedRow]]:
            while (first := source.poll(1.0)) is NoRequest.NOT_YET:
                yield []
            assert isinstance(first, PromptRequest)
            yield self._make([first], Stages())
            deadline = time.monotonic() + 60
            while len(ids) < 2 and time.monotonic() < deadline:  # like a UNet that renders the other good row
                source.poll()
                yield []
                time.sleep(0.001)

    chain: Any = Slow(lambda: False)
    rows = requests("good first", "bad", "good second")
    for outcome in GatedChain(chain, lambda _: WordGate()).render(rows):
        ids.append(outcome.request.id)
    assert len(set(ids[:2])) == 2 and "row-1" in ids[:2], "either good prompt may pass first"


def test_a_chain_returns_control_after_each_unet_call(demo_folder: Path) -> None:
    rows = [make_request(f"row-{k}", "a red circle", steps=3) for k in range(2)]
    chain = load_chain(read_card(ModelSettings(str(demo_folder))), COMPUTE, SafetySettings("none"))
    assert isinstance(chain, StepLevelChain)
    ids: list[str] = []
    calls = [0]
    for outcomes in chain.steps(IteratorSource(rows)):
        ids += [outcome.request.id for outcome in outcomes]
        calls.append(chain.stages.ticks)
    assert calls[-1] > 0 and all(later - earlier <= 1 for earlier, later in pairwise(calls))
    assert sorted(ids) == ["row-0", "row-1"]


def test_an_image_without_a_verdict_fails() -> None:
    class Silent(WordGate):
        def check_image(self, image: np.ndarray) -> Verdict:
            return Verdict()

    (outcome,) = gated(Silent()).render([make_request("row", "good")])
    assert isinstance(outcome, UnrenderedRow)
    assert (outcome.status, outcome.error) == ("failed", "words returned no verdict on the image")


def test_blocked_rows_of_a_long_table_are_yielded_as_it_is_read() -> None:
    read = 0

    def rows() -> Iterator[PromptRequest]:
        nonlocal read
        for k in range(500):
            read += 1
            yield make_request(f"row-{k}", f"bad {k}")

    ids = set()
    for outcome in gated(WordGate()).render(rows()):
        ids.add(outcome.request.id)
        assert read <= len(ids) + PROMPTS_AHEAD + BLOCKED_AHEAD
    assert len(ids) == 500


def test_the_device_waits_for_a_slower_service() -> None:
    class SlowGate(WordGate):
        """Answers only once the device is as far ahead as it may be, or has rendered everything."""

        answered = 0

        def check_image(self, image: np.ndarray) -> Verdict:
            assert eventually(lambda: chain.stages.images >= min(self.answered + IMAGES_AHEAD, 150))
            with self._lock:
                self.answered += 1
            return super().check_image(image)

    chain = gated(SlowGate())
    outcomes = chain.render(requests(*["good"] * 150))
    ahead = [chain.stages.images - yielded for yielded, _ in enumerate(outcomes, 1)]
    assert len(ahead) == 150
    assert IMAGES_AHEAD - 8 <= max(ahead) <= IMAGES_AHEAD + 2 * 8


@pytest.mark.parametrize("word", ["slow", "stopped"])
def test_a_stop_ends_the_wait_for_the_service(word: str) -> None:
    stop = threading.Event()
    gate = WordGate(wait=lambda: stop.wait(60))
    threading.Timer(0.05, stop.set).start()
    results = by_id(gated(gate, stop.is_set).render(requests("good", f"{word} 1", *["good"] * 10)))
    assert "row-1" not in results
