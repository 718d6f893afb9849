"""Test the service behind real-time endpoints: clients, response objects, and Azure ML's scoring script."""

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
from batch_infer.chain import BatchSizes, NoRequest, RenderedImage, RequestSource, StepLevelChain, UnrenderedRow
from batch_infer.errors import ServiceError, SettingsError, StoppedError, TableError
from batch_infer.records import PromptRequest, Verdict
from batch_infer.serving import request_queue
from batch_infer.serving.request_queue import RequestQueue
from batch_infer.serving.scoring import check_parameters, score_rows
from batch_infer.serving.service import DEFAULT_SLOTS, SAFETY_TIMEOUT_SECONDS, Client, RequestCancelledError, Service
from batch_infer.settings import OnFlagged, ServiceSettings
from tests import runs
from tests.dummies import DummyChain
from tests.painting import load_painting, paint_row
from tests.rendering import make_request, max_difference, render

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
        small_deployment = read_deployment("nowhere")
    logging.captureWarnings(False)
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate
    return small_deployment


@pytest.fixture(scope="module")
def demo_service(deployment: AzureDeployment) -> Iterator[Service]:
    with closing(Service(deployment)) as service:
        yield service


@pytest.fixture
def dummy_service(deployment: AzureDeployment) -> Iterator[Service]:
    with closing(Service(deployment, lambda card, compute, safety, stop: DummyChain(stop))) as service:
        yield service


def render_all(service: Service, requests: Sequence[PromptRequest]) -> list[RenderedImage | UnrenderedRow]:
    """Return the outcomes of requests, in the order of the requests."""
    outcomes = dict(service.render(requests))
    return [outcomes[index] for index in range(len(requests))]


class Polled(Iterator[PromptRequest]):
    """Iterates over the requests of a queue. It stops when none is pending, and continues when new ones are."""

    def __init__(self, queue: RequestSource) -> None:
        self._queue = queue

    def __next__(self) -> PromptRequest:
        request = self._queue.poll()
        if not isinstance(request, PromptRequest):
            raise StopIteration
        return request


def make_chain(render: Render) -> Any:
    """Return a chain that renders by calling this function with an iterator of requests."""
    return SimpleNamespace(render=lambda queue: render(Polled(queue)), close=lambda: None)


def make_service(deployment: AzureDeployment, render: Render) -> Service:
    """Return a service whose chain renders with this function."""
    return Service(deployment, lambda *_: make_chain(render))


def rendered(request: PromptRequest, verdict: Verdict = Verdict(), shade: int = 100) -> RenderedImage:  # noqa: B008
    pixels = np.full((64, 64, 3), shade, np.uint8)
    pixels[:32] = 200
    return RenderedImage(request, pixels, verdict, None, 8, 1.0)  # type: ignore[arg-type]


def open_image(result: dict[str, Any]) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(result["generated_image"], validate=True))) as image:
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
    """The parameter is refused even if every row has its own value."""
    with pytest.raises(TableError, match=f"the parameters of the request: {sentence}"):
        check_parameters(parameters, deployment)
    check_parameters({"num_inference_steps": 4, "seed": None}, deployment)


# Clients that share a chain


def test_clients_take_turns() -> None:
    queue = RequestQueue(lambda request: 0)
    queue.submit([make_request(prompt=f"many {i}") for i in range(3)])
    queue.submit([make_request(prompt="one")])
    polled = Polled(queue)
    received = [next(polled), next(polled)]
    queue.submit([make_request(prompt="late")])
    received += list(polled)
    assert [request.prompt for request in received] == ["many 0", "one", "many 1", "late", "many 2"]
    assert len({request.key for request in received}) == 5
    assert queue.poll() is NoRequest.NOT_YET and queue.poll(1.0) is NoRequest.END
    queue.submit([make_request(prompt="later")])
    assert next(polled).prompt == "later"


def test_the_queue_limits_how_far_a_chain_reads_ahead() -> None:
    """A row with guidance counts as two evaluations."""
    queue = RequestQueue(lambda request: 0, limit=4)
    queue.submit([make_request(prompt=f"many {i}") for i in range(5)])
    queue.submit([make_request(prompt="one")])
    received = list(Polled(queue))
    assert [request.prompt for request in received] == ["many 0", "one"]
    assert queue
    queue.deliver(rendered(received[0]))
    assert [request.prompt for request in Polled(queue)] == ["many 1"]


def test_rows_of_one_size_stay_together_until_other_rows_have_waited_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_each_client_gets_its_own_outcomes_in_order(dummy_service: Service) -> None:
    """All clients use the same ids."""

    def render(client: int) -> list[tuple[str, str, int]]:
        requests = [make_request("row", f"{client} {i}", seed=client + i) for i in range(5)]
        outcomes = render_all(dummy_service, requests)
        assert [outcome.request for outcome in outcomes] == requests
        return [(o.request.prompt, type(o).__name__, int(o.pixels[0, 0, 0])) for o in outcomes]  # type: ignore

    with ThreadPoolExecutor(12) as clients:
        results = list(clients.map(render, range(60)))
    assert results == [[(f"{client} {i}", "RenderedImage", client + i) for i in range(5)] for client in range(60)]
    assert render_all(dummy_service, []) == []


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ServiceError("no response"), SettingsError("no key")])
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

    with closing(make_service(deployment, render)) as service:
        with pytest.raises(type(error), match=str(error)):
            render_all(service, [make_request() for _ in range(3)])
        assert len(render_all(service, [make_request() for _ in range(3)])) == 3


def test_a_row_without_an_outcome_is_an_error(deployment: AzureDeployment) -> None:
    def render(source: Iterator[PromptRequest]) -> Iterator[RenderedImage | UnrenderedRow]:
        yield rendered(next(source))
        next(source)

    with closing(make_service(deployment, render)) as service, pytest.raises(RuntimeError, match="returned no outcome"):
        render_all(service, [make_request() for _ in range(3)])


def test_a_request_joins_rows_that_are_being_rendered(deployment: AzureDeployment) -> None:
    """The chain reads the queue again after finding it empty."""
    is_rendering, posted = threading.Event(), threading.Event()
    calls = []

    def render(source: Iterator[PromptRequest]) -> Iterator[RenderedImage | UnrenderedRow]:
        calls.append(1)
        first = next(source)
        assert next(source, None) is None
        is_rendering.set()
        assert posted.wait(300)
        while (second := next(source, None)) is None:
            pass
        yield rendered(second)
        yield rendered(first)

    with closing(make_service(deployment, render)) as service, ThreadPoolExecutor(2) as clients:
        long = clients.submit(render_all, service, [make_request(prompt="long")])
        assert is_rendering.wait(300)
        short = clients.submit(render_all, service, [make_request(prompt="short")])
        posted.set()
        assert [outcome.request.prompt for outcome in short.result() + long.result()] == ["short", "long"]
    assert len(calls) == 1


def test_rows_of_a_closed_request_are_not_rendered(deployment: AzureDeployment) -> None:
    is_cancelled, rows = threading.Event(), []

    def render(source: Iterator[PromptRequest]) -> Iterator[RenderedImage | UnrenderedRow]:
        for request in source:
            rows.append(request.prompt)
            yield rendered(request)
            assert is_cancelled.wait(300)

    with closing(make_service(deployment, render)) as service:
        with closing(service.render([make_request(prompt=f"{i}") for i in range(9)])) as outcomes:
            next(outcomes)
        is_cancelled.set()
        render_all(service, [make_request(prompt="another")])
    assert rows == ["0", "another"]


@pytest.mark.parametrize("ends", ["timeout", "disconnection"])
def test_a_request_is_cancelled_on_timeout_and_on_disconnection(deployment: AzureDeployment, ends: str) -> None:
    is_rendering, is_cancelled, rows = threading.Event(), threading.Event(), []

    def render(source: Iterator[PromptRequest]) -> Iterator[RenderedImage | UnrenderedRow]:
        for request in source:
            rows.append(request.prompt)
            is_rendering.set()
            assert is_cancelled.wait(300)
            yield rendered(request)

    client = Client(0.1) if ends == "timeout" else Client(is_disconnected=is_rendering.is_set)
    message = "not ready in 0.1 seconds: request fewer images" if ends == "timeout" else "the client has disconnected"
    with closing(make_service(deployment, render)) as service:
        with pytest.raises(RequestCancelledError, match=message):
            list(service.render([make_request(prompt=f"{i}") for i in range(9)], client))
        is_cancelled.set()
        render_all(service, [make_request(prompt="another")])
        with pytest.raises(RequestCancelledError):
            list(service.render([make_request(prompt="too late")], client))
    assert rows == ["0", "another"]


def test_closing_the_service_cancels_all_requests(deployment: AzureDeployment) -> None:
    is_rendering = threading.Event()

    def load(card: Any, compute: Any, safety: Any, stop: Callable[[], bool]) -> Any:
        def render(source: Iterator[PromptRequest]) -> Iterator[RenderedImage | UnrenderedRow]:
            next(source)
            is_rendering.set()
            while not stop():
                pass
            yield from ()

        return make_chain(render)

    service = Service(deployment, load)
    with ThreadPoolExecutor(1) as clients:
        waiting = clients.submit(render_all, service, [make_request() for _ in range(3)])
        assert is_rendering.wait(300)
        service.close()
        with pytest.raises(StoppedError):
            waiting.result(300)
    with pytest.raises(StoppedError):
        render_all(service, [make_request()])


def test_rows_with_different_settings_share_the_slots(deployment: AzureDeployment) -> None:
    """Also rows of several clients, and each image is that of its row alone."""
    model = load_painting()
    rows = [paint_row(str(k), seed=k, steps=3 + k % 3, guidance=1.0 + k % 2) for k in range(6)]
    alone = render(model, rows[:1], slots=9) | render(model, rows[1:2], slots=9) | render(model, rows[2:], slots=9)
    chain = StepLevelChain(model, BatchSizes(9, 2), None)
    with closing(Service(deployment, lambda *_: chain)) as service:
        outcomes = render_all(service, rows)
        assert chain.stages.row_forwards == sum(row.params.num_inference_steps * row.params.slots for row in rows)
        assert chain.stages.ticks < sum(row.params.num_inference_steps for row in rows) / 2
        with ThreadPoolExecutor(6) as clients:
            outcomes += [outcome for (outcome,) in clients.map(lambda row: render_all(service, [row]), rows)]
    for outcome in outcomes:
        assert isinstance(outcome, RenderedImage)
        assert np.array_equal(outcome.pixels, alone[outcome.request.id].pixels)
    assert len(outcomes) == 12


def test_a_real_time_service_has_its_own_batch_sizes_and_timeouts(deployment: AzureDeployment) -> None:
    seen: list[Any] = []

    def load(card: Any, compute: Any, safety: Any, stop: Any) -> Any:
        seen.append((compute.slots, compute.decode_batch, safety.service and safety.service.timeout_seconds))
        return DummyChain(stop)

    settings = deployment.settings
    requested_settings = replace(
        settings,
        compute=replace(settings.compute, slots=6),
        safety=replace(settings.safety, service=ServiceSettings("https://there")),
    )
    for variant in (deployment, replace(deployment, settings=requested_settings)):
        Service(variant, load).close()
    assert seen == [(DEFAULT_SLOTS, 1, None), (6, 1, SAFETY_TIMEOUT_SECONDS)]


# Objects


def test_an_image_does_not_depend_on_other_clients(demo_service: Service) -> None:
    rows = [{"prompt": f"a {colour} circle", "num_inference_steps": 4 + i} for i, colour in enumerate(["red", "blue"])]
    alone = [score_rows([row], demo_service) for row in rows]
    before = demo_service._chain.stages.ticks
    with ThreadPoolExecutor(10) as clients:
        objects = list(clients.map(lambda i: score_rows([rows[i % 2]], demo_service), range(20)))
    assert objects == alone * 10
    assert demo_service._chain.stages.ticks - before < 20 * 4.5 / 2, "their rows share the UNet's calls"


def test_an_image_equals_that_of_a_run(demo_service: Service, tmp_path: Path) -> None:
    """Batch sizes differ, so a value may differ by 1 of 255."""
    rows: list[dict[str, Any]] = [
        {"id": "mine", "prompt": "a red circle"},
        {"prompt": "a blue square", "seed": 12, "negative_prompt": "red"},
    ]
    table = tmp_path / "rows.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert runs.run(table, tmp_path / "out").code == 0
    files = [tmp_path / "out" / row["generated_image"] for row in runs.results(tmp_path / "out")]
    for file, result in zip(files, score_rows(rows, demo_service), strict=True):
        with Image.open(file) as image:
            assert max_difference(np.asarray(image), open_image(result)) <= 1


def test_a_seed_is_derived_from_the_id_or_the_row_number(dummy_service: Service) -> None:
    p = {"prompt": "p"}
    first, second, named, same, again = (
        open_image(result).tobytes()
        for result in score_rows(
            [p, p, {**p, "id": 7.0}, {**p, "id": "7"}, {**p, "id": "request-00000000"}], dummy_service
        )
    )
    assert (first, named) == (again, same)
    assert len({first, second, named}) == 3


def test_images_and_invalid_rows_are_in_order(dummy_service: Service) -> None:
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
    objects = score_rows(rows, dummy_service)
    assert [int(open_image(row)[0, 0, 0]) if row["generated_image"] else row["error"] for row in objects] == [
        *(3, 4),
        "the prompt is empty",
        "seed 'ten' is not a whole number; width 60 is not a multiple of 8; the nearest is 64",
        "the prompt has 10001 characters; the maximum is 10000 (a model reads about 75 tokens)",
        "the negative_prompt has 10001 characters; the maximum is 10000 (a model reads about 75 tokens)",
        "the id must be text or a number, not a list",
        9,
        "the prompt contains a lone surrogate, which is half a character: send whole characters",
    ]
    assert [row["prompt"] for row in objects] == ["p", "p", None, "p", "p" * 10_000, "p", "p", "p", "p \ufffd"]
    assert {len(row) for row in objects if row["generated_image"]} == {3}
    assert [row["nsfw_content_detected"] for row in objects] == [None] * 9


@pytest.mark.parametrize(
    ("policy", "mean"), [("blank", 0.0), ("keep", 150.0), ("blur", 150.0), ("quarantine", None), ("drop", None)]
)
def test_a_flagged_image_follows_the_policy(deployment: AzureDeployment, policy: OnFlagged, mean: float | None) -> None:
    settings = deployment.settings
    flagging = replace(settings, safety=replace(settings.safety, on_flagged=policy))
    verdict = Verdict(True, "checker", {"nudity": 0.5}, "it shows too much")
    render: Render = lambda source: (rendered(request, verdict) for request in source)  # noqa: E731
    with closing(make_service(replace(deployment, settings=flagging), render)) as service:
        [result] = score_rows([{"prompt": "p"}], service)
    assert result["nsfw_content_detected"] is True
    if mean is None:
        assert result["generated_image"] is None
        assert result["error"] == "it shows too much"
    else:
        assert abs(open_image(result).mean() - mean) < 2
        assert "error" not in result


def test_a_blocked_prompt_has_no_image(deployment: AzureDeployment) -> None:
    def render(source: Iterator[PromptRequest]) -> Iterator[RenderedImage | UnrenderedRow]:
        for request in source:
            yield UnrenderedRow(request, "blocked", "the service refused it", Verdict(True, "azure"))

    with closing(make_service(deployment, render)) as service:
        assert score_rows([{"prompt": "p"}], service) == [
            {"prompt": "p", "generated_image": None, "nsfw_content_detected": True, "error": "the service refused it"}
        ]


def test_images_have_the_requested_format_and_contain_their_parameters(deployment: AzureDeployment) -> None:
    settings = deployment.settings
    for image_format in ("png", "webp"):
        output: Any = replace(settings.output, image_format=image_format)
        chain: Render = lambda source: map(rendered, source)  # noqa: E731
        with closing(make_service(replace(deployment, settings=replace(settings, output=output)), chain)) as service:
            [result] = score_rows([{"prompt": "a red circle"}], service)
        with Image.open(io.BytesIO(base64.b64decode(result["generated_image"]))) as image:
            assert image.format == image_format.upper()
            if image_format == "png":
                assert image.info["parameters"].startswith("a red circle\nSteps: 2, ")


# The scoring script of the real-time endpoint without its server


@pytest.fixture
def online_service(dummy_service: Service, monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr(online, "_load_service", lambda: dummy_service)
    return dummy_service


def test_the_script_returns_objects(online_service: Service) -> None:
    online.init()
    [result] = online.run(payload(columns=["prompt"], data=["p"], index=[0]))
    assert list(result) == ["prompt", "generated_image", "nsfw_content_detected"]
    json.dumps(result)


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        ({"data": ["p"] * (MAX_IMAGES + 1)}, "the request has more than 256 images (257 prompts): send several"),
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


@pytest.mark.parametrize(("fewest", "message"), [(4, ""), (20, "the model rendered no first image: it needs 20 steps")])
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
            yield UnrenderedRow(request, "invalid", f"it needs {fewest} steps") if few else rendered(request)

    with closing(make_service(deployment, render)) as service:
        monkeypatch.setattr(online, "_load_service", lambda: service)
        with caplog.at_level("WARNING", "batch_infer"):
            online.init()
    assert steps == ([2, 4] if not message else [2, 4, 10])
    assert caplog.messages == ([message] if message else [])
