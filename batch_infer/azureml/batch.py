"""The scoring script of an Azure ML batch endpoint: tables of prompts in, images and a row for each prompt out.

Azure calls `init` once in each worker process, and `run` with the paths of some files at a time. Settings are
environment variables of the deployment: those of `batch-infer run` (BATCH_INFER_STEPS=30 is --steps 30), and
BATCH_INFER_PREDICTIONS=card for the five columns of the model catalog's deployments in the place of all. All are those
of results.*, and as the last one `carried`, a JSON object of the table's other columns. The model is
AZUREML_MODEL_DIR's; images and the manifest go below AZUREML_BI_OUTPUT_PATH, where `batch-infer merge` makes results
of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast, get_args

from batch_infer.azureml.deployment import find_deployment
from batch_infer.azureml.mini_batch import MiniBatches
from batch_infer.azureml.predictions import Columns, to_predictions
from batch_infer.errors import SettingsError

if TYPE_CHECKING:
    import pandas as pd

_OUT = "AZUREML_BI_OUTPUT_PATH"
_COLUMNS = "BATCH_INFER_PREDICTIONS"
_worker: MiniBatches | None = None


def init() -> None:
    """Load the model. Raises UsageError where the environment asks for what cannot be had."""
    global _worker
    _columns()
    out = os.environ.get(_OUT)
    if not out:
        raise SettingsError(f"{_OUT} is not set: it is the folder of the endpoint's output")
    _worker = MiniBatches(find_deployment(out))


def run(mini_batch: Sequence[str], context: Any = None) -> pd.DataFrame:
    """Score the tables at these paths; what of them is done already is not rendered again.

    Rows that are invalid or failed are rows that say so, and so is a file that cannot be read. Raises TableError where
    none of the files can be read, ServiceError where a safety service gives no answer, StorageError.
    """
    if _worker is None:
        raise RuntimeError("init() comes before run()")
    if not isinstance(mini_batch, (list, tuple)) or not all(isinstance(file, str) for file in mini_batch):
        raise SettingsError("a mini-batch is a list of paths: this script scores files, not a tabular dataset")
    return to_predictions(_worker.score(mini_batch), _columns())


def shutdown() -> None:
    global _worker
    if _worker is not None:
        _worker.close()
        _worker = None


def _columns() -> Columns:
    found = os.environ.get(_COLUMNS, "full")
    if found not in get_args(Columns):
        raise SettingsError(f"{_COLUMNS}={found}: say {' or '.join(get_args(Columns))}")
    return cast(Columns, found)
