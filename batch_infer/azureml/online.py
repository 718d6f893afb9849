"""The scoring script of a real-time endpoint, which Azure ML's inference server runs.

A request is `{"input_data": {"columns": ["prompt"], "data": ["a prompt"]}}`. The response is a list with an object per
image, in order: `prompt`, `generated_image` (a file in base64) and `nsfw_content_detected` (null if no checker ran). An
object without an image, and no other, also has `error`.

`data` holds prompts, lists or objects. Columns are those of a table: negative_prompt, seed, num_inference_steps,
guidance_scale, guidance_rescale, height, width, num_images_per_prompt, id. Others, and `index`, are ignored.
`parameters` or `params`, in `input_data` or next to it, has values for rows without their own. As in tables, the seed
of a row without one is derived from --seed and the row's id or, without an id, its number: the same request gives the
same images. Send a `seed` for other images.

An invalid row is reported in its object, also a prompt of more than 10,000 characters. A malformed request gets status
400: also one with an unknown key or parameter, an invalid parameter, or a row of fewer cells than columns. One for more
than 256 images gets 413. The status is 503 while content safety does not answer, or where the images are not ready in
BATCH_INFER_REQUEST_TIMEOUT seconds (170). The body of each is `{"error": "a sentence"}`. The server itself refuses a
body that is not UTF-8, with `message`. The rest of a request is not rendered once its client has disconnected.

Settings are the BATCH_INFER_* variables. The server has one thread unless GUNICORN_CMD_ARGS="--threads 32" gives it
more. With these, rows of all requests share the UNet calls.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import tempfile
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from batch_infer.azureml.deployment import find_deployment
from batch_infer.azureml.payload import MAX_IMAGES, TooManyImagesError, read_payload
from batch_infer.errors import BatchInferError, RetryableError, ServiceError, SettingsError, TableError

if TYPE_CHECKING:
    from batch_infer.serving import Client, Service

BAD_REQUEST, TOO_LARGE, UNAVAILABLE = 400, 413, 503
RETRY_AFTER = 10
"""Seconds after which a client may try again."""
BUSY = "the safety service does not answer, or this server is being stopped: try again later"
WARM_UP_ROW = {"prompt": "a red circle", "num_images_per_prompt": 1}
WARM_UP_STEPS = (2, 4, 10)
"""Steps of the first image: some schedulers need at least four."""
TIMEOUT, DEFAULT_TIMEOUT = "BATCH_INFER_REQUEST_TIMEOUT", 170.0
"""A little less than Azure's own limit of 180 seconds, after which no client receives the response."""

log = logging.getLogger("batch_infer")


def init() -> None:
    """Load the model and render a first image, so that compiling delays no request. Raises UsageError."""
    if os.environ.get("WORKER_PRELOAD", "").lower() == "true":
        raise SettingsError("WORKER_PRELOAD=true: a model cannot be loaded before the server forks; unset it")
    _read_timeout()
    _warm_up(_load_service())


def run(raw_data: str | bytes) -> Any:
    """Return the objects of a request, or the server's response if the status is not 200."""
    service = _load_service()
    from batch_infer.serving import Client, RequestCancelledError

    try:
        return _score(raw_data, service, Client(_read_timeout(), _find_disconnection_check()))
    except TooManyImagesError as error:
        return _make_response(error, TOO_LARGE, str(error))
    except TableError as error:
        return _make_response(error, BAD_REQUEST, str(error))
    except RequestCancelledError as error:
        log.warning("%s", error)
        return _make_response(error, UNAVAILABLE, str(error))
    except RetryableError as error:  # its message may have addresses, which are not for clients
        log.error("%s", error)
        return _make_response(error, UNAVAILABLE, BUSY)


@cache
def _load_service() -> Service:
    unused = Path(tempfile.gettempdir(), f"batch-infer-online-{uuid4().hex}")  # nothing is written there
    deployment = find_deployment(str(unused), alone=True)
    from batch_infer.serving import Service  # imports torch, after the settings have been checked

    return Service(deployment)


def _score(raw_data: str | bytes, service: Service, client: Client) -> list[dict[str, Any]]:
    from batch_infer.serving import check_parameters, read_rows, score

    deployment = service.deployment
    rows, parameters = read_payload(raw_data, deployment.settings.table.columns)
    check_parameters(parameters, deployment)
    items = list(islice(read_rows(rows, deployment), MAX_IMAGES + 1))
    if len(items) > MAX_IMAGES:
        raise TooManyImagesError(len(rows))
    return score(items, service, client)


def _read_timeout() -> float:
    """Return the seconds that a request may take. Raises SettingsError."""
    text = os.environ.get(TIMEOUT, "").strip() or str(DEFAULT_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise SettingsError(f"{TIMEOUT}={text}: give seconds, a little less than request_timeout_ms")
    return seconds


def _find_disconnection_check() -> Callable[[], bool]:
    """Return a function that says whether the client of this thread's request has disconnected, as far as is known."""
    try:
        from azureml_inference_server_http.server.routes import request
    except ImportError:
        return lambda: False
    connection = request.environ.get("gunicorn.socket") if request else None  # set by gunicorn
    return lambda: connection is not None and _is_closed(connection)


def _is_closed(connection: socket.socket) -> bool:
    """Return whether the other side has closed a connection, or only its sending half, which looks the same."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except ValueError:  # a TLS connection does not support flags
        return False
    except OSError:
        return True


def _make_response(error: BatchInferError, status: int, sentence: str) -> Any:
    """Return a response of the inference server. Without that server, raise the error."""
    try:
        from azureml_inference_server_http.api.aml_response import AMLResponse
    except ImportError:
        raise error from None
    headers = {"Retry-After": str(RETRY_AFTER)} if status == UNAVAILABLE else {}
    return AMLResponse({"error": sentence}, status, headers, json_str=True)


def _warm_up(service: Service) -> None:
    from batch_infer.serving import score_rows

    for steps in WARM_UP_STEPS:
        try:
            [first] = score_rows([{**WARM_UP_ROW, "num_inference_steps": steps}], service)
        except ServiceError as error:  # it may be temporary; requests are refused meanwhile
            log.warning("the first image could not be checked: %s", error)
            return
        if "error" not in first:
            return
    log.warning("the model rendered no first image: %s", first["error"])
