"""A scoring script that calls the pipeline once per prompt in float32, like the model catalog's wrapper.

To compare it with batch-infer on the same rows, model and machine:

    batch-infer azureml-simulate examples/prompts.csv -o theirs --timeout 1h --script examples/azureml/one_by_one.py
    batch-infer azureml-simulate examples/prompts.csv -o ours --timeout 1h

Both commands print rows/s at the end. The variable STEPS sets the denoising steps here, and BATCH_INFER_STEPS in
batch-infer.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pandas as pd
import torch
from diffusers import DiffusionPipeline

from batch_infer.models import DEMO_MODEL

pipeline: DiffusionPipeline


def init() -> None:
    global pipeline
    model = os.environ.get("AZUREML_MODEL_DIR", DEMO_MODEL)
    pipeline = DiffusionPipeline.from_pretrained(model, use_safetensors=True).to(torch.float32)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)


def run(mini_batch: list[str]) -> pd.DataFrame:
    steps = int(os.environ.get("STEPS", "30"))
    rows = []
    for file in mini_batch:
        for number, prompt in enumerate(pd.read_csv(file)["prompt"]):
            output = pipeline(prompt, num_inference_steps=steps)
            name = f"{uuid.uuid4()}.png"
            output.images[0].save(Path(os.environ["AZUREML_BI_OUTPUT_PATH"], name))
            rows.append([number, prompt, name, output.nsfw_content_detected[0], Path(file).name])
    results: pd.DataFrame = pd.DataFrame(rows)
    return results
