"""What an MLflow model of ours runs: a DataFrame of prompts in, one with their images out.

MLflow is not imported here: the code that is packed with a model makes this class one of MLflow's.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pandas as pd

from batch_infer.azureml.deployment import find_deployment
from batch_infer.serving import Service, score_rows
from batch_infer.store import atomic_write

COLUMNS = ("prompt", "generated_image", "nsfw_content_detected")
ERROR = "error"
_OUTPUT = "AZUREML_BI_OUTPUT_PATH"
"""Where a batch endpoint's job writes files."""


class PromptsToImages:
    """Renders the prompts of a DataFrame; rows of one call, and of calls in other threads, are packed."""

    def load_context(self, context: Any) -> None:
        """Load the model. What the environment says beats what was packed. Raises UsageError."""
        nowhere = Path(tempfile.gettempdir(), f"batch-infer-mlflow-{uuid4().hex}")  # nothing is written there
        with _environment(_variables_of(context)):
            self._service = Service(find_deployment(str(nowhere)))

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """A row for each prompt: prompt, generated_image and nsfw_content_detected, None where nobody was asked.

        generated_image is a file in base64; in a batch endpoint's job it is the name of one beside predictions.csv.
        A column `error` says why a row has no image. In a batch endpoint's job it is always there, as what the calls
        return is appended to one file; elsewhere only where a row needs it. Raises ServiceError, StorageError.
        """
        said = {name: value for name, value in (params or {}).items() if value is not None}
        rows = [{**said, "prompt": prompt} for prompt in model_input["prompt"]]
        found = score_rows(rows, self._service)
        folder = os.environ.get(_OUTPUT)
        if folder:
            found = [_stored(row, Path(folder)) for row in found]
        columns = [*COLUMNS, ERROR] if folder or any(ERROR in row for row in found) else [*COLUMNS]
        cells = [[row.get(name) for name in columns] for row in found]
        table: pd.DataFrame = pd.DataFrame(cells, columns=columns, dtype=object)
        return table


def _variables_of(context: Any) -> dict[str, str]:
    """The variables that were packed, with the packed files where they lie now."""
    found = cast("Mapping[str, str]", context.model_config["variables"])
    for name, path in context.artifacts.items():
        found = {key: value.replace(f"{{{name}}}", str(path)) for key, value in found.items()}
    return dict(found)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have these variables for a while, those that nobody has set."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _stored(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The row with its image in a file, whose name follows from what is in it: a retry leaves no second one."""
    if row["generated_image"] is None:
        return row
    content = base64.b64decode(row["generated_image"])
    suffix = ".png" if content.startswith(b"\x89PNG") else ".jpg" if content.startswith(b"\xff\xd8") else ".webp"
    name = hashlib.sha256(content).hexdigest()[:32] + suffix
    with atomic_write(folder / name, parents=False) as temporary:
        temporary.write_bytes(content)
    return {**row, "generated_image": name}
