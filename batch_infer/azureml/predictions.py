"""Results as the DataFrame that Azure ML appends to predictions.csv."""

from __future__ import annotations

from typing import Any, Literal

import pandas as pd
import pyarrow as pa

from batch_infer.carried import to_python_values
from batch_infer.jobs import shorten_float32, to_json
from batch_infer.manifest import SCHEMA

Columns = Literal["full", "card"]
BLOCKED = "Blocked By Azure AI Content Safety"
"""What the model catalog's samples write instead of an image path."""

_KINDS = {
    pa.string(): pd.StringDtype(),
    pa.bool_(): pd.BooleanDtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.float32(): pd.Float32Dtype(),
}
"""pandas types with a null. Without them, whole numbers would become floats in a column with a missing one."""


def to_predictions(results: pa.Table, columns: Columns) -> pd.DataFrame:
    """Return a row per result. `full`: the columns of results.*. `card`: the five of the model catalog's deployments.

    Azure appends the rows of all mini-batches without a header, so `full` has the same columns for all tables: carried
    columns are in the last one, `carried`, as a JSON object. The five columns are row_number_per_file, prompt,
    generated_image (a path relative to predictions.csv), nsfw_content_detected and input_file_name.
    """
    results = _as_card(results) if columns == "card" else _with_carried_together(results)
    for k, field in enumerate(results.schema):
        if pa.types.is_nested(field.type):  # as text, as in results.csv
            texts = [None if value is None else _text(value, field.type) for value in results[field.name].to_pylist()]
            results = results.set_column(k, field.name, pa.array(texts, pa.string()))
    frame: pd.DataFrame = results.to_pandas(types_mapper=_KINDS.get)
    return frame


def _with_carried_together(results: pa.Table) -> pa.Table:
    names = [name for name in results.column_names if name not in SCHEMA.names]
    # Arrow has no row count where there is no column.
    cells = zip(*(to_python_values(results[name]) for name in names), strict=True)
    texts = [to_json(dict(zip(names, row, strict=True))) for row in cells] if names else ["{}"] * len(results)
    return results.select(SCHEMA.names).append_column("carried", pa.array(texts, pa.string()))


def _as_card(results: pa.Table) -> pa.Table:
    images = [
        BLOCKED if status == "blocked" else path
        for status, path in zip(results["status"].to_pylist(), results["generated_image"].to_pylist(), strict=True)
    ]
    columns = {
        "row_number_per_file": results["source_row"],
        "prompt": results["prompt"],
        "generated_image": pa.array(images, pa.string()),
        "nsfw_content_detected": results["nsfw_content_detected"],
        "input_file_name": results["source_file"],
    }
    return pa.table(columns)


def _text(value: Any, kind: pa.DataType) -> str:
    return to_json({name: shorten_float32(score) for name, score in value} if pa.types.is_map(kind) else value)
