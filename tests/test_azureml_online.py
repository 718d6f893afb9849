"""The real-time scoring script in Azure ML's own inference server, over HTTP."""

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
"""`azmlinfsrv`, which would listen to everybody and has no option against it."""
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
"""A request has as many seconds as a file says, where there is one."""
SAMPLE: dict[str, Any] = {
    "columns": ["prompt"],
    "data": ["A photo of an astronaut riding a horse on Mars"],
    "index": [0],
}
KEYS = ["prompt", "generated_image", "nsfw_content_detected"]
CLIENTS = 20
LONG = {"data": ["a red circle"] * 50, "parameters": {"num_inference_steps": 20}}
"""More than half a minute of work."""


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Server:
    """A server that is being started, or runs, and the service that it asks; `down`: that is out of order."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    safety: Service
    down: threading.Event

    def send(self, body: bytes) -> Answer:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/score", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return Answer(answer.status, json.loads(answer.read()), dict(answer.headers))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, json.loads(error.read()), dict(error.headers))

    def ask(self, **input_data: Any) -> Answer:
        return self.send(json.dumps({"input_data": input_data}).encode())

    def objects(self, **input_data: Any) -> list[dict[str, Any]]:
        answer = self.ask(**input_data)
        assert answer.status == 200, answer.body
        return list(answer.body)

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                # It listens before it has loaded anything, and answers once it has.
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=600) as answer:
                    assert answer.read() == b"Healthy"
                    return
            except OSError:
                time.sleep(0.1)
        pytest.fail(self.log.read_text("utf-8")[-5000:])


def start(folder: Path, model: Path, safety: Service, down: threading.Event) -> Server:
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
    line: list[str | Path] = [
        PYTHON,
        "-c",
        LOOPBACK,
        "--entry_script",
        script,
        "--model_dir",
        model,
        "--port",
        str(port),
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(
            line, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Server(process, port, log, safety, down)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """One that serves the built-in model, and one that has none to serve: started together, as imports take long."""
    folder, down = tmp_path_factory.mktemp("online"), threading.Event()
    with serving(
        words={"knives": ("Violence", 4)}, faults=lambda asked: status(503) if down.is_set() else None
    ) as safety:
        (folder / "nothing").mkdir()
        started = [
            start(folder / "good", DEMO_MODEL, safety, down),
            start(folder / "bad", folder / "nothing", safety, down),
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


def opened(answer: Mapping[str, Any]) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(answer["generated_image"], validate=True)))
    image.load()
    return image


def test_the_sample_request_gets_the_sample_response(server: Server) -> None:
    answer = server.ask(**SAMPLE)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    [found] = answer.body
    assert list(found) == KEYS
    assert found["prompt"] == SAMPLE["data"][0]
    assert found["nsfw_content_detected"] is False
    image = opened(found)
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
    found = server.objects(data=rows, parameters={"num_inference_steps": 5, "guidance_scale": 3})
    assert [opened(each).size if each["generated_image"] else each["error"] for each in found] == [
        *[(64, 64)] * 2,
        "the prompt is empty",
        (96, 128),
        (64, 64),
        "height 65 is not a multiple of 8; the nearest is 64",
        found[6]["error"],
        (64, 64),
    ]
    assert found[6]["error"].startswith("Azure AI Content Safety refused the prompt")
    assert [list(each) for each in found] == [KEYS if each["generated_image"] else [*KEYS, "error"] for each in found]
    assert [each["nsfw_content_detected"] for each in found] == [*[False] * 2, None, False, False, None, True, False]
    first, second, *_ = (each["generated_image"] for each in found)
    assert (first, second) == (found[4]["generated_image"], found[7]["generated_image"])
    assert opened(found[0]).info["parameters"].startswith("a red circle\nSteps: 5, ")


def test_concurrent_clients_get_the_same_images_as_alone(server: Server) -> None:
    prompts = [f"a {colour} {shape}" for colour in ("red", "blue", "green", "yellow") for shape in "abcde"]
    assert len(prompts) == CLIENTS
    with ThreadPoolExecutor(CLIENTS) as clients:
        found = list(clients.map(lambda prompt: server.objects(data=[[prompt]]), prompts))
    assert [each["prompt"] for [each] in found] == prompts
    for prompt, among_others in list(zip(prompts, found, strict=True))[::7]:
        assert server.objects(data=[{"prompt": prompt}]) == among_others


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
        answer = server.send(body)
        assert (answer.status, list(answer.body)) == (400, ["error"]), body[:80]
        assert answer.body["error"].startswith(sentence)
    assert server.send(b'{"input_data": "\xff"}').status == 400
    many = server.ask(data=["a red circle"] * 10_000)
    assert many.status == 413
    assert many.body["error"].startswith("the request has more than 256 images (10000 prompts)")
    [long] = server.objects(data=["a red circle " * 80_000])
    assert (long["generated_image"], long["error"][:41]) == (None, "the prompt has 1040000 characters, and 10")
    assert list(server.objects(**SAMPLE)[0]) == KEYS


def test_a_safety_outage_returns_no_image_and_recovers(server: Server) -> None:
    server.down.set()
    try:
        answer = server.ask(**SAMPLE)
    finally:
        server.down.clear()
    assert (answer.status, answer.headers["Retry-After"], list(answer.body)) == (503, "10", ["error"])
    assert "127.0.0.1" not in answer.body["error"]
    assert "Azure AI Content Safety at http://127.0.0.1" in server.log.read_text("utf-8")
    assert list(server.objects(**SAMPLE)[0]) == KEYS


def test_disconnected_clients_free_the_server(server: Server) -> None:
    """More than it has threads: a probe is answered at once, and what they asked for is not rendered."""
    before = len(server.safety.images)
    body = json.dumps({"input_data": LONG}).encode()
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(CLIENTS + 10)]
    for client in clients:
        client.sendall(head.encode() + body)
    assert eventually(lambda: len(server.safety.images) > before)  # they are being served
    for client in clients:
        client.close()
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=300) as answer:
        assert answer.read() == b"Healthy"
    assert list(server.objects(**SAMPLE)[0]) == KEYS
    assert len(server.safety.images) - before < CLIENTS * len(LONG["data"]) / 2
    assert eventually(lambda: server.log.read_text("utf-8").count("the client has disconnected") >= CLIENTS)


def test_a_request_times_out_with_a_response(server: Server) -> None:
    seconds = server.log.with_name("seconds")
    seconds.write_text("1")
    try:
        answer = server.ask(**LONG)
    finally:
        seconds.unlink()
    assert (answer.status, list(answer.body)) == (503, ["error"])
    assert answer.body["error"].startswith("the images were not ready in 1 seconds: request fewer images at a time")
    assert list(server.objects(**SAMPLE)[0]) == KEYS


def test_a_server_without_its_model_does_not_start_and_logs_why(servers: tuple[Server, Server]) -> None:
    server = servers[1]
    assert server.process.wait(300) == 3
    assert "nothing contains no model: register a diffusers folder" in server.log.read_text("utf-8")
