"""Test the payload of real-time requests: documented forms and malformed requests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from batch_infer.azureml.payload import read_payload
from batch_infer.errors import TableError


def payload(**input_data: Any) -> str:
    return json.dumps({"input_data": input_data})


@pytest.mark.parametrize(
    ("sent", "rows"),
    [
        ({"columns": ["prompt"], "data": ["p", "q"], "index": [0, 1]}, [{"prompt": "p"}, {"prompt": "q"}]),
        ({"columns": ["prompt"], "data": [["p"], ["q"]]}, [{"prompt": "p"}, {"prompt": "q"}]),
        ({"data": [{"prompt": "p"}, {"prompt": "q"}]}, [{"prompt": "p"}, {"prompt": "q"}]),
        ({"data": ["p", ["q"], {"prompt": "r"}]}, [{"prompt": "p"}, {"prompt": "q"}, {"prompt": "r"}]),
        (
            {"columns": ["prompt", "seed"], "data": [["p", 3], ["q", None]]},
            [{"prompt": "p", "seed": 3}, {"prompt": "q", "seed": None}],
        ),
        (
            {"data": ["p", {"prompt": "q", "seed": 4}, {"prompt": "r", "seed": None}], "parameters": {"seed": 9}},
            [{"prompt": "p", "seed": 9}, {"prompt": "q", "seed": 4}, {"prompt": "r", "seed": 9}],
        ),
        ({"data": ["p"], "index": "no index", "parameters": None, "columns": None}, [{"prompt": "p"}]),
    ],
)
def test_rows_may_be_prompts_lists_or_objects(sent: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    assert read_payload(payload(**sent)).rows == rows


@pytest.mark.parametrize("key", ["parameters", "params"])
@pytest.mark.parametrize("next_to_input_data", [True, False])
def test_parameters_may_have_either_name_and_position(key: str, next_to_input_data: bool) -> None:
    values = {key: {"num_inference_steps": 7, "seed": 3}}
    data = {"data": ["p", {"prompt": "q", "seed": 4}]}
    sent = {"input_data": data, **values} if next_to_input_data else {"input_data": {**data, **values}}
    rows, parameters = read_payload(json.dumps(sent))
    assert parameters == values[key]
    assert rows == [
        {"prompt": "p", "num_inference_steps": 7, "seed": 3},
        {"prompt": "q", "num_inference_steps": 7, "seed": 4},
    ]


def test_a_parameter_is_named_by_its_field_or_its_column() -> None:
    for name in ("num_inference_steps", "steps"):
        text = json.dumps({"input_data": {"data": ["p"]}, "params": {name: 7}})
        assert read_payload(text, {"num_inference_steps": "steps"}).rows == [{"prompt": "p", "steps": 7}]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"\xff", "the request is not JSON"),
        ('{"input_data": ', "the request is not JSON (Expecting value"),
        ('{"input_data": {"data": [' + "9" * 5000 + "]}}", "a number in the request has too many digits"),
        (" ", "the request is empty"),
        ("[" * 200 + "]" * 200, "the request is not a JSON object but a list"),
        ("[" * 100_000, "the request is nested too deeply"),
        (payload(data=["p"], index=json.loads("[" * 200 + "]" * 200)), "the request is nested too deeply"),
        ('"p"', "the request is not a JSON object but a string"),
        ("{}", "there is no input_data in the request"),
        ('{"input_data": ["p"]}', "input_data is not an object but a list"),
        (payload(columns=["prompt"]), "there is no data in input_data"),
        (payload(data="p"), "data is not a list but a string"),
        (payload(data=[]), "data in input_data is empty"),
        (payload(data=["p", 3]), "element 1 of data is neither an object nor a prompt but a number"),
        (payload(data=[None]), "element 0 of data is neither an object nor a prompt but null"),
        (payload(data=[["p", "q"]]), "element 0 of data has 2 cells, but the number of columns is 1"),
        (payload(columns="prompt", data=["p"]), "columns in input_data is not a list of names"),
        (payload(columns=["prompt", 2], data=["p"]), "columns in input_data is not a list of names"),
        (payload(columns=["prompt", "prompt"], data=["p"]), "columns in input_data: two are named 'prompt'"),
        (payload(parameters=[1], data=["p"]), "parameters in input_data is not an object but a list"),
        (payload(data=["p"], params={"steps": 7}), "unknown parameter 'steps' in params in input_data; use one of "),
        (payload(data=["p"], parameters={"guidance": 7}), "unknown parameter 'guidance' in parameters in input_data; "),
        (payload(data=["p"], parameters={"prompt": "q"}), "unknown parameter 'prompt'"),
        (payload(data=["p"], parameters={"seed": 1}, params={"seed": 1}), "the request has the parameter 'seed' twice"),
        (payload(data=["p"], parameter={"seed": 1}), "unknown key 'parameter' in input_data; did you mean 'para"),
        ('{"input_data": {"data": ["p"]}, "param": {}}', "unknown key 'param' in the request; did you mean 'params'?"),
        (payload(columns=["prompt", "seed"], data=[["p"]]),
         "element 0 of data has 1 cell, but the number of columns is 2; send null for a cell without a value"),
        (payload(columns=["text"], data=["p"]), "there is no column 'prompt' in input_data, which has 'text'"),
        (payload(data=[{"text": "p"}, {}]), "there is no column 'prompt' in input_data, which has 'text'"),
    ],
)  # fmt: skip
def test_a_malformed_request_is_refused_with_one_sentence(text: str | bytes, sentence: str) -> None:
    with pytest.raises(TableError) as caught:
        read_payload(text)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_ignored() -> None:
    text = "\ufeff" + payload(data=["p"])
    assert read_payload(text) == read_payload(text.encode()) == ([{"prompt": "p"}], {})
