"""The batch endpoint's scoring script: mini-batches of files, however they come, and what is left of them."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from batch_infer.atomic import TEMPORARY, _here
from batch_infer.azureml import batch, deployment
from batch_infer.azureml.mini_batch import MiniBatches
from batch_infer.errors import ServiceError, SettingsError, TableError
from batch_infer.jobs.simulation import Outcome, SimulationSettings, simulate
from batch_infer.manifest import SCHEMA
from batch_infer.models import DEMO_MODEL
from tests import runs
from tests.content_safety_server import KEY, serving, status

ROOT = Path(__file__).parents[1]
QUICK = {"STEPS": "2", "SLOTS": "8", "THREADS": "1", "DEVICE": "cpu", "SAFETY": "none"}
VARIABLES = {f"BATCH_INFER_{name}": value for name, value in QUICK.items()}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The output folder that the environment names, as Azure makes it: not there yet."""
    for name, value in {**VARIABLES, "AZUREML_BI_OUTPUT_PATH": str(tmp_path / "out")}.items():
        monkeypatch.setenv(name, value)
    for name in ("AZUREML_MODEL_DIR", "AZ_BATCHAI_GPU_COUNT_FOUND", "CONTENT_SAFETY_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path / "out"
    batch.shutdown()


def table(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def prompts(path: Path, count: int = 3) -> str:
    return table(path, [{"prompt": f"a red circle, {path.stem} {k}"} for k in range(count)])


def score(*files: str) -> pd.DataFrame:
    """One mini-batch on a worker that has just been started."""
    batch.shutdown()
    batch.init()
    return batch.run(list(files))


def test_a_mini_batch_is_scored_as_a_run_would(tmp_path: Path, out: Path) -> None:
    files = [prompts(tmp_path / "in" / f"part-{k}.csv") for k in range(3)]
    found = score(*files[:2])
    found = pd.concat([found, batch.run(files[2:])])
    assert list(found.columns) == SCHEMA.names
    assert list(found["id"]) == [f"part-{k}-0000000{row}" for k in range(3) for row in range(3)]
    assert set(found["status"]) == {"ok"}
    told = runs.command("status", out).stdout
    assert ": open, started" in told and "9 ok · 0 failed · an endpoint's" in told and "run again" not in told
    assert runs.command("merge", out).code == 0
    assert runs.run(tmp_path / "in", tmp_path / "plain", "--steps", "2", "--safety", "none").code == 0
    assert runs.hashes(out) == runs.hashes(tmp_path / "plain")
    assert [row["generated_image"] for row in runs.results(out)] == list(found["generated_image"])
    runs.assert_whole(out)


def test_all_that_a_file_may_be_becomes_rows(tmp_path: Path, out: Path) -> None:
    """CSV, Parquet and payloads; a file that cannot be read, a row that cannot be rendered, one that is not there."""
    folder = tmp_path / "in"
    good = table(folder / "good.csv", [{"prompt": "a ring", "note": "a"}, {"prompt": "", "note": "b"}])
    pd.DataFrame({"prompt": ["a square"], "num_inference_steps": [1], "note": [7]}).to_parquet(folder / "p.parquet")
    payload = {"input_data": {"columns": ["prompt"], "data": [["a circle"], ["a star"]], "index": [0, 1]}}
    (folder / "payload.json").write_text(json.dumps(payload))
    (folder / "empty.csv").write_bytes(b"")
    (folder / "notes.docx").write_bytes(b"PK")
    names = ("p.parquet", "payload.json", "empty.csv", "notes.docx", "gone.csv")
    found = score(good, *(str(folder / name) for name in names))
    told = {row["id"]: (row["status"], row["error"]) for row in found.to_dict("records")}
    assert [name for name, (state, _) in told.items() if state == "ok"] == [
        "good-00000000", "p-00000000", "payload-00000000", "payload-00000001"
    ]  # fmt: skip
    assert told["good-00000001"] == ("invalid", "the prompt is empty")
    assert told["empty-00000000"] == ("invalid", "empty.csv is empty")
    assert "no such file" in told["gone-00000000"][1]
    assert "unknown ending .docx" in told["notes-00000000"][1]
    assert list(found["note"].dropna().astype(str)) == ["a", "b", "7"]
    assert runs.command("merge", out).code == 0
    assert len(runs.results(out)) == len(found) == 8


def test_a_mini_batch_of_which_nothing_can_be_read_raises_and_is_accounted_for(tmp_path: Path, out: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_bytes(b"")
    batch.init()
    with pytest.raises(TableError, match="bad.csv is empty"):
        batch.run([str(bad)])
    assert runs.command("merge", out).code == 0
    assert [(row["id"], row["status"]) for row in runs.results(out)] == [("bad-00000000", "invalid")]


def test_what_comes_again_is_not_rendered_again(tmp_path: Path, out: Path) -> None:
    """The same mini-batch, one that is cut otherwise, and one that another worker has done."""
    files = [prompts(tmp_path / "in" / f"{name}.csv") for name in "abc"]
    first = score(*files)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    pd.testing.assert_frame_equal(batch.run(files), first)
    assert list(score(*files[1:])["finished_at"]) == list(first["finished_at"])[3:]
    other = MiniBatches(deployment.find_deployment(str(out)))
    new = prompts(tmp_path / "in" / "d.csv")
    done = other.score([new, files[0]])
    other.close()
    assert done["finished_at"].to_pylist()[3:] == list(first["finished_at"])[:3]
    assert list(batch.run([new])["worker"]) == done["worker"].to_pylist()[:3]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    runs.command("merge", out)
    runs.assert_whole(out)


def test_a_worker_that_died_leaves_nothing_behind(tmp_path: Path, out: Path) -> None:
    """Temporary files of processes that are dead are removed where their rows come again; of others they stay."""
    file = prompts(tmp_path / "in" / "a.csv")
    score(file)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (image,) = (out / "images").iterdir()
    left = [folder / f"{TEMPORARY}{_here()}-{dead.pid}-0123-name" for folder in (image, out / "manifest", out)]
    living = image / f"{TEMPORARY}{_here()}-{os.getpid()}-0123-name"
    elsewhere = image / f"{TEMPORARY}00000000-{dead.pid}-0123-name"
    for path in (*left, living, elsewhere):
        path.touch()
    batch.run([file])
    assert [path.exists() for path in (*left, living, elsewhere)] == [False, False, False, True, True]


def test_two_rows_of_one_id_are_two_rows(tmp_path: Path, out: Path) -> None:
    """Ids of tables, of which each mini-batch sees some: the later one has its default id, and says so."""
    folder = tmp_path / "in"
    first = table(folder / "a.csv", [{"id": "x", "prompt": "a ring"}, {"id": "y", "prompt": "a star"}])
    second = table(folder / "b.csv", [{"id": "x", "prompt": "a square"}, {"id": "z", "prompt": "a circle"}])
    score(first)
    found = batch.run([second])
    assert list(found["id"]) == ["b-00000000", "z"]
    assert found["error"][0] == "the id 'x' stands twice"
    again = batch.run([first])
    assert list(again["status"]) == ["ok", "ok"]
    Path(first).unlink()  # renamed, say, and scored into the same folder once more
    assert list(batch.run([second])["status"]) == ["ok", "ok"]


def test_two_files_of_one_stem_would_give_their_rows_the_same_ids(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "in"
    one = prompts(folder / "p.csv")
    (folder / "p.txt").write_text("a ring\n")
    fine = prompts(folder / "q.csv")
    found = score(one, fine)
    assert list(found["status"])[1:] == ["ok"] * 3
    assert (found["id"][0], found["status"][0]) == ("p.csv-00000000", "invalid")
    assert found["error"][0].startswith("p.csv and p.txt would give their rows the same ids (p-00000000, ...)")
    assert batch.run([fine, str(folder / "p.txt")])["id"][3] == "p.txt-00000000"


def test_the_columns_that_users_of_the_catalog_parse(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCH_INFER_PREDICTIONS", "card")
    monkeypatch.setenv("CONTENT_SAFETY_KEY", KEY)
    monkeypatch.setenv("BATCH_INFER_SAFETY", "azure")
    with serving(words={"axe": ("Violence", 4)}) as service:
        monkeypatch.setenv("CONTENT_SAFETY_ENDPOINT", service.endpoint)
        found = score(table(tmp_path / "in.csv", [{"prompt": "a ring"}, {"prompt": "an axe"}]))
    text = found.to_csv(sep=" ", header=False, index=False)
    ring, axe = csv.reader(io.StringIO(text), delimiter=" ")
    assert ring == ["0", "a ring", "images/in-00000/in-00000000-0.png", "False", "in.csv"]
    assert axe == ["1", "an axe", "Blocked By Azure AI Content Safety", "True", "in.csv"]
    assert (out / ring[2]).is_file()


def test_whole_numbers_stay_whole_where_some_are_missing(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCH_INFER_SAFETY", "checker")
    found = score(table(tmp_path / "in.csv", [{"prompt": "a ring", "seed": 5}, {"prompt": "", "seed": 6}]))
    line, _ = csv.reader(io.StringIO(found.to_csv(sep=" ", header=False, index=False)), delimiter=" ")
    told = dict(zip(found.columns, line, strict=True))
    assert (told["seed"], told["height"], told["image_index"]) == ("5", "64", "0")
    assert json.loads(told["safety_scores"])["concept_0"] == round(json.loads(told["safety_scores"])["concept_0"], 3)


def test_a_service_that_is_down_raises_and_the_retry_goes_on(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTENT_SAFETY_KEY", KEY)
    monkeypatch.setenv("BATCH_INFER_SAFETY", "azure")
    file = prompts(tmp_path / "in.csv", 12)
    with serving(faults=lambda asked: status(500) if asked.kind == "image" else None) as service:
        monkeypatch.setenv("CONTENT_SAFETY_ENDPOINT", service.endpoint)
        found = deployment.find_deployment(str(out))
        assert found.settings.safety.service
        safety = replace(found.settings.safety, service=replace(found.settings.safety.service, patience=0.5))
        worker = MiniBatches(replace(found, settings=replace(found.settings, safety=safety)))
        with pytest.raises(ServiceError, match="has not answered"):
            worker.score([file])
        service.script([])
        assert worker.score([file])["status"].to_pylist() == ["ok"] * 12
        worker.close()


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"BATCH_INFER_STEPS": "many"}, "'many' is not a valid integer"),
        ({"BATCH_INFER_SLOTS": "auto"}, "BATCH_INFER_SLOTS=auto: say a number"),
        ({"BATCH_INFER_OVERWRITE": "true"}, "BATCH_INFER_OVERWRITE is set"),
        ({"BATCH_INFER_PREDICTIONS": "five"}, "BATCH_INFER_PREDICTIONS=five: say full or card"),
        ({"BATCH_INFER_SAFETY": "azure"}, "CONTENT_SAFETY_ENDPOINT is not set"),
        ({"AZUREML_BI_OUTPUT_PATH": ""}, "AZUREML_BI_OUTPUT_PATH is not set"),
        ({"AZUREML_MODEL_DIR": "/nowhere"}, "AZUREML_MODEL_DIR=/nowhere is no folder"),
        ({"AZ_BATCHAI_GPU_COUNT_FOUND": "2", "BATCH_INFER_DEVICE": "auto"}, "max_concurrency_per_instance to the GPUs"),
    ],
)
def test_what_cannot_be_had_is_told_by_init(
    out: Path, monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str], told: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=told):
        batch.init()
    assert not out.exists()


def test_another_model_or_policy_on_the_same_output_is_refused(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(prompts(tmp_path / "in.csv"))
    monkeypatch.setenv("BATCH_INFER_SAFETY", "checker")
    with pytest.raises(SettingsError, match="was made with safety"):
        batch.init()


def test_a_mini_batch_is_a_list_of_paths(tmp_path: Path, out: Path) -> None:
    with pytest.raises(RuntimeError, match="init"):
        batch.run(["a.csv"])
    batch.init()
    for wrong in ("a.csv", pd.DataFrame({"prompt": ["a"]}), [1]):
        with pytest.raises(SettingsError, match="a mini-batch is a list of paths"):
            batch.run(wrong)  # type: ignore[arg-type]


def test_a_registered_model_lies_some_folders_down(tmp_path: Path) -> None:
    inner = tmp_path / "1" / "mlflow" / "artifacts"
    inner.mkdir(parents=True)
    with pytest.raises(SettingsError, match="holds no model"):
        deployment.find_model_path(tmp_path)
    (inner / "model").symlink_to(DEMO_MODEL)
    assert deployment.find_model_path(tmp_path) == str(inner / "model")
    assert deployment.find_model_path(inner / "model") == str(inner / "model")
    (inner / "other").symlink_to(DEMO_MODEL)
    with pytest.raises(SettingsError, match="holds several models"):
        deployment.find_model_path(tmp_path)


# As Azure runs it


def simulated(tmp_path: Path, files: int, rows: int, **more: Any) -> Outcome:
    for k in range(files):
        prompts(tmp_path / "in" / f"prompts-{k:02d}.csv", rows)
    settings = SimulationSettings(
        inputs=(tmp_path / "in",), out=tmp_path / "out", environment=VARIABLES, timeout=600, gpus=0, **more
    )
    return simulate(settings)


def assert_accounted_for(tmp_path: Path, count: int) -> None:
    """Every prompt once, after all that was killed and came twice, and the same bytes as by a plain run."""
    out = tmp_path / "out"
    predictions = pd.read_csv(out / "predictions.csv", sep=" ", header=None)
    assert predictions[0].nunique() == count
    assert len(runs.images(out)) == count
    assert not list(out.rglob(f"{TEMPORARY}*"))
    assert runs.command("merge", out).code == 0
    runs.assert_whole(out)
    assert runs.run(tmp_path / "in", tmp_path / "plain", "--steps", "2", "--safety", "none").code == 0
    assert runs.hashes(out) == runs.hashes(tmp_path / "plain")
    assert len(runs.hashes(out)) == count


def test_workers_that_are_killed_and_deliveries_that_come_twice(tmp_path: Path) -> None:
    outcome = simulated(tmp_path, 6, 4, workers=2, mini_batch_size=2, kill=0.34, duplicate=0.34, seed=1)
    assert (outcome.kills, outcome.duplicates, outcome.failed_files) == (1, 1, 0)
    assert_accounted_for(tmp_path, 24)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_thousand_prompts_in_forty_files(tmp_path: Path, seed: int) -> None:
    outcome = simulated(tmp_path, 40, 25, workers=3, mini_batch_size=3, kill=0.2, duplicate=0.1, seed=seed)
    assert outcome.kills >= 2 and outcome.duplicates >= 1 and outcome.failed_files == 0
    assert_accounted_for(tmp_path, 1000)


def test_the_script_to_compare_with_renders_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZUREML_BI_OUTPUT_PATH", str(tmp_path))
    monkeypatch.setenv("STEPS", "1")
    spec = importlib.util.spec_from_file_location("one_by_one", ROOT / "examples" / "azureml" / "one_by_one.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.init()
    found = script.run([prompts(tmp_path / "in.csv", 2)])
    assert [(tmp_path / name).is_file() for name in found[2]] == [True, True]
