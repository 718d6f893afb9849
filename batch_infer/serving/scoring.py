"""Render rows as the objects of a response, each with an image file in base64 or the reason why there is none."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from batch_infer import images
from batch_infer.chain import RenderedImage, UnrenderedRow
from batch_infer.errors import TableError
from batch_infer.records import PromptRequest, ResultRow
from batch_infer.serving.service import NO_TIMEOUT, Client, Deployment, Service
from batch_infer.settings import OnFlagged
from batch_infer.table import parse_rows
from batch_infer.worker import explain_flag


def read_rows(rows: Iterable[Mapping[str, Any]], deployment: Deployment) -> Iterator[PromptRequest | ResultRow]:
    """Yield the requests or the invalid result of each row, in order. A row maps column names to cells."""
    return parse_rows(rows, deployment.settings.table.columns, deployment.rules, deployment.find_lora)


def check_parameters(parameters: Mapping[str, Any], deployment: Deployment) -> None:
    """Raise TableError if a request-level parameter has a value that is invalid in every row."""
    prompt = deployment.settings.table.columns.get("prompt") or "prompt"
    item = next(iter(read_rows([{**parameters, prompt: "any"}], deployment)))
    if isinstance(item, ResultRow):
        raise TableError(f"the parameters of the request: {item.error}")


def score(
    items: Sequence[PromptRequest | ResultRow], service: Service, client: Client = NO_TIMEOUT
) -> list[dict[str, Any]]:
    """Return an object per item: `prompt`, `generated_image` (a file in base64), `nsfw_content_detected`.

    Only an object without an image has a fourth key, `error`. Raises the same errors as `Service.render`.
    """
    objects = [_without_image(item.prompt, None, item.error) if isinstance(item, ResultRow) else {} for item in items]
    requests = {index: item for index, item in enumerate(items) if isinstance(item, PromptRequest)}
    indices = list(requests)
    for number, outcome in service.render(list(requests.values()), client):
        # Encode each image here, while the device renders the next rows.
        objects[indices[number]] = _to_object(outcome, service.deployment)
    return objects


def score_rows(rows: Iterable[Mapping[str, Any]], service: Service) -> list[dict[str, Any]]:
    """Return the objects for all images of rows, in order. Raises the same errors as `Service.render`."""
    return score(list(read_rows(rows, service.deployment)), service)


def _to_object(outcome: RenderedImage | UnrenderedRow, deployment: Deployment) -> dict[str, Any]:
    request, nsfw = outcome.request, outcome.verdict.nsfw
    if isinstance(outcome, UnrenderedRow):
        return _without_image(request.prompt, nsfw, outcome.error)
    settings, card = deployment.settings, deployment.card
    policy: OnFlagged | None = settings.safety.policy if nsfw else None
    # A service stores no images, so it has no quarantine.
    pixels = deployment.marker.mark_pixels(outcome.pixels, "drop" if policy == "quarantine" else policy)
    if pixels is None:
        return _without_image(request.prompt, nsfw, explain_flag(outcome.verdict))
    parameters = images.format_parameters(request, card.scheduler_name, card.fingerprint)
    content = deployment.marker.encode(pixels, settings.output.image_format, parameters)
    file = base64.b64encode(content).decode("ascii")
    return {"prompt": request.prompt, "generated_image": file, "nsfw_content_detected": nsfw}


def _without_image(prompt: str | None, nsfw: bool | None, error: str | None) -> dict[str, Any]:
    return {"prompt": prompt, "generated_image": None, "nsfw_content_detected": nsfw, "error": error or ""}
