"""The scoring script of a real-time endpoint, which Azure ML's inference server runs.

A request is `{"input_data": {"columns": ["prompt"], "data": ["a prompt"]}}`, and its answer a list with an object for
each image, in order: `prompt`, `generated_image` (a file in base64) and `nsfw_content_detected` (null where nobody was
asked). An object without an image, and only such a one, also has `error`.

`data` holds prompts, lists or objects. Columns are those of a table: negative_prompt, seed, num_inference_steps,
guidance_scale, guidance_rescale, height, width, num_images_per_prompt, id; others, and `index`, are ignored.
`parameters` or `params`, in `input_data` or next to it, has values for rows without their own. A row without a seed
derives one from --seed and its id, or its number where it has none, as in tables: so the same request gives the same
images. Send a `seed` for others.

The object of a row has its error. A malformed request is answered 400: also one with an unknown key or
parameter, a parameter of an invalid value, or a row of fewer cells than columns. One for more than 256 images is
answered 413, and 503 while content safety does not answer or where BATCH_INFER_REQUEST_TIMEOUT seconds (170) do not do,
each with `{"error": "a sentence"}`; only a body that is not UTF-8 never comes here, and the server has `message` for
that. A prompt of more than 10,000 characters is refused, in its object. Nothing is rendered for a client that has hung
up.

Settings are the BATCH_INFER_* variables. The server has one thread unless GUNICORN_CMD_ARGS="--threads 32" gives it
more: with these, rows of all requests share the UNet's calls.
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
from batch_infer.azureml.payload import MOST_IMAGES, TooMany, read_payload
from batch_infer.errors import BatchInferError, ServiceError, SettingsError, TableError, TryAgainLater

if TYPE_CHECKING:
    from batch_infer.serving import Caller, Service

BAD_REQUEST, TOO_LARGE, UNAVAILABLE = 400, 413, 503
RETRY_AFTER = 10
"""Seconds after which a client may try again."""
BUSY = "a service that judges prompts and images does not answer, or this server is being stopped: try again later"
FIRST = {"prompt": "a red circle", "num_images_per_prompt": 1}
FEW_STEPS = (2, 4, 10)
"""Of the first image: a scheduler may take no fewer than four."""
TIMEOUT, MOST_SECONDS = "BATCH_INFER_REQUEST_TIMEOUT", 170.0
"""A little less than the longest that Azure waits for an answer, which nobody would get after that."""

log = logging.getLogger("batch_infer")


def init() -> None:
    """Load the model, and render a first image: what has to be compiled is, before anybody waits. Raises UsageError."""
    if os.environ.get("WORKER_PRELOAD", "").lower() == "true":
        raise SettingsError("WORKER_PRELOAD=true: a model cannot be loaded before its server forks; leave this out")
    _seconds()
    _warm_up(_service())


def run(raw_data: str | bytes) -> Any:
    """Answer a request: objects, or the server's response where it has another status than 200."""
    service = _service()
    from batch_infer.serving import Caller, GivenUp

    try:
        return _answer(raw_data, service, Caller(_seconds(), _hung_up()))
    except TooMany as error:
        return _response(error, TOO_LARGE, str(error))
    except TableError as error:
        return _response(error, BAD_REQUEST, str(error))
    except GivenUp as error:
        log.warning("%s", error)
        return _response(error, UNAVAILABLE, str(error))
    except TryAgainLater as error:  # which says what a client need not know, such as addresses
        log.error("%s", error)
        return _response(error, UNAVAILABLE, BUSY)


@cache
def _service() -> Service:
    nowhere = Path(tempfile.gettempdir(), f"batch-infer-online-{uuid4().hex}")  # nothing is written
    deployment = find_deployment(str(nowhere), alone=True)
    from batch_infer.serving import Service  # imports torch: what is wrong with the settings is told before

    return Service(deployment)


def _answer(raw_data: str | bytes, service: Service, caller: Caller) -> list[dict[str, Any]]:
    from batch_infer.serving import check_parameters, read_rows, score

    deployment = service.deployment
    rows, parameters = read_payload(raw_data, deployment.settings.table.columns)
    check_parameters(parameters, deployment)
    items = list(islice(read_rows(rows, deployment), MOST_IMAGES + 1))
    if len(items) > MOST_IMAGES:
        who = f"the {len(rows)} prompts of the request ask" if len(rows) > 1 else "the one prompt of the request asks"
        raise TooMany(f"{who} for more")
    return score(items, service, caller)


def _seconds() -> float:
    """How long a request may take. Raises SettingsError."""
    text = os.environ.get(TIMEOUT, "").strip() or str(MOST_SECONDS)
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise SettingsError(f"{TIMEOUT}={text}: say seconds, a little fewer than request_timeout_ms has")
    return found


def _hung_up() -> Callable[[], bool]:
    """Whether the client of the server's request in this thread has gone, as far as its connection says."""
    try:
        from azureml_inference_server_http.server.routes import request
    except ImportError:
        return lambda: False
    connection = request.environ.get("gunicorn.socket") if request else None  # as the server's server calls it
    return lambda: connection is not None and _is_closed(connection)


def _is_closed(connection: socket.socket) -> bool:
    """Whether the other side has ended a connection. One who only ended what he had to say looks the same."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except ValueError:  # one with TLS, into which nobody can look
        return False
    except OSError:
        return True


def _response(error: BatchInferError, status: int, sentence: str) -> Any:
    """A response of the server that this runs in; elsewhere, the error is raised."""
    try:
        from azureml_inference_server_http.api.aml_response import AMLResponse
    except ImportError:
        raise error from None
    headers = {"Retry-After": str(RETRY_AFTER)} if status == UNAVAILABLE else {}
    return AMLResponse({"error": sentence}, status, headers, json_str=True)


def _warm_up(service: Service) -> None:
    from batch_infer.serving import score_rows

    for steps in FEW_STEPS:
        try:
            [first] = score_rows([{**FIRST, "num_inference_steps": steps}], service)
        except ServiceError as error:  # requests are refused while it lasts, and it may not last
            log.warning("the first image could not be judged: %s", error)
            return
        if "error" not in first:
            return
    log.warning("the model gave no first image: %s", first["error"])
