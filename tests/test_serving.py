"""The service behind real-time endpoints: clients, the objects of responses, and Azure ML's scoring script."""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batch_infer.azureml import online
from batch_infer.azureml.deployment import AzureDeployment, read_deployment
from batch_infer.azureml.payload import MAX_IMAGES, TooManyImagesError
from batch_infer.chain import BatchSizes, NoRequest, PipelineCallChain, RenderedImage, RequestSource, UnrenderedRow
from batch_infer.errors import ServiceError, SettingsError, StoppedError, TableError
from batch_infer.records import PromptRequest, Verdict
from batch_infer.serving import request_queue
from batch_infer.serving.request_queue import RequestQueue
from batch_infer.serving.scoring import check_parameters, score_rows
from batch_infer.serving.service import DEFAULT_SLOTS, SAFETY_TIMEOUT_SECONDS, Client, RequestCancelledError, Service
from batch_infer.settings import OnFlagged, ServiceSettings
from tests import runs
from tests.dummies import DummyChain
from tests.fakes import PaintingPipeline, paint
from tests.rendering import furthest, make_request

Render = Callable[[Iterator[PromptRequest]], Iterator[RenderedImage | UnrenderedRow]]


@pytest.fixture(scope="module")
def deployment() -> AzureDeployment:
    """The built-in model with few steps."""
    loggers = [logging.getLogger(name) for name in ("batch_infer", "py.warnings", "stderr")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    settings = {"STEPS": "2", "THREADS": "1", "DEVICE": "cpu", "ON_FLAGGED": "keep"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"BATCH_INFER_{name}", value)
        patch.delenv("AZUREML_MODEL_DIR", raising=False)
        found = read_deployment("nowhere")
    logging.captureWarnings(False)
    for logger, kept in zip(loggers, before, strict=True):
        logger.handlers, logger.level, logger.propagate = kept
    return found


@pytest.fixture(scope="module")
def real(deployment: AzureDeployment) -> Iterator[Service]:
    with closing(Service(deployment)) as found:
        yield found


@pytest.fixture
def dummy(deployment: AzureDeployment) -> Iterator[Service]:
    with closing(Service(deployment, lambda card, compute, safety, stop: DummyChain(stop))) as found:
        yield found


def all_of(service: Service, requests: Sequence[PromptRequest]) -> list[RenderedImage | UnrenderedRow]:
    """What comes of requests, in their order."""
    found = dict(service.render(requests))
    return [found[place] for place in range(len(requests))]


class Polled(Iterator[PromptRequest]):
    """The requests of a queue as an iterator, which stops when none is pending and may continue later."""

    def __init__(self, queue: RequestSource) -> None:
        self._queue = queue

    def __next__(self) -> PromptRequest:
        request = self._queue.poll()
        if not isinstance(request, PromptRequest):
            raise StopIteration
        return request


def chain_of(render: Render) -> Any:
    """Return a chain that renders by calling this function with an iterator of requests."""
    return SimpleNamespace(uses_pipeline_call=False, render=lambda queue: render(Polled(queue)), close=lambda: None)


def scripted(deployment: AzureDeployment, render: Render) -> Service:
    """A service whose chain is this function."""
    return Service(deployment, lambda *_: chain_of(render))


def rendered(request: PromptRequest, verdict: Verdict = Verdict(), shade: int = 100) -> RenderedImage:  # noqa: B008
    pixels = np.full((64, 64, 3), shade, np.uint8)
    pixels[:32] = 200
    return RenderedImage(request, pixels, verdict, None, 8, 1.0)  # type: ignore[arg-type]


def opened(answer: dict[str, Any]) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(answer["generated_image"], validate=True))) as image:
        return np.asarray(image)


def payload(**input_data: Any) -> str:
    return json.dumps({"input_data": input_data})


# Request-level parameters


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"num_inference_steps": -4}, "num_inference_steps"),
        ({"num_inference_steps": "ten"}, "num_inference_steps"),
        ({"height": 65}, "height 65 is not a multiple of 8"),
        ({"negative_prompt": "x" * 10_001}, "the negative_prompt has 10001 characters"),
    ],
)
def test_an_invalid_parameter_is_refused(
    deployment: AzureDeployment, parameters: dict[str, Any], sentence: str
) -> None:
    """Also where every row has a value of its own."""
    with pytest.raises(TableError, match=f"the parameters of the request: {sentence}"):
        check_parameters(parameters, deployment)
    check_parameters({"num_inference_steps": 4, "seed": None}, deployment)


# Clients that share a chain


def test_clients_take_turns() -> None:
    queue = RequestQueue(lambda request: 0)
    queue.submit([make_request(prompt=f"many {i}") for i in range(3)])
    queue.submit([make_request(prompt="one")])
    polled = Polled(queue)
    given = [next(polled), next(polled)]
    queue.submit([make_request(prompt="late")])
    given += list(polled)
    assert [request.prompt for request in given] == ["many 0", "one", "many 1", "late", "many 2"]
    assert len({request.key for request in given}) == 5
    assert queue.poll() is NoRequest.NOT_YET and queue.poll(1.0) is NoRequest.END
    queue.submit([make_request(prompt="later")])
    assert next(polled).prompt == "later"


def test_the_queue_limits_how_far_a_chain_reads_ahead() -> None:
    """A row with guidance counts twice."""
    queue = RequestQueue(lambda request: 0, limit=4)
    queue.submit([make_request(prompt=f"many {i}") for i in range(5)])
    queue.submit([make_request(prompt="one")])
    given = list(Polled(queue))
    assert [request.prompt for request in given] == ["many 0", "one"]
    assert queue
    queue.deliver(rendered(given[0]))
    assert [request.prompt for request in Polled(queue)] == ["many 1"]


def test_rows_of_one_size_stay_together_until_others_have_waited_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(queue: RequestQueue) -> list[int]:
        small, large = ([make_request(size=(side, side)) for _ in range(3)] for side in (64, 128))
        for requests in (small, large, [*small, *large], large):
            queue.submit(requests)
        return [request.params.height for request in Polled(queue)]

    together = sizes(RequestQueue(lambda request: request.params.height))
    assert together == [64] * 6 + [128] * 9
    monkeypatch.setattr(request_queue, "MAX_WAIT_SECONDS", 0.0)
    in_turn = sizes(RequestQueue(lambda request: request.params.height))
    assert in_turn[:4] == [64, 128, 64, 128]
    assert sorted(in_turn) == together


def test_each_client_gets_its_own_outcomes_in_order(dummy: Service) -> None:
    """All clients use the same ids."""

    def ask(client: int) -> list[tuple[str, str, int]]:
        requests = [make_request("row", f"{client} {i}", seed=client + i) for i in range(5)]
        outcomes = all_of(dummy, requests)
        assert [outcome.request for outcome in outcomes] == requests
        return [(o.request.prompt, type(o).__name__, int(o.pixels[0, 0, 0])) for o in outcomes]  # type: ignore

    with ThreadPoolExecutor(12) as clients:
        found = list(clients.map(ask, range(60)))
    assert found == [[(f"{client} {i}", "RenderedImage", client + i) for i in range(5)] for client in range(60)]
    assert all_of(dummy, []) == []


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ServiceError("nobody is there"), SettingsError("no key")])
@pytest.mark.parametrize("taken", [0, 2])
def test_an_error_of_the_chain_is_raised_and_later_clients_are_served(
    deployment: AzureDeployment, error: Exception, taken: int
) -> None:
    errors = [error]

    def render(source: Iterator[PromptRequest]) -> Iterator[RenderedImage | UnrenderedRow]:
        if errors:
            for _ in range(taken):
                next(source)
            raise errors.pop()
        yield from map(rendered, source)

    with closing(scripted(deployment, render)) as found:
        with pytest.raises(type(error), match=str(error)):
            all_of(found, [make_request() for _ in range(3)])
        assert len(all_of(found, [make_request() for _ in range(3)])) == 3


def test_a_row_without_an_outcome_is_an_error(deployment: AzureDeployment) -> None:
    def render(source: Iterator[PromptRequest]) -> Iterator[RenderedImage | UnrenderedRow]:
        yield rendered(next(source))
        next(source)

    with (
        closing(scripted(deployment, render)) as found,
        pytest.raises(RuntimeError, match="returned no outcome"),
    ):
        all_of(found, [make_request() for _ in range(3)])


def test_a_request_joins_rows_that_are_being_rendered(deployment: AzureDeployment) -> None:
    """The chain reads the queue again after it was empty."""
    under_way, posted = threading.Event(), threading.Event()
    calls = []

    def render(source: Iterator[PromptRequest]) -> Iterator[RenderedImage | UnrenderedRow]:
        calls.append(1)
        first = next(source)
        assert next(source, None) is None
        under_way.set()
        assert posted.wait(300)
        while (second := next(source, None)) is None:
            pass
        yield rendered(second)
        yield rendered(first)

    with closing(scripted(deployment, render)) as found, ThreadPoolExecutor(2) as clients:
        long = clients.submit(all_of, found, [make_request(prompt="long")])
        assert under_way.wait(300)
        short = clients.submit(all_of, found, [make_request(prompt="short")])
        posted.set()
        assert [outcome.request.prompt for outcome in short.result() + long.result()] == ["short", "long"]
    assert len(calls) == 1


def test_rows_of_a_closed_request_are_not_rendered(deployment: AzureDeployment) -> None:
    gone, rows = threading.Event(), []

    def render(source: Iterator[PromptRequest]) -> Iterator[RenderedImage | UnrenderedRow]:
        for request in source:
            rows.append(request.prompt)
            yield rendered(request)
            assert gone.wait(300)

    with closing(scripted(deployment, render)) as found:
        with closing(found.render([make_request(prompt=f"{i}") for i in range(9)])) as outcomes:
            next(outcomes)
        gone.set()
        all_of(found, [make_request(prompt="another")])
    assert rows == ["0", "another"]


@pytest.mark.parametrize("ends", ["timeout", "disconnection"])
def test_a_request_is_cancelled_on_timeout_and_on_disconnection(deployment: AzureDeployment, ends: str) -> None:
    under_way, gone, rows = threading.Event(), threading.Event(), []

    def render(source: Iterator[PromptRequest]) -> Iterator[RenderedImage | UnrenderedRow]:
        for request in source:
            rows.append(request.prompt)
            under_way.set()
            assert gone.wait(300)
            yield rendered(request)

    client = Client(0.1) if ends == "timeout" else Client(is_disconnected=under_way.is_set)
    message = "not ready in 0.1 seconds: request fewer images" if ends == "timeout" else "the client has disconnected"
    with closing(scripted(deployment, render)) as found:
        with pytest.raises(RequestCancelledError, match=message):
            list(found.render([make_request(prompt=f"{i}") for i in range(9)], client))
        gone.set()
        all_of(found, [make_request(prompt="another")])
        with pytest.raises(RequestCancelledError):
            list(found.render([make_request(prompt="too late")], client))
    assert rows == ["0", "another"]


def test_closing_the_service_cancels_all_requests(deployment: AzureDeployment) -> None:
    under_way = threading.Event()

    def load(card: Any, compute: Any, safety: Any, stop: Callable[[], bool]) -> Any:
        def render(source: Iterator[PromptRequest]) -> Iterator[RenderedImage | UnrenderedRow]:
            next(source)
            under_way.set()
            while not stop():
                pass
            yield from ()

        return chain_of(render)

    found = Service(deployment, load)
    with ThreadPoolExecutor(1) as clients:
        waiting = clients.submit(all_of, found, [make_request() for _ in range(3)])
        assert under_way.wait(300)
        found.close()
        with pytest.raises(StoppedError):
            waiting.result(300)
    with pytest.raises(StoppedError):
        all_of(found, [make_request()])


def test_rows_with_equal_settings_share_a_pipeline_call(deployment: AzureDeployment) -> None:
    painter: Any = PaintingPipeline()
    chain = PipelineCallChain(painter, BatchSizes(8, 1), None)
    with closing(Service(deployment, lambda *_: chain)) as found:
        outcomes = all_of(found, [paint(colour=i / 10, steps=4 + i % 2) for i in range(6)])
    shades = [round(int(outcome.pixels[0, 0, 0]) / 25.5) for outcome in outcomes if isinstance(outcome, RenderedImage)]
    assert shades == list(range(6))
    assert painter.calls == [(3, 4), (3, 4)]


def test_batch_sizes_and_timeouts_are_those_of_a_real_time_service(deployment: AzureDeployment) -> None:
    seen: list[Any] = []

    def load(card: Any, compute: Any, safety: Any, stop: Any) -> Any:
        seen.append((compute.slots, compute.decode_batch, safety.service and safety.service.timeout_seconds))
        return DummyChain(stop)

    settings = deployment.settings
    asked = replace(
        settings,
        compute=replace(settings.compute, slots=6),
        safety=replace(settings.safety, service=ServiceSettings("https://there")),
    )
    for each in (deployment, replace(deployment, settings=asked)):
        Service(each, load).close()
    assert seen == [(DEFAULT_SLOTS, 1, None), (6, 1, SAFETY_TIMEOUT_SECONDS)]


# Objects


def test_an_image_does_not_depend_on_other_clients(real: Service) -> None:
    rows = [{"prompt": f"a {colour} circle", "num_inference_steps": 4 + i} for i, colour in enumerate(["red", "blue"])]
    alone = [score_rows([row], real) for row in rows]
    before = real.stages.ticks
    with ThreadPoolExecutor(10) as clients:
        found = list(clients.map(lambda i: score_rows([rows[i % 2]], real), range(20)))
    assert found == alone * 10
    assert real.stages.ticks - before < 20 * 4.5 / 2, "their rows share the UNet's calls"


def test_an_image_equals_the_one_of_a_table(real: Service, tmp_path: Path) -> None:
    """The batch size changes it by at most 1 of 255."""
    rows: list[dict[str, Any]] = [
        {"id": "mine", "prompt": "a red circle"},
        {"prompt": "a blue square", "seed": 12, "negative_prompt": "red"},
    ]
    table = tmp_path / "rows.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert runs.run(table, tmp_path / "out").code == 0
    files = [tmp_path / "out" / row["generated_image"] for row in runs.results(tmp_path / "out")]
    for file, answer in zip(files, score_rows(rows, real), strict=True):
        with Image.open(file) as image:
            assert furthest(np.asarray(image), opened(answer)) <= 1


def test_a_seed_is_derived_from_the_id_or_the_row_number(dummy: Service) -> None:
    p = {"prompt": "p"}
    first, second, named, same, again = (
        opened(answer).tobytes()
        for answer in score_rows([p, p, {**p, "id": 7.0}, {**p, "id": "7"}, {**p, "id": "request-00000000"}], dummy)
    )
    assert (first, named) == (again, same)
    assert len({first, second, named}) == 3


def test_images_are_in_order_with_invalid_rows_among_them(dummy: Service) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "seed": 3, "num_images_per_prompt": 2},
        {"prompt": None},
        {"prompt": "p", "seed": "ten", "width": 60},
        {"prompt": "p" * 10_001},
        {"prompt": "p", "negative_prompt": "n" * 10_001},
        {"prompt": "p", "id": ["7"]},
        {"prompt": "p", "seed": 9, "note": {"any": "thing"}},
        {"prompt": "p \ud800"},
    ]
    found = score_rows(rows, dummy)
    assert [int(opened(each)[0, 0, 0]) if each["generated_image"] else each["error"] for each in found] == [
        *(3, 4),
        "the prompt is empty",
        "seed 'ten' is not a whole number; width 60 is not a multiple of 8; the nearest is 64",
        "the prompt has 10001 characters, and 10000 are the most: a model reads some 75 words",
        "the negative_prompt has 10001 characters, and 10000 are the most: a model reads some 75 words",
        "the id is not text but list",
        9,
        "the prompt holds a lone surrogate, which is half a character: send whole ones",
    ]
    assert [each["prompt"] for each in found] == ["p", "p", None, "p", "p" * 10_000, "p", "p", "p", "p \ufffd"]
    assert {len(each) for each in found if each["generated_image"]} == {3}
    assert [each["nsfw_content_detected"] for each in found] == [None] * 9


@pytest.mark.parametrize(
    ("policy", "left"), [("blank", 0.0), ("keep", 150.0), ("blur", 150.0), ("quarantine", None), ("drop", None)]
)
def test_a_flagged_image_follows_the_policy(deployment: AzureDeployment, policy: OnFlagged, left: float | None) -> None:
    settings = deployment.settings
    flagging = replace(settings, safety=replace(settings.safety, on_flagged=policy))
    verdict = Verdict(True, "checker", {"nudity": 0.5}, "it shows too much")
    render: Render = lambda source: (rendered(request, verdict) for request in source)  # noqa: E731
    with closing(scripted(replace(deployment, settings=flagging), render)) as found:
        [answer] = score_rows([{"prompt": "p"}], found)
    assert answer["nsfw_content_detected"] is True
    if left is None:
        assert answer["generated_image"] is None
        assert answer["error"] == "it shows too much"
    else:
        assert abs(opened(answer).mean() - left) < 2
        assert "error" not in answer


def test_a_blocked_prompt_has_no_image(deployment: AzureDeployment) -> None:
    def render(source: Iterator[PromptRequest]) -> Iterator[RenderedImage | UnrenderedRow]:
        for request in source:
            yield UnrenderedRow(request, "blocked", "the service refused it", Verdict(True, "azure"))

    with closing(scripted(deployment, render)) as found:
        assert score_rows([{"prompt": "p"}], found) == [
            {
                "prompt": "p",
                "generated_image": None,
                "nsfw_content_detected": True,
                "error": "the service refused it",
            }
        ]


def test_images_have_the_requested_format_and_contain_their_parameters(deployment: AzureDeployment) -> None:
    settings = deployment.settings
    for image_format in ("png", "webp"):
        output: Any = replace(settings.output, image_format=image_format)
        chain: Render = lambda source: map(rendered, source)  # noqa: E731
        with closing(scripted(replace(deployment, settings=replace(settings, output=output)), chain)) as found:
            [answer] = score_rows([{"prompt": "a red circle"}], found)
        with Image.open(io.BytesIO(base64.b64decode(answer["generated_image"]))) as image:
            assert image.format == image_format.upper()
            if image_format == "png":
                assert image.info["parameters"].startswith("a red circle\nSteps: 2, ")


# The scoring script of the real-time endpoint without its server


@pytest.fixture
def online_service(dummy: Service, monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr(online, "_load_service", lambda: dummy)
    return dummy


def test_the_script_returns_objects(online_service: Service) -> None:
    online.init()
    [answer] = online.run(payload(columns=["prompt"], data=["p"], index=[0]))
    assert list(answer) == ["prompt", "generated_image", "nsfw_content_detected"]
    json.dumps(answer)


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        (
            {"data": ["p"] * (MAX_IMAGES + 1)},
            "the request has more than 256 images (257 prompts): send several",
        ),
        (
            {"data": ["p"] * 100, "parameters": {"num_images_per_prompt": 3}},
            "the request has more than 256 images (100 prompts): send several requests",
        ),
        (
            {"data": ["p"], "parameters": {"num_images_per_prompt": 300}},
            "the request has more than 256 images (1 prompt): send several requests",
        ),
    ],
)
def test_a_request_for_too_many_images_is_refused(online_service: Service, sent: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TooManyImagesError) as caught:
        online.run(payload(**sent))
    assert str(caught.value).startswith(sentence)


def test_a_request_times_out(online_service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_INFER_REQUEST_TIMEOUT", "1e-9")
    with pytest.raises(RequestCancelledError, match="not ready in 1e-09 seconds"):
        online.run(payload(data=["p"]))
    for wrong in ("soon", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("BATCH_INFER_REQUEST_TIMEOUT", wrong)
        with pytest.raises(SettingsError, match=f"BATCH_INFER_REQUEST_TIMEOUT={wrong}: use seconds"):
            online.init()


def test_the_prompts_column_may_have_another_name(online_service: Service) -> None:
    settings = online_service.deployment.settings
    table = replace(settings.table, columns={"prompt": "caption", "seed": ""})
    online_service.deployment = replace(online_service.deployment, settings=replace(settings, table=table))
    [first] = online.run(payload(data=["p"]))
    [second] = online.run(payload(data=[{"caption": "p", "prompt": 3, "seed": "no seed"}]))
    assert first == second


def test_preloading_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_PRELOAD", "True")
    with pytest.raises(SettingsError, match="WORKER_PRELOAD=true: "):
        online.init()


@pytest.mark.parametrize(("fewest", "message"), [(4, ""), (20, "the model rendered no first image: it wants 20 steps")])
def test_init_renders_a_first_image(
    deployment: AzureDeployment,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fewest: int,
    message: str,
) -> None:
    steps = []

    def render(source: Iterable[PromptRequest]) -> Iterator[RenderedImage | UnrenderedRow]:
        for request in source:
            steps.append(request.params.num_inference_steps)
            few = steps[-1] < fewest
            yield UnrenderedRow(request, "invalid", f"it wants {fewest} steps") if few else rendered(request)

    with closing(scripted(deployment, render)) as found:
        monkeypatch.setattr(online, "_load_service", lambda: found)
        with caplog.at_level("WARNING", "batch_infer"):
            online.init()
    assert steps == ([2, 4] if not message else [2, 4, 10])
    assert caplog.messages == ([message] if message else [])
