"""Test the real-time scoring script over HTTP, in Azure ML's inference server."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batch_infer.models import DEMO_MODEL
from tests.content_safety_server import KEY, Service, serving, status
from tests.deaths import eventually

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv" / "azure-server" / "bin" / "python"
pytestmark = [
    pytest.mark.promises,
    pytest.mark.skipif(not PYTHON.exists(), reason="make azure installs Azure ML's inference server"),
]

LOOPBACK = """
from azureml_inference_server_http import constants
constants.DEFAULT_HOST = "127.0.0.1"
from azureml_inference_server_http.amlserver import run
run()
"""
"""Runs `azmlinfsrv` on the loopback interface. It has no option for the interface and would listen on all."""
SCRIPT = """
import os
from pathlib import Path
from batch_infer.serving import service
service.SAFETY_TIMEOUT_SECONDS = 1.0
from batch_infer.azureml import online
from batch_infer.azureml.online import init

def run(raw_data):
    seconds = Path(__file__).with_name("seconds")
    os.environ["BATCH_INFER_REQUEST_TIMEOUT"] = seconds.read_text() if seconds.exists() else ""
    return online.run(raw_data)
"""
"""A scoring script whose request timeout in seconds can be set by a file."""
SAMPLE: dict[str, Any] = {
    "columns": ["prompt"],
    "data": ["A photo of an astronaut riding a horse on Mars"],
    "index": [0],
}
KEYS = ["prompt", "generated_image", "nsfw_content_detected"]
CLIENTS = 20
LONG = {"data": ["a red circle"] * 50, "parameters": {"num_inference_steps": 20}}
"""A request that takes more than half a minute."""


@dataclass(frozen=True)
class Response:
    status: int
    body: Any
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Server:
    """A server process and its safety service. The service fails while `down` is set."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    safety: Service
    down: threading.Event

    def send(self, body: bytes) -> Response:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/score", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                return Response(response.status, json.loads(response.read()), dict(response.headers))
        except urllib.error.HTTPError as error:
            with error:
                return Response(error.code, json.loads(error.read()), dict(error.headers))

    def score(self, **input_data: Any) -> Response:
        return self.send(json.dumps({"input_data": input_data}).encode())

    def objects(self, **input_data: Any) -> list[dict[str, Any]]:
        response = self.score(**input_data)
        assert response.status == 200, response.body
        return list(response.body)

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                # The server listens at once, and responds when the model is loaded.
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=600) as response:
                    assert response.read() == b"Healthy"
                    return
            except OSError:
                time.sleep(0.1)
        pytest.fail(self.log.read_text("utf-8")[-5000:])


def start_server(folder: Path, model: Path, safety: Service, down: threading.Event) -> Server:
    folder.mkdir()
    script, log = folder / "score.py", folder / "log"
    script.write_text(SCRIPT, "utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"STEPS": "4", "THREADS": "1", "DEVICE": "cpu", "ON_FLAGGED": "keep"}
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("BATCH_INFER_", "AZUREML_"))},
        **{f"BATCH_INFER_{name}": value for name, value in settings.items()},
        **{"CONTENT_SAFETY_ENDPOINT": safety.endpoint, "CONTENT_SAFETY_KEY": KEY},
        **{"GUNICORN_CMD_ARGS": f"--threads {CLIENTS + 4}", "PYTHONPATH": str(ROOT), "HOME": str(folder)},
    }
    command: list[str | Path] = [PYTHON, "-c", LOOPBACK, "--entry_script", script]
    command += ["--model_dir", model, "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Server(process, port, log, safety, down)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Yield a server with the built-in model and one without a model. Both start together, since imports are slow."""
    folder, down = tmp_path_factory.mktemp("online"), threading.Event()
    with serving(
        words={"knives": ("Violence", 4)}, faults=lambda request: status(503) if down.is_set() else None
    ) as safety:
        (folder / "empty").mkdir()
        started = [
            start_server(folder / "good", DEMO_MODEL, safety, down),
            start_server(folder / "bad", folder / "empty", safety, down),
        ]
        try:
            started[0].wait_until_healthy()
            yield started[0], started[1]
        finally:
            for server in started:
                server.stop()


@pytest.fixture
def server(servers: tuple[Server, Server]) -> Server:
    return servers[0]


def open_image(row: Mapping[str, Any]) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(row["generated_image"], validate=True)))
    image.load()
    return image


def test_the_sample_request_gets_the_sample_response(server: Server) -> None:
    response = server.score(**SAMPLE)
    assert (response.status, response.headers["Content-Type"]) == (200, "application/json")
    [row] = response.body
    assert list(row) == KEYS
    assert row["prompt"] == SAMPLE["data"][0]
    assert row["nsfw_content_detected"] is False
    image = open_image(row)
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
    assert np.asarray(image).std() > 5


def test_each_row_has_its_own_parameters_and_errors(server: Server) -> None:
    rows = [
        {"prompt": "a red circle", "seed": 7, "num_images_per_prompt": 2, "note": "ignored"},
        {"prompt": " "},
        {"prompt": "a red circle", "seed": 8, "height": 128, "width": 96},
        {"prompt": "a red circle", "seed": "7"},
        {"prompt": "a red circle", "height": 65},
        {"prompt": "a circle of knives"},
        {"prompt": "a red circle", "seed": 8},
    ]
    objects = server.objects(data=rows, parameters={"num_inference_steps": 5, "guidance_scale": 3})
    assert [open_image(row).size if row["generated_image"] else row["error"] for row in objects] == [
        *[(64, 64)] * 2,
        "the prompt is empty",
        (96, 128),
        (64, 64),
        "height 65 is not a multiple of 8; the nearest is 64",
        objects[6]["error"],
        (64, 64),
    ]
    assert objects[6]["error"].startswith("Azure AI Content Safety refused the prompt")
    assert [list(row) for row in objects] == [KEYS if row["generated_image"] else [*KEYS, "error"] for row in objects]
    assert [row["nsfw_content_detected"] for row in objects] == [*[False] * 2, None, False, False, None, True, False]
    first, second, *_ = (row["generated_image"] for row in objects)
    assert (first, second) == (objects[4]["generated_image"], objects[7]["generated_image"])
    assert open_image(objects[0]).info["parameters"].startswith("a red circle\nSteps: 5, ")


def test_concurrent_clients_get_the_same_images_as_a_single_client(server: Server) -> None:
    prompts = [f"a {colour} {shape}" for colour in ("red", "blue", "green", "yellow") for shape in "abcde"]
    assert len(prompts) == CLIENTS
    with ThreadPoolExecutor(CLIENTS) as clients:
        results = list(clients.map(lambda prompt: server.objects(data=[[prompt]]), prompts))
    assert [row["prompt"] for [row] in results] == prompts
    for prompt, concurrent_objects in list(zip(prompts, results, strict=True))[::7]:
        assert server.objects(data=[{"prompt": prompt}]) == concurrent_objects


def test_a_bad_request_is_refused_with_one_sentence_and_the_server_continues(server: Server) -> None:
    bodies = {
        b'{"input_data": {"data": [': "the request is not JSON",
        b"": "the request is empty, or its Content-Type is not application/json",
        b'{"input_data": {"columns": ["text"], "data": [["a"]]}}': "there is no column 'prompt' in input_data",
        b'{"input_data": {"data": []}}': "data in input_data is empty",
        b'{"input_data": {"data": ["a"]}, "params": {"height": 65}}': "the parameters of the request: ",
        b'{"input_data": {"data": ["a"], "parameters": {"steps": 4}}}': "unknown parameter 'steps'",
        b'{"input_data": {"columns": ["prompt", "seed"], "data": [["a"]]}}': "element 0 of data has 1 cell",
        b"[" * 100_000: "the request is nested too deeply",
    }
    for body, sentence in bodies.items():
        response = server.send(body)
        assert (response.status, list(response.body)) == (400, ["error"]), body[:80]
        assert response.body["error"].startswith(sentence)
    assert server.send(b'{"input_data": "\xff"}').status == 400
    many = server.score(data=["a red circle"] * 10_000)
    assert many.status == 413
    assert many.body["error"].startswith("the request has more than 256 images (10000 prompts)")
    [long] = server.objects(data=["a red circle " * 80_000])
    assert (long["generated_image"], long["error"][:41]) == (None, "the prompt has 1040000 characters; the ma")
    assert list(server.objects(**SAMPLE)[0]) == KEYS


def test_a_safety_outage_returns_no_image_and_recovers(server: Server) -> None:
    server.down.set()
    try:
        response = server.score(**SAMPLE)
    finally:
        server.down.clear()
    assert (response.status, response.headers["Retry-After"], list(response.body)) == (503, "10", ["error"])
    assert "127.0.0.1" not in response.body["error"]
    assert "Azure AI Content Safety at http://127.0.0.1" in server.log.read_text("utf-8")
    assert list(server.objects(**SAMPLE)[0]) == KEYS


def test_disconnected_clients_free_the_server(server: Server) -> None:
    """There are more clients than threads. A probe gets a response at once, and the requests are not rendered."""
    before = len(server.safety.images)
    body = json.dumps({"input_data": LONG}).encode()
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(CLIENTS + 10)]
    for client in clients:
        client.sendall(head.encode() + body)
    assert eventually(lambda: len(server.safety.images) > before)  # their requests are being rendered
    for client in clients:
        client.close()
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=300) as response:
        assert response.read() == b"Healthy"
    assert list(server.objects(**SAMPLE)[0]) == KEYS
    assert len(server.safety.images) - before < CLIENTS * len(LONG["data"]) / 2
    assert eventually(lambda: server.log.read_text("utf-8").count("the client has disconnected") >= CLIENTS)


def test_a_request_times_out_with_a_response(server: Server) -> None:
    seconds = server.log.with_name("seconds")
    seconds.write_text("1")
    try:
        response = server.score(**LONG)
    finally:
        seconds.unlink()
    assert (response.status, list(response.body)) == (503, ["error"])
    assert response.body["error"].startswith("the images were not ready in 1 seconds: request fewer images at a time")
    assert list(server.objects(**SAMPLE)[0]) == KEYS


def test_a_server_without_a_model_does_not_start_and_logs_the_reason(servers: tuple[Server, Server]) -> None:
    server = servers[1]
    assert server.process.wait(300) == 3
    assert "empty contains no model: register a diffusers folder" in server.log.read_text("utf-8")
