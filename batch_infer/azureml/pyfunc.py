"""The code of an exported MLflow model, which renders a DataFrame of prompts to a DataFrame with their images.

This module does not import MLflow. The code that is packaged with a model derives an MLflow class from PromptsToImages.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from batch_infer.azureml.deployment import read_deployment
from batch_infer.serving import Service, score_rows
from batch_infer.store import atomic_write

COLUMNS = ("prompt", "generated_image", "nsfw_content_detected")
ERROR = "error"
_OUTPUT = "AZUREML_BI_OUTPUT_PATH"
"""Variable that contains the output folder of a batch endpoint's job."""


class PromptsToImages:
    """Renders the prompts of a DataFrame. Rows of concurrent calls share denoiser calls."""

    def load_context(self, context: Any) -> None:
        """Load the model. Environment variables override variables packaged with the model. Raises UsageError."""
        variables: dict[str, str] = context.model_config["variables"]
        for name, path in context.artifacts.items():  # values refer to packaged files by `{name}`
            variables = {key: value.replace(f"{{{name}}}", str(path)) for key, value in variables.items()}
        with _default_variables(variables):
            self._service = Service(read_deployment())

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """Return a row per image: prompt, generated_image and nsfw_content_detected (None if no checker ran).

        generated_image is a file in base64 or, in a batch endpoint's job, the name of a file next to predictions.csv.
        The column `error` says why a row has no image. In a batch endpoint's job, which appends all rows to one file,
        the column is always present, otherwise only if a row has an error. Raises StorageError, and the errors of
        `Service.render`.
        """
        parameters = {name: value for name, value in (params or {}).items() if value is not None}
        rows = [{**parameters, "prompt": prompt} for prompt in model_input["prompt"]]
        scored = score_rows(rows, self._service)
        folder = os.environ.get(_OUTPUT)
        if folder:
            scored = [_store_image(row, Path(folder)) for row in scored]
        columns = [*COLUMNS, ERROR] if folder or any(ERROR in row for row in scored) else [*COLUMNS]
        cells = [[row.get(name) for name in columns] for row in scored]
        table: pd.DataFrame = pd.DataFrame(cells, columns=columns, dtype=object)
        return table


@contextmanager
def _default_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Set the environment variables that are not set yet, and unset them again at the end."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _store_image(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write a row's image to a file, if there is one, and return the row with the file name.

    The name is a digest of the content, so that a retry does not write a second file.
    """
    if row["generated_image"] is None:
        return row
    content = base64.b64decode(row["generated_image"])
    suffix = ".png" if content.startswith(b"\x89PNG") else ".jpg" if content.startswith(b"\xff\xd8") else ".webp"
    name = hashlib.sha256(content).hexdigest()[:32] + suffix
    with atomic_write(folder / name, parents=False) as temporary:
        temporary.write_bytes(content)
    return {**row, "generated_image": name}
