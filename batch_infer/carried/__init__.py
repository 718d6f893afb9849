"""Carry column values from tables to results exactly, in a common type or as text.

Between reading and writing, a cell is a plain value: for example, an integer for a date, time, timestamp or duration,
and the storage value for an extension type. Plain values preserve years beyond 9999 and nanoseconds, unlike Python's
own types such as datetime.
"""

from batch_infer.carried.common_types import find_common_type, make_converter, make_result_names
from batch_infer.carried.json_text import format_value, shorten_float32, to_json
from batch_infer.carried.portable import rename_reserved, to_portable, to_portable_type
from batch_infer.carried.result_types import convert_items, to_result_type
from batch_infer.carried.text import Convert, JsonNumber, make_python_reader, to_python_values, to_text
from batch_infer.carried.values import estimate_bytes, to_array, to_result_array, to_values

__all__ = [
    "Convert",
    "JsonNumber",
    "convert_items",
    "estimate_bytes",
    "find_common_type",
    "format_value",
    "make_converter",
    "make_python_reader",
    "make_result_names",
    "rename_reserved",
    "shorten_float32",
    "to_array",
    "to_json",
    "to_portable",
    "to_portable_type",
    "to_python_values",
    "to_result_array",
    "to_result_type",
    "to_text",
    "to_values",
]
