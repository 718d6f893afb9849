"""Rows in, objects out: what is answered to those who wait for it, by whichever door they came."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from batch_infer import images
from batch_infer.chain import Rendered, Unrendered
from batch_infer.errors import TableError
from batch_infer.records import PromptRequest
from batch_infer.serving.deployment import Deployment
from batch_infer.serving.service import PATIENT, Caller, Service
from batch_infer.table import parse_rows
from batch_infer.worker import explain_flag


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that nothing can be made of, and why."""

    prompt: str | None
    error: str


Item: TypeAlias = "PromptRequest | Refused"


def read_rows(rows: Iterable[Mapping[str, Any]], deployment: Deployment) -> Iterator[Item]:
    """The images that rows ask for, in order: each row is its cells, by the names of a table's columns."""
    for item in parse_rows(rows, deployment.settings.table.columns, deployment.rules):
        if not isinstance(item, PromptRequest):
            yield Refused(item.prompt, item.error or "")
        else:
            yield item


def check_parameters(parameters: Mapping[str, Any], deployment: Deployment) -> None:
    """Raise TableError where a request-level parameter has a value that no row may have."""
    prompt = deployment.settings.table.columns.get("prompt") or "prompt"
    item = next(iter(read_rows([{**parameters, prompt: "any"}], deployment)))
    if isinstance(item, Refused):
        raise TableError(f"the parameters of the request: {item.error}")


def score(items: Sequence[Item], service: Service, caller: Caller = PATIENT) -> list[dict[str, Any]]:
    """An object for each: `prompt`, `generated_image` (a file in base64), `nsfw_content_detected`.

    One without an image, and only such a one, has a fourth key, `error`. Raises as `Service.outcomes`.
    """
    found = [_without_image(item.prompt, None, item.error) if isinstance(item, Refused) else {} for item in items]
    places = [place for place, item in enumerate(items) if isinstance(item, PromptRequest)]
    requests = [item for item in items if isinstance(item, PromptRequest)]
    for number, outcome in service.outcomes(requests, caller):
        found[places[number]] = _object(outcome, service.deployment)  # compressed while the device renders the next
    return found


def score_rows(rows: Iterable[Mapping[str, Any]], service: Service) -> list[dict[str, Any]]:
    """The objects of all images that rows ask for, in order. Raises as `Service.outcomes`."""
    return score(list(read_rows(rows, service.deployment)), service)


def _object(outcome: Rendered | Unrendered, deployment: Deployment) -> dict[str, Any]:
    request, nsfw = outcome.request, outcome.verdict.nsfw
    if isinstance(outcome, Unrendered):
        return _without_image(request.prompt, nsfw, outcome.error)
    settings, card = deployment.settings, deployment.card
    pixels = outcome.pixels
    if nsfw:
        # Nothing is stored here, so what goes into quarantine goes nowhere.
        policy = settings.safety.policy
        left = images.by_policy(pixels, "drop" if policy == "quarantine" else policy)
        if left is None:
            return _without_image(request.prompt, nsfw, explain_flag(outcome.verdict))
        pixels = left
    parameters = images.parameters_text(request, card.scheduler_name, card.fingerprint)
    file = base64.b64encode(images.encode(pixels, settings.output.image_format, parameters)).decode("ascii")
    return {"prompt": request.prompt, "generated_image": file, "nsfw_content_detected": nsfw}


def _without_image(prompt: str | None, nsfw: bool | None, error: str) -> dict[str, Any]:
    return {"prompt": prompt, "generated_image": None, "nsfw_content_detected": nsfw, "error": error}
