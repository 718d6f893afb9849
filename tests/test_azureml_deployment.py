"""Test that examples/azureml is valid for Azure's SDK and consistent with batch-infer."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
import yaml

from batch_infer.azureml import deployment as deployments
from batch_infer.azureml import online
from batch_infer.cli import commands, config, settings_from_environment
from batch_infer.cli.run import run
from batch_infer.errors import SettingsError
from batch_infer.models import DEMO_MODEL
from batch_infer.simulation import SimulationSettings
from tests.pyproject import project
from tests.runs import QUICK

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "azureml"
README = (EXAMPLE / "README.md").read_text("utf-8")
LOCK = (ROOT / "requirements.lock").read_text("utf-8")
SERVER_LOCK = (ROOT / "tools" / "azure-server.lock").read_text("utf-8")
DOCKERFILE = (EXAMPLE / "environment" / "Dockerfile").read_text("utf-8")
PROJECT = project()

SDK = Path(sys.prefix) / "azure-sdk" / "bin" / "python"
SERVER = Path(sys.prefix) / "azure-server"
SPECS = {
    "environment/environment.yml": "load_environment",
    "batch/compute.yml": "load_compute",
    "batch/endpoint.yml": "load_batch_endpoint",
    "batch/deployment.yml": "load_model_batch_deployment",
    "online/endpoint.yml": "load_online_endpoint",
    "online/deployment.yml": "load_online_deployment",
}
DEPLOYMENTS = ("batch", "online")
SAFE = "https://safe.cognitiveservices.azure.com"
ENDPOINT_VARIABLES = set(config.ENDPOINT_VARIABLES)
"""Variables that endpoints read in addition to the options of `run`."""
REPLACED = {"CONTENT_SAFETY_ACCOUNT_NAME", "UAI_CLIENT_ID", "SUBSCRIPTION_ID", "RESOURCE_GROUP_NAME"}
"""Variables of the managed models' samples that batch-infer does not need, according to the README."""

# Runs in the environment with azure-ai-ml. The script prints how Azure's SDK reads each YAML file and script.
SCRIPT = r"""
import contextlib, importlib, io, json, socket, sys
from pathlib import Path

def refuse(*_):
    raise AssertionError("network access")

socket.socket.connect = refuse
import marshmallow
from azure.ai.ml.entities import _load_functions as loaders

example, specs, safe = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
report = {"loaded": {}, "refused": {}, "default": {}, "safe": {}}
for name, loader in specs.items():
    load = getattr(loaders, loader)
    report["loaded"][name] = load(example / name)._to_dict()
    report["refused"][name] = []
    for field in ("colour", "settings.colour", "liveness_probe.colour"):
        try:
            load(example / name, params_override=[{field: "red"}])
        except marshmallow.ValidationError as error:
            report["refused"][name] += ["Unknown field" in str(error)]
sys.path.insert(0, str(example))
for kind in ("batch", "online"):
    script = importlib.import_module(f"deploy_{kind}")
    for key, arguments in (("default", []), ("safe", ["--content-safety", safe])):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            script.main(["--dry-run", *arguments])
        report[key][kind] = printed.getvalue()
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Return how Azure's SDK reads the YAML files and both scripts, from one process for all tests."""
    if not SDK.is_file():
        pytest.skip("no environment with azure-ai-ml: make azure")
    process = subprocess.run(
        [SDK, "-c", SCRIPT, EXAMPLE, json.dumps(SPECS), SAFE],
        capture_output=True, text=True, timeout=600, check=False, cwd=ROOT / "tests",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return dict(json.loads(process.stdout))


def spec(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((EXAMPLE / name).read_text("utf-8")))


def variables(kind: str) -> dict[str, str]:
    """Return the environment variables of a deployment's scripts."""
    return variables_of(spec(f"{kind}/deployment.yml"))


def variables_of(deployment: dict[str, Any]) -> dict[str, str]:
    return dict(deployment.get("settings", deployment)["environment_variables"])


def scoring_script(kind: str) -> Path:
    code = spec(f"{kind}/deployment.yml")["code_configuration"]
    return EXAMPLE / kind / str(code["code"]) / str(code["scoring_script"])


def import_script(path: Path) -> ModuleType:
    """Import a script as Azure does."""
    module_spec = importlib.util.spec_from_file_location("score", path)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def test_every_yaml_file_is_tested() -> None:
    specs = {path.relative_to(EXAMPLE).as_posix() for path in EXAMPLE.rglob("*.yml")}
    assert specs == set(SPECS)


def contains(larger: Any, smaller: Any) -> bool:
    """Return whether `larger` has all entries of `smaller`."""
    if isinstance(smaller, dict):
        return isinstance(larger, dict) and all(contains(larger.get(key), value) for key, value in smaller.items())
    return bool(larger == smaller)


@pytest.mark.parametrize("name", SPECS)
def test_azures_sdk_reads_every_key_of_a_yaml_file(report: dict[str, Any], name: str) -> None:
    values = {key: value for key, value in spec(name).items() if key != "$schema"}
    if "build" in values:
        values["build"] = {**values["build"], "path": str(EXAMPLE / "environment")}
    assert contains(report["loaded"][name], values)


@pytest.mark.parametrize("name", SPECS)
def test_azures_sdk_refuses_unknown_keys(report: dict[str, Any], name: str) -> None:
    """This applies to fields at the top level and to nested fields."""
    assert report["refused"][name] == [True, True, True]


def test_references_between_files_match() -> None:
    for kind in DEPLOYMENTS:
        deployment = spec(f"{kind}/deployment.yml")
        assert deployment["endpoint_name"] == spec(f"{kind}/endpoint.yml")["name"]
        assert deployment["environment"] == f"azureml:{spec('environment/environment.yml')['name']}@latest"
        assert f"--name {deployment['model'].split(':')[1].split('@')[0]} " in README
    assert spec("batch/deployment.yml")["compute"] == f"azureml:{spec('batch/compute.yml')['name']}"
    threads = int(variables("online")["GUNICORN_CMD_ARGS"].removeprefix("--threads "))
    assert threads > spec("online/deployment.yml")["request_settings"]["max_concurrent_requests_per_instance"]


def test_the_request_timeout_is_slightly_below_azures() -> None:
    seconds = float(variables("online")[online.TIMEOUT])
    azure_seconds = spec("online/deployment.yml")["request_settings"]["request_timeout_ms"] / 1000
    assert seconds == online.DEFAULT_TIMEOUT
    assert azure_seconds - 20 < seconds < azure_seconds


def with_relative_code_path(deployment: dict[str, Any]) -> dict[str, Any]:
    """Return the deployment with the code path of the YAML file, which is relative to this file."""
    code = deployment["code_configuration"]
    return {**deployment, "code_configuration": {**code, "code": Path(code["code"]).name}}


@pytest.mark.parametrize("kind", DEPLOYMENTS)
def test_the_sdk_script_creates_the_same_as_the_yaml_files(report: dict[str, Any], kind: str) -> None:
    environment, endpoint, deployment = yaml.safe_load_all(report["default"][kind])
    assert environment == report["loaded"]["environment/environment.yml"]
    assert endpoint == report["loaded"][f"{kind}/endpoint.yml"]
    assert Path(deployment["code_configuration"]["code"]) == scoring_script(kind).parent
    assert with_relative_code_path(deployment) == report["loaded"][f"{kind}/deployment.yml"]


@pytest.mark.parametrize("kind", DEPLOYMENTS)
def test_the_sdk_script_enables_content_safety_on_request(report: dict[str, Any], kind: str) -> None:
    *_, deployment = yaml.safe_load_all(report["safe"][kind])
    safety = {"BATCH_INFER_SAFETY": "checker,azure", "CONTENT_SAFETY_ENDPOINT": SAFE}
    assert variables_of(deployment) == {**variables(kind), **safety}


@pytest.mark.parametrize("kind", DEPLOYMENTS)
def test_batch_infer_accepts_the_variables(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables(kind).items():
        assert isinstance(value, str)  # as Azure requires
        monkeypatch.setenv(name, value)
    assert settings_from_environment("table.csv", "out").safety.mode == "auto"


def options_as_variables() -> set[str]:
    return config.variables_of(run)


def texts() -> Iterator[tuple[str, str]]:
    for path in EXAMPLE.rglob("*"):
        if path.suffix in (".md", ".yml", ".yaml", ".py") or path.name == "Dockerfile":
            yield path.relative_to(EXAMPLE).as_posix(), path.read_text("utf-8")


def test_every_variable_of_batch_infer_is_known() -> None:
    read = options_as_variables() | ENDPOINT_VARIABLES
    names = {(name, word) for name, text in texts() for word in re.findall(r"\bBATCH_INFER_[A-Z_]+\b", text)}
    assert len(names) > 8
    assert not {(name, word) for name, word in names if word not in read}


def test_every_other_variable_is_known() -> None:
    sources = [*ROOT.joinpath("batch_infer").rglob("*.py")]
    for folder in (sys.prefix, SERVER):
        site = Path(folder) / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        sources += [site / "azure/identity/_constants.py", site / "gunicorn/config.py"]
        sources += [site / "azureml_inference_server_http/constants.py"]
    read = "\n".join(path.read_text("utf-8") for path in sources if path.is_file())
    pattern = r"\b(?:CONTENT_SAFETY|WORKER|GUNICORN|AZURE|AML|UAI|AZUREML)_[A-Z_]+\b|\bSUBSCRIPTION_ID\b"
    names = {word for name, text in texts() if name != "workspace.py" for word in re.findall(pattern, text)}
    names -= REPLACED | {"AZUREML_CONDA_ENVIRONMENT_PATH"}  # set by the Dockerfile, as in Azure's Dockerfiles
    if not SERVER.is_dir():
        names -= {"GUNICORN_CMD_ARGS", "WORKER_COUNT", "WORKER_TIMEOUT", "AML_APP_ROOT", "AZUREML_ENTRY_SCRIPT"}
    assert {"CONTENT_SAFETY_ENDPOINT", "CONTENT_SAFETY_KEY", "CONTENT_SAFETY_THRESHOLD", "AZURE_CLIENT_ID"} <= names
    assert not {word for word in names if f'"{word}"' not in read and f"'{word}'" not in read}


def test_predictions_have_the_format_of_the_managed_models() -> None:
    settings_file = scoring_script("batch").with_name("parallel_run_step.settings.json")
    settings = json.loads(settings_file.read_text("utf-8"))
    assert settings.keys() == {"append_row"} and settings["append_row"].keys() == {"pandas.DataFrame.to_csv"}
    to_csv = SimulationSettings((), Path("out"), script=scoring_script("batch")).to_csv()
    frame = pd.DataFrame([[0, "a, b", "images/a-0.png", None, "a.csv"]])
    assert frame.to_csv(**to_csv) == '0,"a, b",images/a-0.png,,a.csv\n'


def test_the_image_has_the_dependencies_of_batch_infer() -> None:
    conda = yaml.safe_load((EXAMPLE / "environment" / "conda.yaml").read_text("utf-8"))["dependencies"]
    assert "pip" in conda
    python = next(word.removeprefix("python=") for word in conda if str(word).startswith("python="))
    floor = PROJECT["requires-python"].removeprefix(">=")
    assert tuple(map(int, python.split("."))) >= tuple(map(int, floor.split(".")))
    (from_pip,) = (entry["pip"] for entry in conda if isinstance(entry, dict))
    pinned = [word for word in from_pip if "inference-server" in word]
    assert pinned == re.findall(r"azureml-inference-server-http==\S+", SERVER_LOCK)
    assert re.findall(r"^ARG TORCH=(.*)$", DOCKERFILE, re.MULTILINE) == re.findall(
        r"^torch==[^ ;]+", LOCK, re.MULTILINE
    )
    (extras,) = re.findall(r"batch_infer-\*\.whl \| tail -1\)\[([a-z,-]+)\]", DOCKERFILE)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    for source in re.findall(r"^COPY (\S+)", DOCKERFILE, re.MULTILINE):
        assert "*" in source or (EXAMPLE / "environment" / source).is_file()


def test_the_batch_script_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = sorted(map(str, (EXAMPLE / "batch" / "prompts").iterdir()))
    small = {**variables("batch"), "AZUREML_BI_OUTPUT_PATH": str(tmp_path), **quick()}
    for name, value in small.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AZUREML_MODEL_DIR", raising=False)
    script = import_script(scoring_script("batch"))
    script.init()
    try:
        frame = script.run(prompts)
    finally:
        script.shutdown()
    assert list(frame.columns) == [
        "row_number_per_file", "prompt", "generated_image", "nsfw_content_detected", "input_file_name",
    ]  # fmt: skip
    assert len(frame) == 7
    assert all((tmp_path / name).is_file() for name in frame["generated_image"])  # no row is invalid


def test_the_online_script_scores_the_sample_request(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**variables("online"), **quick()}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AZUREML_MODEL_DIR", raising=False)
    script = import_script(scoring_script("online"))
    try:
        script.init()
        (row,) = script.run((EXAMPLE / "online" / "sample_request.json").read_text("utf-8"))
    finally:
        online._load_service().close()
        online._load_service.cache_clear()  # so that other tests in this process do not use these settings
    assert list(row) == ["prompt", "generated_image", "nsfw_content_detected"]
    assert base64.b64decode(row["generated_image"], validate=True).startswith(b"\x89PNG")


def quick() -> dict[str, str]:
    """Return the options of quick runs as variables."""
    words = [word for word in QUICK if word != "--num-processes"][:-1]
    pairs = zip(words[::2], words[1::2], strict=True)
    options = {f"BATCH_INFER_{flag.removeprefix('--').replace('-', '_').upper()}": value for flag, value in pairs}
    return {**options, "BATCH_INFER_STEPS": "2"}


LOG_SCRIPT = """
import sys
from batch_infer.azureml.deployment import read_deployment
read_deployment(sys.argv[1])
"""


def test_the_log_has_the_requested_format_and_names_ignored_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**quick(), "BATCH_INFER_LOG_FORMAT": "json", "BATCH_INFER_TIME_LIMIT": "1h"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BATCH_INFER_RESULTS", "csv")
    monkeypatch.delenv("AZUREML_MODEL_DIR", raising=False)
    command: list[str | Path] = [sys.executable, "-c", LOG_SCRIPT, tmp_path / "out"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, cwd=ROOT)
    # OpenMP may log before batch-infer runs.
    entry = json.loads(next(line for line in process.stderr.splitlines() if line.startswith("{")))
    message = "BATCH_INFER_RESULTS, BATCH_INFER_TIME_LIMIT: ignored in an endpoint"
    assert (entry["level"], entry["message"]) == ("WARNING", message)


def test_every_ignored_variable_is_an_option() -> None:
    assert set(deployments.IGNORED) <= options_as_variables()


def test_ignored_variables_are_not_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nonsense = dict.fromkeys(deployments.IGNORED, "nonsense")
    for name, value in {**nonsense, "BATCH_INFER_STEPS": "7"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "job.toml").write_text('time-limit = "nonsense"\nmax-failed = "nonsense"\nheight = 128\n')
    monkeypatch.setenv("BATCH_INFER_CONFIG", str(tmp_path / "job.toml"))
    settings = settings_from_environment("-", "out", deployments.IGNORED)
    assert (settings.defaults.num_inference_steps, settings.defaults.height, settings.out) == (7, 128, "out")
    assert (settings.output.results, settings.max_failed.count, settings.price_per_hour) == ((), 0, None)


def test_an_unknown_variable_fails_the_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *ENDPOINT_VARIABLES,
        "BATCH_INFER_SERVICE_HOST",
        "BATCH_INFER_PORT_80_TCP_ADDR",
    ):  # Kubernetes sets the last one
        monkeypatch.setenv(name, "1")
    settings_from_environment("-", "out", deployments.IGNORED)
    monkeypatch.setenv("BATCH_INFER_STEP", "30")
    with pytest.raises(SettingsError, match=r"BATCH_INFER_STEP: did you mean BATCH_INFER_STEPS\?"):
        settings_from_environment("-", "out", deployments.IGNORED)


def test_a_folder_on_a_lower_level_takes_precedence_over_a_file(tmp_path: Path) -> None:
    """The file may be a LoRA."""
    (tmp_path / "lora.safetensors").touch()
    assert deployments.find_model_path(tmp_path) == str(tmp_path / "lora.safetensors")
    (tmp_path / "mlflow" / "artifacts").mkdir(parents=True)
    (tmp_path / "mlflow" / "artifacts" / "model").symlink_to(DEMO_MODEL)
    assert deployments.find_model_path(tmp_path) == str(tmp_path / "mlflow" / "artifacts" / "model")


LINES = re.findall(
    r'^    (?:[A-Z_]+=(?:"[^"]*"|\S+) )?((?:batch-infer|python|az|azmlinfsrv|curl) .*?)(?: {2,}#.*)?$', README, re.M
)


def test_the_readme_has_commands() -> None:
    assert {shlex.split(line)[0] for line in LINES} == {"batch-infer", "python", "az", "azmlinfsrv", "curl"}


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("batch-infer ")])
def test_every_command_of_the_readme_is_valid(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    with commands.commands[name].make_context(name, arguments):
        pass


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("python ")])
def test_every_option_of_the_scripts_in_the_readme_exists(line: str) -> None:
    script, *words = shlex.split(line)[1:]
    text = (ROOT / script).read_text("utf-8") + (EXAMPLE / "workspace.py").read_text("utf-8")
    assert all(f'"{word}"' in text for word in words if word.startswith("--"))


def test_every_file_in_the_readme_exists() -> None:
    named = set(re.findall(r"examples/azureml/[\w./-]+", README))
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_setting_in_the_readme_exists() -> None:
    """A misspelt path would be added to the deployment without an error."""
    for kind in DEPLOYMENTS:
        (line,) = [line for line in LINES if f"{kind}/deployment.yml" in line and "CONTENT_SAFETY_ENDPOINT" in line]
        for path, _ in (word.split("=", 1) for word in shlex.split(line.split("--set ")[-1])):
            values: Any = spec(f"{kind}/deployment.yml")
            for key in path.split(".")[:-1]:
                values = values[key]
            assert "BATCH_INFER_SAFETY" in values


def test_links_of_the_readme_are_valid() -> None:
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]*)\)", README):
        assert target.removeprefix("#") in anchors if target.startswith("#") else (EXAMPLE / target).exists()


def test_azures_tools_upload_the_wheel() -> None:
    """Azure's tools do not upload files that a .gitignore next to them names."""
    assert not (EXAMPLE / "environment" / ".gitignore").exists()
