"""The scoring script of a real-time endpoint, which Azure ML's inference server runs.

A request is `{"input_data": {"columns": ["prompt"], "data": ["a prompt"]}}`. The response is a list with an object per
image, in order: `prompt`, `generated_image` (a file in base64) and `nsfw_content_detected` (null if no checker ran).
Only an object without an image also has `error`.

`data` contains prompts, lists or objects. The columns are the same as in tables: negative_prompt, seed,
num_inference_steps, guidance_scale, guidance_rescale, height, width, num_images_per_prompt, id and, with
BATCH_INFER_LORA_FOLDER, lora. Other columns, and `index`, are ignored. `parameters` or `params`, in `input_data` or
next to it, contains default values for all rows. As in tables, a missing seed is derived from BATCH_INFER_SEED and the
row's id or, without an id, the row's number. Therefore the same request returns the same images. Send a `seed` for
other images.

The object of an invalid row, such as one with a prompt of more than 10,000 characters, has the reason in `error`. A
malformed request, an unknown key or parameter, an invalid parameter, or a row with too few or too many cells gets
status 400. A request for more than 256 images gets status 413. The status is 503 if content safety does not answer, if
the server is being stopped, or if the images are not ready within BATCH_INFER_REQUEST_TIMEOUT seconds (170). The body
of these responses is `{"error": "a sentence"}`. The inference server itself refuses a body that is not UTF-8, with
status 400 and a body that has the key `message` instead of `error`. Once the server notices that a client has
disconnected, it renders no further rows of its request.

Settings are the BATCH_INFER_* variables. The server has one thread by default. With GUNICORN_CMD_ARGS="--threads 32",
rows of concurrent requests share the denoiser calls.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable
from functools import cache
from itertools import islice
from typing import Any

from batch_infer.azureml.deployment import read_deployment
from batch_infer.azureml.payload import MAX_IMAGES, TooManyImagesError, read_payload
from batch_infer.errors import BatchInferError, RetryableError, ServiceError, SettingsError, TableError
from batch_infer.serving import Client, RequestCancelledError, Service, check_parameters, read_rows, score, score_rows

BAD_REQUEST, TOO_LARGE, UNAVAILABLE = 400, 413, 503
RETRY_AFTER = 10
"""Seconds to wait before sending a request again."""
BUSY = "the safety service does not answer, or this server is being stopped: try again later"
WARM_UP_ROW = {"prompt": "a red circle", "num_images_per_prompt": 1}
WARM_UP_STEPS = (2, 4, 10)
"""Numbers of steps to try for the first image. Some schedulers need at least four."""
TIMEOUT, DEFAULT_TIMEOUT = "BATCH_INFER_REQUEST_TIMEOUT", 170.0
"""Slightly less than Azure's limit of 180 seconds, after which the client does not receive the response."""

log = logging.getLogger("batch_infer")


def init() -> None:
    """Load the model and try to render a first image, so that compilation does not delay the first request.

    Raises UsageError.
    """
    if os.environ.get("WORKER_PRELOAD", "").lower() == "true":
        raise SettingsError("WORKER_PRELOAD=true: a model cannot be loaded before the server forks; unset it")
    _read_timeout()
    service = _load_service()
    for steps in WARM_UP_STEPS:
        try:
            [row] = score_rows([{**WARM_UP_ROW, "num_inference_steps": steps}], service)
        except ServiceError as error:  # it may be temporary; requests are refused meanwhile
            log.warning("the first image could not be checked: %s", error)
            return
        if "error" not in row:
            return
    log.warning("the model rendered no first image: %s", row["error"])


def run(raw_data: str | bytes) -> Any:
    """Return the objects for a request, or a server response with an error status.

    Without the inference server's library, raises the error instead.
    """
    service = _load_service()
    deployment = service.deployment
    try:
        client = Client(_read_timeout(), _find_disconnection_check())
        rows, parameters = read_payload(raw_data, deployment.settings.table.columns)
        check_parameters(parameters, deployment)
        items = list(islice(read_rows(rows, deployment), MAX_IMAGES + 1))
        if len(items) > MAX_IMAGES:
            raise TooManyImagesError(len(rows))
        return score(items, service, client)
    except TooManyImagesError as error:
        return _make_response(error, TOO_LARGE, str(error))
    except TableError as error:
        return _make_response(error, BAD_REQUEST, str(error))
    except RequestCancelledError as error:
        log.warning("%s", error)
        return _make_response(error, UNAVAILABLE, str(error))
    except RetryableError as error:  # the message is not sent to the client, since it may contain addresses
        log.error("%s", error)
        return _make_response(error, UNAVAILABLE, BUSY)


@cache
def _load_service() -> Service:
    return Service(read_deployment(is_only_worker=True))


def _read_timeout() -> float:
    """Return the timeout of a request in seconds. Raises SettingsError."""
    text = os.environ.get(TIMEOUT, "").strip() or str(DEFAULT_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise SettingsError(f"{TIMEOUT}={text}: use seconds, a little less than request_timeout_ms")
    return seconds


def _find_disconnection_check() -> Callable[[], bool]:
    """Return a function that returns whether the client of this thread's request is known to have disconnected."""
    try:
        from azureml_inference_server_http.server.routes import request
    except ImportError:
        return lambda: False
    connection = request.environ.get("gunicorn.socket") if request else None  # set by gunicorn
    return lambda: connection is not None and _is_closed(connection)


def _is_closed(connection: socket.socket) -> bool:
    """Return whether the client has closed the connection, or only its sending half, which cannot be distinguished."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except (BlockingIOError, ValueError):  # nothing to read, or a TLS connection, which does not support flags
        return False
    except OSError:
        return True


def _make_response(error: BatchInferError, status: int, message: str) -> Any:
    """Return a response of the inference server, or raise the error if its library is not installed."""
    try:
        from azureml_inference_server_http.api.aml_response import AMLResponse
    except ImportError:
        raise error from None
    headers = {"Retry-After": str(RETRY_AFTER)} if status == UNAVAILABLE else {}
    return AMLResponse({"error": message}, status, headers, json_str=True)
