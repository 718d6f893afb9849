"""The payload of a real-time request: the rows that its JSON holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from batch_infer.errors import RowError, TableError, first_line
from batch_infer.table import Shape, cells_of, column_names, is_deep

SAMPLE = '{"input_data": {"columns": ["prompt"], "data": ["a prompt"]}}'
MOST_IMAGES = 256
"""Of one request. A real-time endpoint gives up on a request after three minutes at most."""


class TooMany(TableError):
    """More than one request may ask for."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}, and one request may ask for {MOST_IMAGES} images at most: send several, or score them by a "
            "batch endpoint"
        )


def read_payload(text: str | bytes, prompt: str = "prompt") -> list[dict[str, Any]]:
    """The cells of each row, by column; `prompt` is the prompts' column.

    Raises TableError, in one sentence, for what is no payload.
    """
    payload = _input_data(text)
    shape = _shape(payload, prompt)
    rows = [_row(number, element, shape) for number, element in enumerate(_elements(payload))]
    if not any(prompt in row for row in rows):
        found = ", ".join(repr(name[:40]) for name in list(dict.fromkeys(name for row in rows for name in row))[:12])
        raise TableError(f"there is no column {prompt!r} in input_data, which has {found or 'none'}: send {SAMPLE}")
    return rows


def _input_data(text: str | bytes) -> Mapping[str, Any]:
    if isinstance(text, str):
        text = text.removeprefix("\ufeff")  # of bytes, json takes it off
    if not text.strip():  # which is also what the server makes of a form
        raise TableError(f"the request is empty, or its Content-Type is not application/json: send {SAMPLE}")
    try:
        document = json.loads(text)
    except RecursionError:
        raise TableError("the request is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TableError(f"the request is not JSON ({first_line(error)}): send {SAMPLE}") from error
    except ValueError as error:  # from int(), which takes some thousand digits
        raise TableError("a number in the request has too many digits") from error
    if not isinstance(document, dict):
        raise TableError(f"the request is not a JSON object but {_kind(document)}: send {SAMPLE}")
    if is_deep(document):
        raise TableError("the request is nested too deeply")
    if not isinstance(payload := document.get("input_data"), dict):
        told = f"input_data is not an object but {_kind(payload)}" if payload is not None else "there is no input_data"
        raise TableError(f"{told} in the request: send {SAMPLE}")
    return payload


def _elements(payload: Mapping[str, Any]) -> Sequence[Any]:
    elements = payload.get("data")
    if not isinstance(elements, list):
        told = f"data is not a list but {_kind(elements)}" if elements is not None else "there is no data"
        raise TableError(f"{told} in input_data: send {SAMPLE}")
    if not elements:
        raise TableError(f"data in input_data is empty: send {SAMPLE}")
    if len(elements) > MOST_IMAGES:
        raise TooMany(f"the request has {len(elements)} prompts")
    return elements


def _shape(payload: Mapping[str, Any], prompt: str) -> Shape:
    columns, parameters = payload.get("columns") or [prompt], payload.get("parameters") or {}
    if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
        raise TableError(f"columns in input_data is not a list of names, as it is in {SAMPLE}")
    if not isinstance(parameters, dict):
        raise TableError(f"parameters in input_data is not an object but {_kind(parameters)}")
    try:
        return Shape(True, column_names(columns), parameters)
    except RowError as error:
        raise TableError(f"columns in input_data: {error}") from error


def _row(number: int, element: Any, shape: Shape) -> dict[str, Any]:
    if not isinstance(element, (str, list, dict)):
        told = f"element {number} of data is neither an object nor a prompt but {_kind(element)}"
        raise TableError(f"{told}: send {SAMPLE}")
    try:
        return cells_of(element, shape)
    except RowError as error:
        raise TableError(f"element {number} of data {error}: send {SAMPLE}") from error


def _kind(value: Any) -> str:
    """What JSON calls it."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
