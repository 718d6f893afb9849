"""The scoring script of an Azure ML batch endpoint: tables of prompts in, images and a row per image out.

Azure calls `init` once per worker process, and `run` with the paths of some files at a time. Settings are environment
variables of the deployment: those of `batch-infer run` (BATCH_INFER_STEPS=30 is --steps 30), and
BATCH_INFER_PREDICTIONS=card for the five columns of the model catalog's deployments. By default, rows have the columns
of results.* and, last, `carried`: a JSON object of the table's other columns. The model is in AZUREML_MODEL_DIR. Images
and the manifest are written to AZUREML_BI_OUTPUT_PATH, where `batch-infer merge` writes results.*.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast, get_args

from batch_infer.azureml.deployment import find_deployment
from batch_infer.azureml.mini_batch import MiniBatchScorer
from batch_infer.azureml.predictions import Columns, to_predictions
from batch_infer.errors import SettingsError

if TYPE_CHECKING:
    import pandas as pd

_OUT = "AZUREML_BI_OUTPUT_PATH"
_COLUMNS = "BATCH_INFER_PREDICTIONS"
_worker: MiniBatchScorer | None = None


def init() -> None:
    """Load the model. Raises UsageError where a setting is invalid or cannot be satisfied."""
    global _worker
    _read_columns()
    out = os.environ.get(_OUT)
    if not out:
        raise SettingsError(f"{_OUT} is not set: set it to the output folder")
    _worker = MiniBatchScorer(find_deployment(out))


def run(mini_batch: Sequence[str], context: Any = None) -> pd.DataFrame:
    """Return the results of the tables at these paths. Rows with a committed result are not rendered again.

    Invalid and failed rows have results too, and so has a file that cannot be read. Raises TableError where no file
    can be read, ServiceError where a safety service does not answer, StorageError.
    """
    if _worker is None:
        raise RuntimeError("call init() before run()")
    if not isinstance(mini_batch, (list, tuple)) or not all(isinstance(file, str) for file in mini_batch):
        raise SettingsError("a mini-batch is a list of paths: this script scores files, not a tabular dataset")
    return to_predictions(_worker.score(mini_batch), _read_columns())


def shutdown() -> None:
    global _worker
    if _worker is not None:
        _worker.close()
        _worker = None


def _read_columns() -> Columns:
    columns = os.environ.get(_COLUMNS, "full")
    if columns not in get_args(Columns):
        raise SettingsError(f"{_COLUMNS}={columns}: use {' or '.join(get_args(Columns))}")
    return cast(Columns, columns)
