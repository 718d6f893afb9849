"""`batch-infer export-mlflow`: write a model as an MLflow folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from batch_infer.cli.options import command, model_options
from batch_infer.cli.report import NOTHING_KEPT, print_result, stoppable
from batch_infer.cli.settings import make_compute_settings, make_model_settings
from batch_infer.errors import SettingsError


@command(click.argument("folder", metavar="DIR", type=click.Path(path_type=Path)), model_options, name="export-mlflow")
def export_mlflow(*, folder: Path, quiet: bool, **options: Any) -> int:
    """Write a model into DIR as an MLflow model, for deployments that need no scoring script.

    DIR gets the model's files, batch-infer itself and a signature. The input is a DataFrame with a column `prompt`,
    the output one with prompt, generated_image (a file in base64), nsfw_content_detected and, for rows without an
    image, error. num_inference_steps, guidance_scale, height, width, seed and negative_prompt are parameters of a
    call. Variables such as BATCH_INFER_SAFETY are read where the model is loaded.

    Exit codes: 0; 2 usage, or DIR exists; 75 interrupted.
    """
    if find_spec("mlflow") is None:
        raise SettingsError("export-mlflow needs mlflow: pip install 'batch-infer[mlflow]'")
    with stoppable(hint=NOTHING_KEPT):
        from batch_infer.jobs import export_model  # imports torch, which takes seconds

        card = export_model(folder.expanduser(), make_model_settings(options), make_compute_settings(options))
    if not quiet:
        print_result([f"{folder}: {card.title}, as an MLflow model"])
    return 0
