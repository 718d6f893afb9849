"""The scoring script of an Azure ML batch endpoint, which renders tables of prompts and returns their results.

Azure calls `init` once per worker process, and `run` with the paths of a few files at a time. The settings are the
environment variables of `batch-infer run` (BATCH_INFER_STEPS=30 is --steps 30) and BATCH_INFER_PREDICTIONS=card, which
selects the five columns of the model catalog's deployments. By default, results have the same columns as a run's
results.*, but the table's own columns are in the last one, `carried`, as a JSON object. The model is in
AZUREML_MODEL_DIR. Images and the manifest are written to AZUREML_BI_OUTPUT_PATH. `batch-infer merge` writes results.*
to the same folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from batch_infer.azureml.deployment import read_deployment
from batch_infer.azureml.mini_batch import MiniBatchScorer
from batch_infer.carried import shorten_float32, to_json, to_python_values
from batch_infer.errors import SettingsError
from batch_infer.manifest import SCHEMA

BLOCKED = "Blocked By Azure AI Content Safety"
"""Text that the model catalog's samples write instead of the image path of a blocked prompt."""
_OUT = "AZUREML_BI_OUTPUT_PATH"
_COLUMNS = "BATCH_INFER_PREDICTIONS"
_PANDAS_TYPES = {
    pa.string(): pd.StringDtype(),
    pa.bool_(): pd.BooleanDtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.float32(): pd.Float32Dtype(),
}
"""Nullable pandas types. Without them, a missing value would turn a column of integers into floats."""

_worker: MiniBatchScorer | None = None


def init() -> None:
    """Load the model. Raises UsageError, for example if a setting is invalid or not supported, StorageError."""
    global _worker
    _choose_columns()
    out = os.environ.get(_OUT)
    if not out:
        raise SettingsError(f"{_OUT} is not set: set it to the output folder")
    _worker = MiniBatchScorer(read_deployment(out))


def run(mini_batch: Sequence[str], context: Any = None) -> pd.DataFrame:
    """Return the results of the tables at these paths. Finished rows are not rendered again.

    Invalid rows, failed rows and unreadable files have results too. Raises TableError if no file can be read,
    SettingsError if `mini_batch` is not a list of paths or OUT belongs to another deployment, ServiceError if a safety
    service does not answer, StorageError.
    """
    if _worker is None:
        raise RuntimeError("call init() before run()")
    if not isinstance(mini_batch, (list, tuple)) or not all(isinstance(file, str) for file in mini_batch):
        raise SettingsError("a mini-batch is a list of paths: this script scores files, not a tabular dataset")
    select_columns = _choose_columns()
    frame: pd.DataFrame = select_columns(_worker.score(mini_batch)).to_pandas(types_mapper=_PANDAS_TYPES.get)
    return frame


def shutdown() -> None:
    global _worker
    if _worker is not None:
        _worker.close()
        _worker = None


def _choose_columns() -> Callable[[pa.Table], pa.Table]:
    """Return the function that selects the columns of predictions.csv. Raises SettingsError."""
    choices = {"full": _select_full, "card": _select_card}
    choice = os.environ.get(_COLUMNS, "full")
    if choice not in choices:
        raise SettingsError(f"{_COLUMNS}={choice}: use {' or '.join(choices)}")
    return choices[choice]


def _select_card(results: pa.Table) -> pa.Table:
    """Return the columns of the model catalog's deployments. Paths are relative to the folder of predictions.csv."""
    columns = {
        "row_number_per_file": results["source_row"],
        "prompt": results["prompt"],
        "generated_image": pc.if_else(pc.equal(results["status"], "blocked"), BLOCKED, results["generated_image"]),
        "nsfw_content_detected": results["nsfw_content_detected"],
        "input_file_name": results["source_file"],
    }
    return pa.table(columns)


def _select_full(results: pa.Table) -> pa.Table:
    """Return the columns of results.csv, with all carried columns in the last column, `carried`, as a JSON object.

    Azure appends the rows of all mini-batches without a header, so all tables must have the same columns.
    """
    names = [name for name in results.column_names if name not in SCHEMA.names]
    # zip would yield no rows if there were no columns.
    rows = zip(*(to_python_values(results[name]) for name in names), strict=True) if names else [()] * len(results)
    carried = [to_json(dict(zip(names, cells, strict=True))) for cells in rows]
    scores = map(_format_scores, results["safety_scores"].to_pylist())
    results = results.select(SCHEMA.names).append_column("carried", pa.array(carried, pa.string()))
    index = SCHEMA.get_field_index("safety_scores")
    return results.set_column(index, "safety_scores", pa.array(scores, pa.string()))


def _format_scores(scores: list[dict[str, Any]] | None) -> str | None:
    return None if scores is None else to_json({score["category"]: shorten_float32(score["score"]) for score in scores})
