"""Parse the JSON payload of a real-time request into rows."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from batch_infer.errors import RowError, TableError, first_line
from batch_infer.settings import FIELDS
from batch_infer.table import DocumentFormat, is_too_deep, parse_element, parse_payload_columns

SAMPLE = '{"input_data": {"columns": ["prompt"], "data": ["a prompt"]}}'
PARAMETER_KEYS = ("parameters", "params")
"""Azure ML's model catalog documents `input_data.parameters`, and MLflow's scoring server `params` next to the data
(https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally/)."""
_KEYS = ("input_data", *PARAMETER_KEYS)
_INPUT_KEYS = ("columns", "data", "index", *PARAMETER_KEYS)
MAX_IMAGES = 256
"""Maximum number of images per request. A real-time endpoint cancels a request after at most three minutes."""


class TooManyImagesError(TableError):
    """A request has more than MAX_IMAGES images."""

    def __init__(self, prompt_count: int) -> None:
        prompts = "1 prompt" if prompt_count == 1 else f"{prompt_count} prompts"
        super().__init__(
            f"the request has more than {MAX_IMAGES} images ({prompts}): send several requests, or use a batch endpoint"
        )


class Payload(NamedTuple):
    """The cells of each row by column, with the request-level parameters as defaults, and these parameters."""

    rows: list[dict[str, Any]]
    parameters: dict[str, Any]


def read_payload(text: str | bytes, columns: Mapping[str, str] | None = None) -> Payload:
    """Parse a request. `columns` maps fields to columns with a different name.

    Raises TableError if the request is malformed, and TooManyImagesError if it has too many rows.
    """
    names = {field: (columns or {}).get(field) or field for field in FIELDS}
    prompt = names["prompt"]
    document = _parse_json(text)
    payload = _read_input_data(document)
    parameters = _read_parameters(document, payload, names)
    document_format = _read_format(payload, prompt, parameters)
    rows = [_read_row(number, element, document_format) for number, element in enumerate(_read_elements(payload))]
    if not any(prompt in row for row in rows):
        names_sent = list(dict.fromkeys(name for row in rows for name in row))
        shown = ", ".join(repr(name[:40]) for name in names_sent[:12])
        raise TableError(f"there is no column {prompt!r} in input_data, which has {shown or 'none'}: send {SAMPLE}")
    return Payload(rows, parameters)


def _parse_json(text: str | bytes) -> Mapping[str, Any]:
    if isinstance(text, str):
        text = text.removeprefix("\ufeff")  # a byte order mark, which json removes only from bytes
    if not text.strip():  # the server also passes a form as an empty text
        raise TableError(f"the request is empty, or its Content-Type is not application/json: send {SAMPLE}")
    try:
        document = json.loads(text)
    except RecursionError:
        raise TableError("the request is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TableError(f"the request is not JSON ({first_line(error)}): send {SAMPLE}") from error
    except ValueError as error:  # from int(), which limits the number of digits
        raise TableError("a number in the request has too many digits") from error
    if not isinstance(document, dict):
        raise TableError(f"the request is not a JSON object but {_json_type(document)}: send {SAMPLE}")
    if is_too_deep(document):
        raise TableError("the request is nested too deeply")
    return document


def _read_input_data(document: Mapping[str, Any]) -> Mapping[str, Any]:
    if "input_data" not in document:
        raise TableError(f"there is no input_data in the request: send {SAMPLE}")
    payload = document["input_data"]
    if not isinstance(payload, dict):
        raise TableError(f"input_data is not an object but {_json_type(payload)} in the request: send {SAMPLE}")
    _refuse_unknown("key", document, _KEYS, "the request")
    _refuse_unknown("key", payload, _INPUT_KEYS, "input_data")
    return payload


def _read_parameters(
    document: Mapping[str, Any], payload: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
    """Return the request-level parameters by column."""
    allowed = {field: name for field, name in names.items() if field not in ("prompt", "id")}
    parameters: dict[str, Any] = {}
    for parent_name, parent in (("the request", document), ("input_data", payload)):
        for key in PARAMETER_KEYS:
            values = parent.get(key)
            if values is None:
                continue
            if not isinstance(values, dict):
                raise TableError(f"{key} in {parent_name} is not an object but {_json_type(values)}")
            _refuse_unknown("parameter", values, {*allowed, *allowed.values()}, f"{key} in {parent_name}")
            for name, value in values.items():
                column = str(allowed.get(name, name))
                if column in parameters:
                    raise TableError(f"the request has the parameter {name!r} twice")
                parameters[column] = value
    return parameters


def _refuse_unknown(noun: str, names: Collection[str], allowed: Collection[str], parent_name: str) -> None:
    for name in names:
        if name not in allowed:
            similar = difflib.get_close_matches(name, allowed, n=1)
            hint = f"did you mean {similar[0]!r}?" if similar else f"use one of {', '.join(sorted(allowed))}"
            raise TableError(f"unknown {noun} {name[:40]!r} in {parent_name}; {hint}")


def _read_elements(payload: Mapping[str, Any]) -> list[Any]:
    if "data" not in payload:
        raise TableError(f"there is no data in input_data: send {SAMPLE}")
    elements = payload["data"]
    if not isinstance(elements, list):
        raise TableError(f"data is not a list but {_json_type(elements)} in input_data: send {SAMPLE}")
    if not elements:
        raise TableError(f"data in input_data is empty: send {SAMPLE}")
    if len(elements) > MAX_IMAGES:
        raise TooManyImagesError(len(elements))
    return elements


def _read_format(payload: Mapping[str, Any], prompt: str, parameters: dict[str, Any]) -> DocumentFormat:
    columns = payload.get("columns") or [prompt]
    if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
        raise TableError(f"columns in input_data is not a list of names: send {SAMPLE}")
    try:
        return DocumentFormat(True, parse_payload_columns(columns), parameters)
    except RowError as error:
        raise TableError(f"columns in input_data: {error}") from error


def _read_row(number: int, element: Any, document_format: DocumentFormat) -> dict[str, Any]:
    columns = len(document_format.columns)
    if isinstance(element, list) and len(element) < columns:
        cells = "1 cell" if len(element) == 1 else f"{len(element)} cells"
        problem = f"element {number} of data has {cells}, but the number of columns is {columns}"
        raise TableError(f"{problem}; send null for a cell without a value")
    try:
        if not isinstance(element, (str, list, dict)):
            raise RowError(f"is neither an object nor a prompt but {_json_type(element)}")
        return parse_element(element, document_format)
    except RowError as error:
        raise TableError(f"element {number} of data {error}: send {SAMPLE}") from error


def _json_type(value: Any) -> str:
    """Return the JSON type of a value, with an article."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
