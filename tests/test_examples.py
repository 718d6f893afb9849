"""Test the scripts under examples/ with small inputs, except those of examples/nightly."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image

from batch_infer.cli.run import run

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_script(*arguments: str | Path, folder: Path | None = None) -> str:
    """Run Python with these arguments, and return its output."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_prompts_are_distinct() -> None:
    with (EXAMPLES / "prompts.csv").open(newline="", encoding="utf-8") as stream:
        prompts = [row["prompt"] for row in csv.DictReader(stream)]
    assert len(prompts) >= 100
    assert len(set(prompts)) == len(prompts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a model for a few steps, to check that every stage runs."""
    folder = tmp_path_factory.mktemp("training")
    run_script(EXAMPLES / "demo_model" / "train.py", "--smoke", "--work", folder / "work", "--out", folder / "model")
    return folder / "model"


@pytest.mark.promises
def test_diffusers_loads_the_trained_checkpoint(trained: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(trained, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a large red circle", num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    assert (trained / "LICENSE").is_file()
    assert sum(file.stat().st_size for file in trained.rglob("*.safetensors")) <= 16_000_000


@pytest.mark.promises
def test_evaluation_writes_accuracy(trained: Path, tmp_path: Path) -> None:
    run_script(
        EXAMPLES / "demo_model" / "evaluate.py", "--model", trained, "--rows", "4", "--steps", "2", "--out", tmp_path
    )
    figures = json.loads((tmp_path / "accuracy.json").read_text())
    assert figures["captions"] == 4
    assert figures["judge_on_drawings"] == 1.0


@pytest.mark.promises
def test_judge_is_right_about_drawings() -> None:
    """The accuracy of the model would be meaningless if the judge made mistakes."""
    share = run_script("-c", "import evaluate; print(evaluate.judge_drawings(400, 3))", folder=EXAMPLES / "demo_model")
    assert float(share) >= 0.99


@pytest.mark.promises
def test_contact_sheet_of_a_run(tmp_path: Path) -> None:
    prompts = EXAMPLES / "prompts.csv"
    run_script("-m", "batch_infer", "run", prompts, "--limit", "3", "--steps", "1", "-q", "-o", tmp_path / "out")
    assert "contact_sheet.png" in run_script(EXAMPLES / "contact_sheet.py", tmp_path / "out")
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 3 * 64


@pytest.mark.promises
def test_local_ray_cluster_renders_prompts(tmp_path: Path) -> None:
    script = EXAMPLES / "ray" / "local_cluster.py"
    assert "6 rows" in run_script(script, "--limit", "6", "--steps", "1", "--out", tmp_path / "out")
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 6


def test_the_ray_job_has_valid_options() -> None:
    job = yaml.safe_load((EXAMPLES / "ray" / "rayjob.yaml").read_text())
    name, subcommand, *arguments = job["spec"]["entrypoint"].split()
    assert (name, subcommand) == ("batch-infer", "run")
    with run.make_context("run", arguments) as context:
        assert context.params["engine"] == "ray"
