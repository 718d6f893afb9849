"""The gate around a chain: what is asked of it, what it keeps from being rendered, and what becomes of its faults."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from batch_infer.chain import Elsewhere, GatedChain, GracePeriod, Rendered, Unrendered, nothing
from batch_infer.chain import gated as gated_chain
from batch_infer.chain.gated import IMAGES_AHEAD, PROMPTS_AHEAD, REFUSED_AHEAD
from batch_infer.errors import Interrupted, RowBroken, ServiceError
from batch_infer.manifest import Manifest
from batch_infer.models import read_card
from batch_infer.records import PromptRequest, Verdict
from batch_infer.settings import Compute, ModelSettings, OutputSettings, SafetySettings
from batch_infer.store import PinnedFolder
from batch_infer.worker import WorkerSettings
from batch_infer.worker.loading import load_chain
from batch_infer.worker.worker import Worker
from tests.deaths import eventually
from tests.dummies import DummyChain
from tests.rendering import make_request

COMPUTE = Compute("cpu", "float32", 16, 8, 1)


class WordGate:
    """Obeys prompts: `bad` is refused, `broken` has no answer; images of seeds from 100 are flagged, 200 broken."""

    name, at_once = "words", 4

    def __init__(self, seconds: float = 0.0, wait: Callable[[], object] = lambda: None) -> None:
        self.prompts: Counter[str] = Counter()
        self.images: Counter[int] = Counter()
        self._seconds, self._wait, self._lock = seconds, wait, threading.Lock()

    def check_prompt(self, prompt: str) -> Verdict:
        with self._lock:
            self.prompts[prompt] += 1
        time.sleep(self._seconds)
        self._fault(prompt)
        bad = "bad" in prompt
        scores = {"Hate": 4.0 if bad else 0.0, "Sexual": 1.0}
        return Verdict(bad, self.name, scores, "the words are bad" if bad else None)

    def check_image(self, image: np.ndarray) -> Verdict:
        shade = int(image[0, 0, 0])
        with self._lock:
            self.images[shade] += 1
        time.sleep(self._seconds)
        if shade == 200:
            raise RowBroken("no word on this image")
        if shade == 201:
            raise ServiceError("nobody is there")
        return Verdict(shade >= 100, self.name, {"Hate": float(shade >= 100)}, "a bad image" if shade >= 100 else None)

    def _fault(self, prompt: str) -> None:
        match prompt.split()[0]:
            case "broken":
                raise RowBroken("no word on this prompt")
            case "gone":
                self._wait()
                raise ServiceError("nobody is there")
            case "stopped":
                raise Interrupted("the run stops")
            case "slow":
                self._wait()

    def close(self) -> None:
        pass


def requests(*prompts: str) -> list[PromptRequest]:
    return [make_request(f"row-{k}", prompt, seed=k % 50) for k, prompt in enumerate(prompts)]


def gated(gate: WordGate, stop: Callable[[], bool] = lambda: False) -> GatedChain:
    chain: Any = DummyChain(stop)
    return GatedChain(chain, gate, stop)


def by_id(outcomes: Iterable[Rendered | Unrendered]) -> dict[str, Rendered | Unrendered]:
    found = list(outcomes)
    assert len({outcome.request.id for outcome in found}) == len(found)
    return {outcome.request.id: outcome for outcome in found}


def test_a_refused_prompt_is_asked_about_once_and_not_rendered() -> None:
    gate = WordGate()
    chain = gated(gate)
    found = by_id(chain.render(requests("good 1", "bad 2", "good 3", "bad 4")))
    assert gate.prompts == Counter(["good 1", "bad 2", "good 3", "bad 4"])
    assert gate.images == Counter([0, 2])
    assert chain.stages.images == 2
    refused = found["row-1"]
    assert isinstance(refused, Unrendered)
    assert (refused.status, refused.error) == ("blocked", "the words are bad")
    assert refused.verdict == Verdict(True, "words", {"Hate": 4.0, "Sexual": 1.0}, "the words are bad")
    good = found["row-0"]
    assert isinstance(good, Rendered)
    assert good.verdict == Verdict(False, "words", {"Hate": 0.0, "Sexual": 1.0})


def test_the_images_of_a_prompt_cost_one_question_about_it_and_one_each_about_them() -> None:
    gate = WordGate(seconds=0.001)
    rows = [replace(make_request("row", "good", seed=k), image_index=k) for k in range(40)]
    assert len(list(gated(gate).render(rows))) == 40
    assert gate.prompts == Counter({"good": 1})
    assert gate.images == Counter(range(40))


@pytest.mark.parametrize(("word", "error"), [("broken", "no word on this prompt"), ("good", "no word on this image")])
def test_no_answer_is_no_image(word: str, error: str) -> None:
    rows = [make_request("lost", f"{word} prompt", seed=200), make_request("other", "good other", seed=1)]
    found = by_id(gated(WordGate()).render(rows))
    lost = found["lost"]
    assert isinstance(lost, Unrendered)
    assert (lost.status, lost.error) == ("failed", error)
    assert isinstance(found["other"], Rendered)


def test_a_flagged_image_says_who_flagged_it_and_keeps_the_highest_scores() -> None:
    class Judged(DummyChain):
        def render(
            self, requests: Iterable[PromptRequest], elsewhere: Elsewhere = nothing
        ) -> Iterator[Rendered | Unrendered]:
            for outcome in super().render(requests):
                assert isinstance(outcome, Rendered)
                yield replace(outcome, verdict=Verdict(True, "own", {"concept_0": -0.5, "Hate": 0.5}))

    chain: Any = Judged(lambda: False)
    (found,) = GatedChain(chain, WordGate()).render([make_request("row", "good", seed=120)])
    assert isinstance(found, Rendered)
    scores = {"concept_0": -0.5, "Hate": 1.0, "Sexual": 1.0}
    assert found.verdict == Verdict(True, "own+words", scores, "a bad image")


def test_a_service_that_is_gone_ends_it_once_all_that_was_judged_is_given() -> None:
    rows = requests(*(f"good {k}" for k in range(20)), *["bad"] * 3, "gone 0", *(f"good {k}" for k in range(20, 40)))
    gate = WordGate(wait=lambda: eventually(lambda: len(gate.images) >= 8 and gate.prompts["good 22"] > 0))
    found = set()
    with pytest.raises(ServiceError, match="nobody is there"):
        for outcome in gated(gate).render(rows):
            found.add(outcome.request.id)
    judged = {f"row-{shade}" for shade in gate.images}
    assert found == judged | {"row-20", "row-21", "row-22"}
    assert len(judged) >= 8


def test_what_a_worker_has_finished_is_committed_before_the_fault_is_raised(tmp_path: Path) -> None:
    rows = [make_request(f"row-{k}", f"good {k}", seed=k) for k in range(30)]
    rows[25] = make_request("row-25", "good 25", seed=201)
    compute = COMPUTE
    settings = WorkerSettings(
        read_card(ModelSettings()),
        compute,
        SafetySettings(),
        OutputSettings(),
        PinnedFolder.of(tmp_path),
        pa.schema([]),
    )
    worker = Worker(settings, "w", lambda *_: gated(WordGate()))
    with pytest.raises(ServiceError, match="nobody is there"):
        worker.render(rows, lambda _: None)
    with Manifest(tmp_path).index() as index:
        done = [k for k in range(30) if index.find((f"row-{k}", 0))]
    assert set(range(16)) <= set(done) and 25 not in done
    assert len(list(tmp_path.rglob("*.png"))) == len(done)
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_prompt_that_is_long_in_coming_is_overtaken() -> None:
    answered = threading.Event()
    gate = WordGate(wait=lambda: answered.wait(300))
    ids = []
    for outcome in gated(gate).render(requests("good", "good", "slow", *["good"] * 60)):
        ids.append(outcome.request.id)
        if len(ids) == 62:
            answered.set()
    assert ids[-1] == "row-2" and len(set(ids)) == 63


def test_finished_images_are_given_where_the_run_stops() -> None:
    """The service answers for them only after the stop; rows that are not rendered by then are not finished."""
    stop = threading.Event()
    rendered = threading.Event()

    class Late(WordGate):
        def check_image(self, image: np.ndarray) -> Verdict:
            rendered.set()
            assert stop.wait(300)
            return super().check_image(image)

    def stop_after_the_first() -> None:
        rendered.wait(300)
        stop.set()

    gate = Late()
    thread = threading.Thread(target=stop_after_the_first)
    thread.start()
    chain = gated(gate, stop.is_set)
    found = by_id(chain.render(requests(*[f"good {k}" for k in range(200)])))
    thread.join()
    assert len(found) == chain.stages.images == gate.images.total() > 0
    assert all(isinstance(outcome, Rendered) for outcome in found.values())


def test_a_run_that_stops_does_not_wait_for_a_service_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_chain, "GRACE_SECONDS", 0.05)
    stop = threading.Event()
    grace = GracePeriod(stop.is_set)
    hung = threading.Event()

    class Hanging(WordGate):
        def check_image(self, image: np.ndarray) -> Verdict:
            if image[0, 0, 0] == 3:
                hung.set()
                eventually(grace)
                raise Interrupted("stopped")
            return super().check_image(image)

    def stop_once_it_hangs() -> None:
        hung.wait(300)
        stop.set()

    threading.Thread(target=stop_once_it_hangs).start()
    chain: Any = DummyChain(stop.is_set)
    found = by_id(GatedChain(chain, Hanging(), stop.is_set, grace).render(requests(*[f"good {k}" for k in range(8)])))
    assert "row-3" not in found


def test_what_is_judged_is_given_while_the_device_is_at_work() -> None:
    """And so is a prompt that is refused, though no other row comes to an end."""
    given: list[str] = []

    class Slow(DummyChain):
        def render(
            self, requests: Iterable[PromptRequest], elsewhere: Elsewhere = nothing
        ) -> Iterator[Rendered | Unrendered]:
            source = iter(requests)
            if (first := next(source, None)) is not None:
                yield from self._make([first])
            while len(given) < 2:  # as a UNet at work on the third row
                next(source, None)
                yield from elsewhere()
                time.sleep(0.001)

    chain: Any = Slow(lambda: False)
    rows = requests("good first", "bad", "good second")
    for outcome in GatedChain(chain, WordGate()).render(rows):
        given.append(outcome.request.id)
    assert sorted(given[:2]) == ["row-0", "row-1"]


def test_a_chain_gives_what_is_ready_elsewhere_after_each_tick(demo_folder: Path) -> None:
    rows = [make_request(f"row-{k}", "a red circle", steps=3) for k in range(2)]
    chain = load_chain(read_card(ModelSettings(str(demo_folder))), COMPUTE, SafetySettings("none"))
    elsewhere = Unrendered(make_request("elsewhere"), "failed", "no word")
    found = [outcome.request.id for outcome in chain.render(rows, lambda: [elsewhere])]  # type: ignore[call-arg]
    assert found.count("elsewhere") == chain.stages.ticks > 0
    assert {"row-0", "row-1"} <= set(found)


def test_an_image_without_a_word_is_no_image() -> None:
    class Silent(WordGate):
        def check_image(self, image: np.ndarray) -> Verdict:
            return Verdict()

    (found,) = gated(Silent()).render([make_request("row", "good")])
    assert isinstance(found, Unrendered)
    assert (found.status, found.error) == ("failed", "words has no word on the image")


def test_a_table_of_refused_prompts_is_given_as_it_goes() -> None:
    taken = 0

    def rows() -> Iterator[PromptRequest]:
        nonlocal taken
        for k in range(500):
            taken += 1
            yield make_request(f"row-{k}", f"bad {k}")

    given = set()
    for outcome in gated(WordGate()).render(rows()):
        given.add(outcome.request.id)
        assert taken <= len(given) + PROMPTS_AHEAD + REFUSED_AHEAD
    assert len(given) == 500


def test_the_device_waits_for_a_service_that_is_slower() -> None:
    gate = WordGate(seconds=0.01)
    chain = gated(gate)
    for given, _ in enumerate(chain.render(requests(*["good"] * 150)), 1):
        assert chain.stages.images <= given + IMAGES_AHEAD + 2 * 8
    assert given == 150


@pytest.mark.parametrize("word", ["slow", "stopped"])
def test_it_stops_while_the_service_thinks(word: str) -> None:
    stop = threading.Event()
    gate = WordGate(wait=lambda: stop.wait(300))
    threading.Timer(0.05, stop.set).start()
    found = by_id(gated(gate, stop.is_set).render(requests("good", f"{word} 1", *["good"] * 10)))
    assert "row-1" not in found
