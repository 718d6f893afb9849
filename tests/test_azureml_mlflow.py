"""`batch-infer export-mlflow`: the exported folder loads and scores in MLflow itself."""

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

# Where mlflow is. It exports with the batch-infer that is tested, forgets it, and has MLflow load what was exported,
# which comes with batch-infer's code. All in one process, because torch takes its time to import.
SCRIPT = r"""
import json, os, signal, subprocess, sys, threading, time
from pathlib import Path

root, folder, linked = sys.argv[1:4]
sys.path.insert(0, root)
from batch_infer.cli.azureml import export_mlflow
from batch_infer.errors import StoppedError, SettingsError

def export(*words):
    return export_mlflow.main([*words, "-q", "--device", "cpu"], standalone_mode=False)

from batch_infer.store import host_id

ended = subprocess.Popen([sys.executable, "-c", ""])
ended.wait()
killed = Path(folder).parent / f".tmp-{host_id()}-{ended.pid}-0123456789ab-{Path(folder).name}"
at_work = Path(folder).parent / f".tmp-{host_id()}-{os.getppid()}-0123456789ab-{Path(folder).name}"
for left in (killed, at_work):
    (left / "model").mkdir(parents=True)

options = ["--model", linked, "--scheduler", "DDIMScheduler:clip_sample=false", "--no-compile"]
codes = [export(folder, "--threads", "1", "--slots", "4"), export(folder + "-linked", *options)]
found = {"codes": codes, "left": [killed.exists(), at_work.exists()]}
(at_work / "model").rmdir()
at_work.rmdir()
try:
    export(folder)
except SettingsError as error:
    found["again"] = str(error)

def end_when_it_writes():
    while not list(Path(folder).parent.glob(".tmp-*")):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_when_it_writes).start()
try:
    export(folder + "-ended")
except StoppedError:
    found["ended"] = True

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

def refusal(table, params=None):
    try:
        model.predict(table, params=params)
    except mlflow.exceptions.MlflowException as error:
        return str(error)

found["code"] = batch_infer.__file__
found["rows"] = predict(["a large red circle", "a small blue star"], seed=5, guidance_scale=2.5)
found["again_rows"] = predict(["a small blue star"], seed=5, guidance_scale=2.5)
found["other"] = predict(["a small blue star"], seed=6, guidance_scale=2.5, negative_prompt="green", width=80)
found["bad"] = predict(["a small blue star", ""])
found["refusals"] = [
    refusal(pd.DataFrame({"text": ["a"]})),
    refusal(pd.DataFrame({"prompt": [3]})),
    refusal(pd.DataFrame({"prompt": ["a"]}), {"num_inference_steps": "two"}),
]
found["kept"] = [name for name in os.environ if name.startswith("BATCH_INFER_")]
out = Path(folder + "-out")
out.mkdir()
os.environ["AZUREML_BI_OUTPUT_PATH"] = str(out)
found["files"] = [predict(["a large red circle"], seed=5), predict(["a large red circle"], seed=5), predict([""])]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow") / "model"


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    """What one process saw that exported two models and had MLflow score with one of them."""
    if not SDK.is_file():
        pytest.skip("mlflow has no environment here: make azure")
    linked = folder.with_name("as-in-a-cache")
    for file in (path for path in DEMO_MODEL.rglob("*") if path.is_file()):
        link = linked / file.relative_to(DEMO_MODEL)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("BATCH_INFER_", "PYTEST"))}
    done = subprocess.run(
        [SDK, "-c", SCRIPT, ROOT, folder, linked], capture_output=True, text=True, timeout=600, check=False,
        cwd=folder.parent, env=variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def flavour(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "MLmodel").read_text("utf-8")))


def picture(row: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(row["generated_image"], validate=True)))


def test_a_model_has_the_signature_of_the_managed_ones(seen: dict[str, Any], folder: Path) -> None:
    signature = {key: json.loads(text) for key, text in flavour(folder)["signature"].items()}
    columns = {key: {entry["name"]: entry["type"] for entry in entries} for key, entries in signature.items()}
    assert columns == {"inputs": {"prompt": "string"}, "outputs": CARD | ERROR, "params": PARAMS}
    assert {entry["default"] for entry in signature["params"]} == {None}
    example = json.loads((folder / "input_example.json").read_text("utf-8"))
    assert example == {"columns": ["prompt"], "data": [["A photo of an astronaut riding a horse on Mars"]]}


def test_a_model_contains_its_files_and_code_and_no_pickle(seen: dict[str, Any], folder: Path) -> None:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert "artifacts/demo_model/model_index.json" in files
    assert not [file for file in files if file.startswith("code/batch_infer/demo_model") or "__pycache__" in file]
    assert not [file for file in files if file.endswith((".pkl", ".bin", ".pt"))]
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    assert seen["codes"] == [0, 0]
    assert seen["left"] == [False, True], "what a killed export left is removed, and what another writes is not"
    assert seen["code"] == str(folder / "code" / "batch_infer" / "__init__.py")
    assert {path.name for path in folder.parent.iterdir()} == {"model", "model-linked", "model-out", "as-in-a-cache"}


def test_a_model_has_the_requirements_of_batch_infer(seen: dict[str, Any], folder: Path) -> None:
    """And does so in a way that does not contradict what MLflow asks for itself."""
    metadata = project()
    dependencies = metadata["dependencies"] + metadata["optional-dependencies"]["azure"]
    lines = (folder / "requirements.txt").read_text("utf-8").splitlines()
    names = {re.split("[^a-z-]", line)[0] for line in lines}
    assert names == {re.split("[^a-z-]", line)[0] for line in dependencies} | {"mlflow"}
    assert {re.split("[^a-z-]", line)[0] for line in lines if "==" in line} == {
        "mlflow", "torch", "diffusers", "transformers",
    }  # fmt: skip
    assert not [line for line in lines if "+" in line]


def test_options_are_stored_with_the_model(seen: dict[str, Any], folder: Path) -> None:
    config = flavour(folder)["flavors"]["python_function"]["config"]["variables"]
    assert config == {
        **{"BATCH_INFER_MODEL": "{model}", "BATCH_INFER_DEVICE": "cpu"},
        **{"BATCH_INFER_THREADS": "1", "BATCH_INFER_SLOTS": "4"},
    }
    other = flavour(folder.with_name("model-linked"))["flavors"]["python_function"]["config"]["variables"]
    assert other["BATCH_INFER_SCHEDULER"] == "DDIMScheduler:clip_sample=false"
    assert other["BATCH_INFER_COMPILE"] == "false"
    assert (folder.with_name("model-linked") / "artifacts" / "as-in-a-cache" / "model_index.json").is_file()


def test_rows_are_scored(seen: dict[str, Any]) -> None:
    rows = seen["rows"]
    assert [row["prompt"] for row in rows] == ["a large red circle", "a small blue star"]
    for row in rows:
        assert list(row) == list(CARD)
        assert row["nsfw_content_detected"] in (True, False)
        assert picture(row).size == (64, 64)


def test_parameters_of_the_call_are_used(seen: dict[str, Any]) -> None:
    (first,), (other,) = seen["again_rows"], seen["other"]
    assert first == seen["rows"][1]  # whoever its neighbours are
    assert picture(other).size == (80, 64)
    text = picture(other).text["parameters"]  # type: ignore[attr-defined]
    assert "Steps: 2" in text and "Seed: 6" in text and "Negative prompt: green" in text


def test_a_row_without_an_image_has_an_error(seen: dict[str, Any]) -> None:
    good, bad = seen["bad"]
    assert picture(good) and good["error"] is None
    assert bad["generated_image"] is None and "empty" in bad["error"]


def test_the_signature_is_enforced(seen: dict[str, Any]) -> None:
    assert all("schema" in text or "Invalid parameters" in text for text in seen["refusals"])


def test_loading_does_not_change_the_environment(seen: dict[str, Any]) -> None:
    assert seen["kept"] == []


def test_in_a_batch_endpoint_images_are_files(seen: dict[str, Any], folder: Path) -> None:
    (first,), (second,), (bad,) = seen["files"]
    assert first == second  # at a retry too
    assert list(first) == list(bad) == [*CARD, *ERROR]  # for what calls return is appended to one file
    assert bad["error"] == "the prompt is empty"
    (file,) = folder.with_name("model-out").iterdir()
    assert first["generated_image"] == file.name
    assert file.stem == hashlib.sha256(file.read_bytes()).hexdigest()[:32]


def test_a_terminated_export_leaves_nothing_behind(seen: dict[str, Any], folder: Path) -> None:
    assert seen["ended"]
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".") or path.name.endswith("-ended")]


def test_existing_files_are_not_overwritten(seen: dict[str, Any], folder: Path) -> None:
    assert seen["again"] == f"{folder} already exists; name a folder that is new or empty"


def test_missing_mlflow_is_reported_with_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[export_mlflow.callback.__module__]  # its name is the command's
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'batch-infer\[mlflow\]'"):
        export_mlflow.main([str(tmp_path / "model"), "-q"], standalone_mode=False)
