"""The payload of a real-time request: the rows that its JSON holds."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from batch_infer.errors import RowError, TableError, first_line
from batch_infer.settings import FIELDS
from batch_infer.table import DocumentFormat, element_cells, is_too_deep, payload_columns

SAMPLE = '{"input_data": {"columns": ["prompt"], "data": ["a prompt"]}}'
PARAMETER_KEYS = ("parameters", "params")
"""Both names are in use: Azure ML's model catalog documents `input_data.parameters`, MLflow's scoring server `params`
next to the data (https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally/)."""
_KEYS = ("input_data", *PARAMETER_KEYS)
_INPUT_KEYS = ("columns", "data", "index", *PARAMETER_KEYS)
MOST_IMAGES = 256
"""Of one request. A real-time endpoint gives up on a request after three minutes at most."""


class TooMany(TableError):
    """More than one request may ask for."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}, and one request may ask for {MOST_IMAGES} images at most: send several, or score them by a "
            "batch endpoint"
        )


class Payload(NamedTuple):
    """The cells of each row by column, with the request-level parameters in rows that have no value of their own."""

    rows: list[dict[str, Any]]
    parameters: dict[str, Any]


def read_payload(text: str | bytes, columns: Mapping[str, str] | None = None) -> Payload:
    """Read a request. `columns` maps a field to the name of its column, where that is another.

    Raises TableError, in one sentence, for what is no payload.
    """
    names = {field: (columns or {}).get(field) or field for field in FIELDS}
    prompt = names["prompt"]
    document = _document(text)
    payload = _input_data(document)
    parameters = _parameters(document, payload, names)
    shape = _shape(payload, prompt, parameters)
    rows = [_row(number, element, shape) for number, element in enumerate(_elements(payload))]
    if not any(prompt in row for row in rows):
        found = ", ".join(repr(name[:40]) for name in list(dict.fromkeys(name for row in rows for name in row))[:12])
        raise TableError(f"there is no column {prompt!r} in input_data, which has {found or 'none'}: send {SAMPLE}")
    return Payload(rows, parameters)


def _document(text: str | bytes) -> Mapping[str, Any]:
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
    if is_too_deep(document):
        raise TableError("the request is nested too deeply")
    return document


def _input_data(document: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(payload := document.get("input_data"), dict):
        told = f"input_data is not an object but {_kind(payload)}" if payload is not None else "there is no input_data"
        raise TableError(f"{told} in the request: send {SAMPLE}")
    _refuse_unknown("key", document, _KEYS, "the request")
    _refuse_unknown("key", payload, _INPUT_KEYS, "input_data")
    return payload


def _parameters(document: Mapping[str, Any], payload: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the request-level parameters by column, wherever the request has them."""
    found: dict[str, Any] = {}
    for place, holder in (("the request", document), ("input_data", payload)):
        for key in PARAMETER_KEYS:
            values = holder.get(key)
            if values is None:
                continue
            if not isinstance(values, dict):
                raise TableError(f"{key} in {place} is not an object but {_kind(values)}")
            allowed = {field: name for field, name in names.items() if field not in ("prompt", "id")}
            _refuse_unknown("parameter", values, {*allowed, *allowed.values()}, f"{key} in {place}")
            for name, value in values.items():
                column = str(allowed.get(name, name))
                if column in found:
                    raise TableError(f"the request has the parameter {name!r} twice")
                found[column] = value
    return found


def _refuse_unknown(noun: str, found: Collection[str], known: Collection[str], place: str) -> None:
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
            raise TableError(f"unknown {noun} {name[:40]!r} in {place}; {hint}")


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


def _shape(payload: Mapping[str, Any], prompt: str, parameters: dict[str, Any]) -> DocumentFormat:
    columns = payload.get("columns") or [prompt]
    if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
        raise TableError(f"columns in input_data is not a list of names, as it is in {SAMPLE}")
    try:
        return DocumentFormat(True, payload_columns(columns), parameters)
    except RowError as error:
        raise TableError(f"columns in input_data: {error}") from error


def _row(number: int, element: Any, shape: DocumentFormat) -> dict[str, Any]:
    if not isinstance(element, (str, list, dict)):
        told = f"element {number} of data is neither an object nor a prompt but {_kind(element)}"
        raise TableError(f"{told}: send {SAMPLE}")
    if isinstance(element, list) and len(element) < len(shape.columns):
        fault = f"element {number} of data has {_cells(element)} where columns names {len(shape.columns)}"
        raise TableError(f"{fault}; send null for a cell without a value")
    try:
        return element_cells(element, shape)
    except RowError as error:
        raise TableError(f"element {number} of data {error}: send {SAMPLE}") from error


def _cells(element: Sequence[Any]) -> str:
    return "1 cell" if len(element) == 1 else f"{len(element)} cells"


def _kind(value: Any) -> str:
    """What JSON calls it."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
