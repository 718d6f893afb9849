"""Test `batch-infer export-mlflow`: MLflow itself loads the exported folder and scores with it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from batch_infer.cli.azureml import export_mlflow
from batch_infer.errors import SettingsError
from batch_infer.models import DEMO_MODEL
from tests.pyproject import project

pytestmark = pytest.mark.promises

ROOT = Path(__file__).parent.parent
SDK = Path(sys.prefix) / "azure-sdk" / "bin" / "python"
CARD = {"prompt": "string", "generated_image": "string", "nsfw_content_detected": "boolean"}
ERROR = {"error": "string"}
PARAMS = {
    **{"num_inference_steps": "long", "guidance_scale": "double", "height": "long", "width": "long"},
    **{"seed": "long", "negative_prompt": "string"},
}

# Runs in the environment with mlflow. The script exports with the tested batch-infer, unloads it, and lets MLflow load
# the exported model, which contains batch-infer's code. One process does all this, because importing torch is slow.
SCRIPT = r"""
import json, os, signal, subprocess, sys, threading, time
from pathlib import Path

root, folder, linked = sys.argv[1:4]
sys.path.insert(0, root)
from batch_infer.cli.azureml import export_mlflow
from batch_infer.errors import StoppedError, SettingsError

def export(*arguments):
    return export_mlflow.main([*arguments, "-q", "--device", "cpu"], standalone_mode=False)

from batch_infer.store import host_id

dead_process = subprocess.Popen([sys.executable, "-c", ""])
dead_process.wait()
killed = Path(folder).parent / f".tmp-{host_id()}-{dead_process.pid}-0123456789ab-{Path(folder).name}"
running = Path(folder).parent / f".tmp-{host_id()}-{os.getppid()}-0123456789ab-{Path(folder).name}"
for partial in (killed, running):
    (partial / "model").mkdir(parents=True)

options = ["--model", linked, "--scheduler", "DDIMScheduler:clip_sample=false", "--no-compile"]
codes = [export(folder, "--threads", "1", "--slots", "4"), export(folder + "-linked", *options)]
report = {"codes": codes, "partial_exist": [killed.exists(), running.exists()]}
(running / "model").rmdir()
running.rmdir()
try:
    export(folder)
except SettingsError as error:
    report["second_export"] = str(error)

def stop_while_writing():
    while not list(Path(folder).parent.glob(".tmp-*")):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=stop_while_writing).start()
try:
    export(folder + "-stopped")
except StoppedError:
    report["stopped"] = True

sys.path.remove(root)
for name in [name for name in sys.modules if name.split(".")[0] == "batch_infer"]:
    del sys.modules[name]
import mlflow
import pandas as pd

model = mlflow.pyfunc.load_model(folder)
import batch_infer

def predict(prompts, **params):
    table = model.predict(pd.DataFrame({"prompt": prompts}), params={"num_inference_steps": 2, **params})
    return json.loads(table.to_json(orient="records"))

def get_refusal(table, params=None):
    try:
        model.predict(table, params=params)
    except mlflow.exceptions.MlflowException as error:
        return str(error)

report["code"] = batch_infer.__file__
report["rows"] = predict(["a large red circle", "a small blue star"], seed=5, guidance_scale=2.5)
report["repeated_rows"] = predict(["a small blue star"], seed=5, guidance_scale=2.5)
report["other"] = predict(["a small blue star"], seed=6, guidance_scale=2.5, negative_prompt="green", width=80)
report["bad"] = predict(["a small blue star", ""])
report["refusals"] = [
    get_refusal(pd.DataFrame({"text": ["a"]})),
    get_refusal(pd.DataFrame({"prompt": [3]})),
    get_refusal(pd.DataFrame({"prompt": ["a"]}), {"num_inference_steps": "two"}),
]
report["variables"] = [name for name in os.environ if name.startswith("BATCH_INFER_")]
out = Path(folder + "-out")
out.mkdir()
os.environ["AZUREML_BI_OUTPUT_PATH"] = str(out)
report["files"] = [predict(["a large red circle"], seed=5), predict(["a large red circle"], seed=5), predict([""])]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow") / "model"


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    """Return the report of a process that exports two models and lets MLflow score with one of them."""
    if not SDK.is_file():
        pytest.skip("no environment with mlflow: make azure")
    linked = folder.with_name("as-in-a-cache")
    for file in (path for path in DEMO_MODEL.rglob("*") if path.is_file()):
        link = linked / file.relative_to(DEMO_MODEL)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("BATCH_INFER_", "PYTEST"))}
    process = subprocess.run(
        [SDK, "-c", SCRIPT, ROOT, folder, linked], capture_output=True, text=True, timeout=600, check=False,
        cwd=folder.parent, env=variables,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return dict(json.loads(process.stdout.splitlines()[-1]))


def read_mlmodel(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "MLmodel").read_text("utf-8")))


def open_image(row: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(row["generated_image"], validate=True)))


def test_a_model_has_the_signature_of_the_managed_ones(report: dict[str, Any], folder: Path) -> None:
    signature = {key: json.loads(text) for key, text in read_mlmodel(folder)["signature"].items()}
    columns = {key: {entry["name"]: entry["type"] for entry in entries} for key, entries in signature.items()}
    assert columns == {"inputs": {"prompt": "string"}, "outputs": CARD | ERROR, "params": PARAMS}
    assert {entry["default"] for entry in signature["params"]} == {None}
    example = json.loads((folder / "input_example.json").read_text("utf-8"))
    assert example == {"columns": ["prompt"], "data": [["A photo of an astronaut riding a horse on Mars"]]}


def test_a_model_contains_its_files_and_code_and_no_pickle(report: dict[str, Any], folder: Path) -> None:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert "artifacts/demo_model/model_index.json" in files
    assert not [file for file in files if file.startswith("code/batch_infer/demo_model") or "__pycache__" in file]
    assert not [file for file in files if file.endswith((".pkl", ".bin", ".pt"))]
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    assert report["codes"] == [0, 0]
    assert report["partial_exist"] == [False, True], "only files of dead processes are removed"
    assert report["code"] == str(folder / "code" / "batch_infer" / "__init__.py")
    assert {path.name for path in folder.parent.iterdir()} == {"model", "model-linked", "model-out", "as-in-a-cache"}


def test_a_model_has_the_requirements_of_batch_infer(report: dict[str, Any], folder: Path) -> None:
    """They do not conflict with the requirements of MLflow."""
    metadata = project()
    dependencies = metadata["dependencies"] + metadata["optional-dependencies"]["azure"]
    lines = (folder / "requirements.txt").read_text("utf-8").splitlines()
    names = {re.split("[^a-z-]", line)[0] for line in lines}
    assert names == {re.split("[^a-z-]", line)[0] for line in dependencies} | {"mlflow"}
    assert {re.split("[^a-z-]", line)[0] for line in lines if "==" in line} == {
        "mlflow", "torch", "diffusers", "transformers",
    }  # fmt: skip
    assert not [line for line in lines if "+" in line]


def test_options_are_stored_with_the_model(report: dict[str, Any], folder: Path) -> None:
    config = read_mlmodel(folder)["flavors"]["python_function"]["config"]["variables"]
    assert config == {
        **{"BATCH_INFER_MODEL": "{model}", "BATCH_INFER_DEVICE": "cpu"},
        **{"BATCH_INFER_THREADS": "1", "BATCH_INFER_SLOTS": "4"},
    }
    other = read_mlmodel(folder.with_name("model-linked"))["flavors"]["python_function"]["config"]["variables"]
    assert other["BATCH_INFER_SCHEDULER"] == "DDIMScheduler:clip_sample=false"
    assert other["BATCH_INFER_COMPILE"] == "false"
    assert (folder.with_name("model-linked") / "artifacts" / "as-in-a-cache" / "model_index.json").is_file()


def test_rows_are_scored(report: dict[str, Any]) -> None:
    rows = report["rows"]
    assert [row["prompt"] for row in rows] == ["a large red circle", "a small blue star"]
    for row in rows:
        assert list(row) == list(CARD)
        assert row["nsfw_content_detected"] in (True, False)
        assert open_image(row).size == (64, 64)


def test_parameters_of_the_call_are_used(report: dict[str, Any]) -> None:
    (first,), (other,) = report["repeated_rows"], report["other"]
    assert first == report["rows"][1]  # it does not depend on the other rows
    assert open_image(other).size == (80, 64)
    text = open_image(other).text["parameters"]  # type: ignore[attr-defined]
    assert "Steps: 2" in text and "Seed: 6" in text and "Negative prompt: green" in text


def test_a_row_without_an_image_has_an_error(report: dict[str, Any]) -> None:
    good, bad = report["bad"]
    assert open_image(good) and good["error"] is None
    assert bad["generated_image"] is None and "empty" in bad["error"]


def test_the_signature_is_enforced(report: dict[str, Any]) -> None:
    assert all("schema" in text or "Invalid parameters" in text for text in report["refusals"])


def test_loading_does_not_change_the_environment(report: dict[str, Any]) -> None:
    assert report["variables"] == []


def test_in_a_batch_endpoint_images_are_files(report: dict[str, Any], folder: Path) -> None:
    (first,), (second,), (bad,) = report["files"]
    assert first == second  # so a retry writes no second file
    assert list(first) == list(bad) == [*CARD, *ERROR]  # since the results of all calls are appended to one file
    assert bad["error"] == "the prompt is empty"
    (file,) = folder.with_name("model-out").iterdir()
    assert first["generated_image"] == file.name
    assert file.stem == hashlib.sha256(file.read_bytes()).hexdigest()[:32]


def test_a_stopped_export_leaves_no_files(report: dict[str, Any], folder: Path) -> None:
    assert report["stopped"]
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".") or path.name.endswith("-stopped")]


def test_existing_files_are_not_overwritten(report: dict[str, Any], folder: Path) -> None:
    assert report["second_export"] == f"{folder} already exists; name a folder that is new or empty"


def test_missing_mlflow_is_reported_with_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[export_mlflow.callback.__module__]  # the module attribute of this name is the command
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install mlflow-skinny"):
        export_mlflow.main([str(tmp_path / "model"), "-q"], standalone_mode=False)
