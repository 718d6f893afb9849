"""Test the simulated batch endpoint with scripts that succeed, fail, hang and crash."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_infer.errors import SettingsError, TableError
from batch_infer.simulation import DEFAULT_SCRIPT, SimulationOutcome, SimulationSettings, job, simulate
from batch_infer.simulation.process import find_gpus
from batch_infer.simulation.schedule import KillSchedule, MiniBatch
from tests import runs
from tests.deaths import eventually, is_alive

NOTES = """
import os, sys, time
from pathlib import Path

OUT = Path(os.environ["AZUREML_BI_OUTPUT_PATH"])

def note(name, *words):
    with (OUT / name).open("a") as file:
        print(*words, file=file)

def contains(name, word):
    path = OUT / name
    return path.exists() and word in path.read_text().split()

def init():
    note("inits", os.getpid())

def meet(workers):  # waits until this many workers have called it at least as often as this one
    note("meetings", os.getpid())
    while True:
        pids = (OUT / "meetings").read_text().split()
        often = pids.count(str(os.getpid()))
        if len([pid for pid in set(pids) if pids.count(pid) >= often]) >= workers:
            return
        time.sleep(0.01)
"""
"""The first part of each script. Scripts report to the tests through files in OUT."""
NAMES = """
def run(mini_batch):
    return [Path(path).name for path in mini_batch]
"""


def write_script(folder: Path, body: str, name: str = "score.py") -> Path:
    path = folder / name
    path.write_text(NOTES + textwrap.dedent(body))
    return path


def write_files(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:02}.csv").write_text(f"prompt\nnumber {index}\n")
    return folder


def run(folder: Path, body: str, *, files: int = 4, **settings: Any) -> SimulationOutcome:
    """Run a job on a machine without GPUs. By default, every file is a mini-batch, and no mini-batch times out."""
    inputs, script = write_files(folder / "in", files), write_script(folder, body)
    rest = {"mini_batch_size": 1, "gpus": 0, "timeout": 600, **settings}
    return simulate(SimulationSettings((inputs,), folder / "out", script, **rest))


def notes(folder: Path, name: str) -> list[str]:
    path = folder / "out" / name
    return path.read_text().splitlines() if path.exists() else []


def predictions(folder: Path) -> list[str]:
    return notes(folder, "predictions.csv")


def worker_log(folder: Path, index: int = 0) -> str:
    return (folder / "out" / "logs" / "azureml" / f"worker-{index}.log").read_text()


# Files and mini-batches


def test_the_default_script_exists() -> None:
    assert DEFAULT_SCRIPT.is_file()


def test_mini_batches_have_absolute_paths_of_files_directly_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
    def run(mini_batch):
        note("runs", *mini_batch)
        return [Path(path).read_text().split()[-1] for path in mini_batch]
    """
    monkeypatch.chdir(tmp_path)
    folder = write_files(Path("in"), 7)
    named = write_files(folder / "nested", 2) / "01.csv"
    named = named.rename(named.with_name("other.csv"))
    settings = SimulationSettings((folder, named, named), Path("out"), write_script(Path(), body), mini_batch_size=3)
    outcome = simulate(settings)
    batches = [line.split() for line in notes(tmp_path, "runs")]
    files = [path for batch in batches for path in batch]
    assert sorted(map(len, batches)) == [2, 3, 3]
    assert sorted(files) == sorted(str(tmp_path / path) for path in [*folder.glob("*.csv"), named])
    assert files != sorted(files)
    assert sorted(predictions(tmp_path)) == sorted([*map(str, range(7)), "1"])
    assert (outcome.fault, outcome.mini_batches, outcome.files, outcome.succeeded, outcome.rows) == (None, 3, 8, 3, 8)
    assert (outcome.deliveries, outcome.retries, outcome.failed_files) == (3, 0, 0)


def test_two_files_with_the_same_name_are_refused(tmp_path: Path) -> None:
    inputs = tuple(write_files(tmp_path / name, 1) for name in "ab")
    with pytest.raises(TableError, match="a/00.csv and .*b/00.csv have the same name"):
        simulate(SimulationSettings(inputs, tmp_path / "out", write_script(tmp_path, NAMES)))


def test_the_seed_determines_the_order(tmp_path: Path) -> None:
    orders = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        run(tmp_path / name, NAMES, files=8, mini_batch_size=3, seed=seed)
        orders[name] = predictions(tmp_path / name)
    assert orders["a"] == orders["b"] != orders["c"]


@pytest.mark.parametrize("missing", ["in", "empty", "score.py", "model", "settings.json"])
def test_missing_files_are_reported_before_the_start(tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty").mkdir()
    script = write_script(tmp_path, NAMES, name="other.py" if missing == "score.py" else "score.py")
    (tmp_path / "empty" / "nested").mkdir()
    inputs = tmp_path / missing if missing in ("in", "empty") else write_files(tmp_path / "files", 1)
    settings = SimulationSettings(
        (inputs,),
        tmp_path / "out",
        script.with_name("score.py"),
        model_dir=tmp_path / "model" if missing == "model" else None,
        settings_file=tmp_path / "settings.json" if missing == "settings.json" else None,
    )
    with pytest.raises((SettingsError, TableError), match=missing):
        simulate(settings)
    assert not (tmp_path / "out" / "predictions.csv").exists()


# The environment of a script


def test_a_worker_has_a_temporary_folder_and_a_log(tmp_path: Path) -> None:
    body = """
    def run(mini_batch):
        meet(2)
        note("folders", os.getcwd(), *os.listdir())
        Path("leftover").touch()
        print("written on stdout")
        print("written on stderr", file=sys.stderr)
        return mini_batch
    """
    run(tmp_path, body, workers=2)
    lines = [line.split() for line in notes(tmp_path, "folders")]
    folders = {Path(line[0]) for line in lines}
    assert sorted(line[1:] for line in lines) == [[], [], ["leftover"], ["leftover"]]
    assert len(folders) == 2
    assert all(folder.is_relative_to(tempfile.gettempdir()) and not folder.exists() for folder in folders)
    logs = [worker_log(tmp_path, index) for index in range(2)]
    assert [log.count(f"written on {name}") for log in logs for name in ("stdout", "stderr")] == [2, 2, 2, 2]


def test_a_script_can_import_from_its_folder_and_has_variables_but_no_other_modules(tmp_path: Path) -> None:
    body = """
    import neighbour

    def run(mini_batch):
        note("modules", *sys.modules)
        note("variables", neighbour.NAME, os.environ["AZUREML_MODEL_DIR"], os.environ["MINE"], os.environ["HOME"])
        note("mini_batches", type(mini_batch).__name__)
        return mini_batch
    """
    (tmp_path / "neighbour.py").write_text("NAME = 'next door'")
    (tmp_path / "model").mkdir()
    run(tmp_path, body, files=1, model_dir=tmp_path / "model", environment={"MINE": "here", "HOME": "/x"})
    assert notes(tmp_path, "variables") == [f"next door {tmp_path / 'model'} here /x"]
    assert notes(tmp_path, "mini_batches") == ["list"]
    assert not {"torch", "pandas", "numpy", "click", "pyarrow", "tqdm"} & {*notes(tmp_path, "modules")[0].split()}


def test_modules_of_a_scripts_package_do_not_hide_libraries(tmp_path: Path) -> None:
    for name in ("__init__.py", "uuid.py"):
        (tmp_path / name).touch()
    run(tmp_path, "import uuid\ndef run(mini_batch):\n    return [uuid.NAMESPACE_URL]", files=1)
    assert len(predictions(tmp_path)) == 1


@pytest.mark.parametrize("signature", ["mini_batch, context", "mini_batch, context=None"])
def test_run_gets_a_context_if_it_accepts_one(tmp_path: Path, signature: str) -> None:
    run(tmp_path, f"def run({signature}):\n    return [context.minibatch_index]", files=3)
    assert sorted(predictions(tmp_path)) == ["0", "1", "2"]


def test_shutdown_is_called_once_in_each_worker(tmp_path: Path) -> None:
    body = """
    def run(mini_batch):
        meet(2)
        return mini_batch

    def shutdown():
        note("shutdowns", os.getpid())
    """
    run(tmp_path, body, workers=2)
    assert sorted(notes(tmp_path, "shutdowns")) == sorted(notes(tmp_path, "inits"))


def test_a_failing_shutdown_is_logged_and_the_job_succeeds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outcome = run(tmp_path, NAMES + "\ndef shutdown():\n    raise ValueError('at the end')\n", files=1)
    assert (outcome.fault, outcome.succeeded) == (None, 1)
    assert "worker 0 did not shut down cleanly" in caplog.text
    assert "ValueError: at the end" in worker_log(tmp_path)


GPUS = """
def run(mini_batch):
    seen_gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
    note("gpus", seen_gpus, os.environ["AZ_BATCHAI_GPU_COUNT_FOUND"])
    if Path(mini_batch[0]).name == "00.csv" and not contains("died", "once"):
        note("died", "once")
        note("died_with", seen_gpus)
        os._exit(9)
    while len(set((OUT / "gpus").read_text().split("\\n"))) < 4:  # until all workers have run a mini-batch
        time.sleep(0.01)
    return mini_batch
"""


def test_each_worker_sees_its_gpu_and_surplus_workers_see_no_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    outcome = run(tmp_path, GPUS, files=8, workers=3, gpus=None)
    assert {*notes(tmp_path, "gpus")} == {"5 2", "7 2", "none 2"}
    assert (outcome.deaths, outcome.retries, outcome.failed) == (1, 1, 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert list(find_gpus(3)) == ["0", "1", "2"]


def test_a_replacement_has_the_gpu_of_the_dead_worker(tmp_path: Path) -> None:
    body = GPUS.split("    while")[0] + "    return mini_batch\n"
    run(tmp_path, body, files=3, workers=1, gpus=1)
    assert set(notes(tmp_path, "gpus")) == {"0 1"}
    assert len(notes(tmp_path, "inits")) == 2


def test_gpus_are_counted_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(find_gpus(None)) == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA (UUID: a)'\necho 'GPU 1: NVIDIA (UUID: b)'\n")
    tool.chmod(0o755)
    assert list(find_gpus(None)) == ["0", "1"]


# Results


FRAME = """
import pandas as pd

def run(mini_batch):
    names = [Path(path).stem for path in mini_batch]
    return pd.DataFrame({"name": names, "words": "two words"}, index=names)
"""


def test_a_frame_is_appended_without_a_header(tmp_path: Path) -> None:
    run(tmp_path, FRAME, files=2)
    assert sorted(predictions(tmp_path)) == ['00 "two words"', '01 "two words"']


def test_the_settings_file_next_to_the_script_sets_the_format(tmp_path: Path) -> None:
    arguments = {"sep": ",", "index": True, "header": ["NAME", "WORDS"]}
    text = json.dumps({"append_row": {"pandas.DataFrame.to_csv": arguments}})
    (tmp_path / "parallel_run_step.settings.json").write_text(text)
    run(tmp_path, FRAME, files=2)
    head, *rows = predictions(tmp_path)
    assert (head, sorted(rows)) == (",NAME,WORDS", ["00,00,two words", "01,01,two words"])


def test_a_named_settings_file_overrides_the_one_next_to_the_script(tmp_path: Path) -> None:
    for name, sep in (("parallel_run_step.settings.json", ","), ("other.json", ";")):
        (tmp_path / name).write_text(json.dumps({"append_row": {"pandas.DataFrame.to_csv": {"sep": sep}}}))
    settings = SimulationSettings((), tmp_path, tmp_path / "score.py", settings_file=tmp_path / "other.json")
    assert settings.to_csv() == {"sep": ";", "header": False, "index": False}


@pytest.mark.parametrize("text", ["{", "[]", '{"append_row": 3}', '{"append_row": {"pandas.DataFrame.to_csv": []}}'])
def test_an_invalid_settings_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "parallel_run_step.settings.json").write_text(text)
    with pytest.raises(SettingsError, match="parallel_run_step.settings.json"):
        run(tmp_path, NAMES)


def test_summary_only_writes_no_rows(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.csv").write_text("earlier rows\n")
    outcome = run(tmp_path, NAMES, append_rows=False)
    assert (outcome.rows, outcome.fault, outcome.predictions) == (4, None, None)
    assert not predictions(tmp_path)


def test_predictions_of_an_earlier_job_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.csv").write_text("earlier rows\n")
    run(tmp_path, NAMES, files=1)
    assert predictions(tmp_path) == ["00.csv"]


# Failures


@pytest.mark.parametrize(("result", "message"), [("'text'", "returned a str"), ("None", "returned a NoneType")])
def test_a_result_of_another_type_fails_the_mini_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, result: str, message: str
) -> None:
    body = f"def run(mini_batch):\n    return {result} if mini_batch[0].endswith('01.csv') else mini_batch"
    outcome = run(tmp_path, body, max_retries=1)
    assert (outcome.succeeded, outcome.failed, outcome.failed_files) == (3, 1, 1)
    assert (outcome.retries, outcome.fault) == (1, None)
    assert f"run() {message}; return a list or a pandas DataFrame" in caplog.text
    assert "try 2 of 2" in caplog.text


def test_a_mini_batch_that_raises_is_retried_in_the_same_process(tmp_path: Path) -> None:
    body = """
    def run(mini_batch):
        name = Path(mini_batch[0]).name
        note("tries", name)
        if name == "01.csv" or (name == "02.csv" and (OUT / "tries").read_text().count(name) < 3):
            raise ValueError(f"not {name}")
        return mini_batch
    """
    outcome = run(tmp_path, body)
    assert Counter(notes(tmp_path, "tries")) == {"00.csv": 1, "01.csv": 4, "02.csv": 3, "03.csv": 1}
    assert len(notes(tmp_path, "inits")) == 1
    assert (outcome.succeeded, outcome.failed, outcome.retries, outcome.deliveries) == (3, 1, 5, 9)
    assert worker_log(tmp_path).count("ValueError: not 01.csv") == 4


@pytest.mark.parametrize("end", ["sys.exit(4)", "os.kill(os.getpid(), 11)"])
def test_a_worker_that_dies_is_replaced_and_its_mini_batch_retried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    body = f"""
    def run(mini_batch):
        if mini_batch[0].endswith("01.csv"):
            {end}
        return mini_batch
    """
    outcome = run(tmp_path, body, max_retries=1)
    assert (outcome.deaths, outcome.retries, outcome.succeeded, outcome.failed_files) == (2, 1, 3, 1)
    assert ("exit code 4" if "exit" in end else "killed by SIGSEGV") in caplog.text


def test_a_worker_is_killed_on_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's clock jumps by an hour each time it is read while the mini-batch hangs.

    A single jump would not be enough: the mini-batch may already hang at the first reading.
    """
    offset = 0.0

    def monotonic() -> float:
        nonlocal offset
        hung = tmp_path / "out" / "hung"
        if hung.exists() and (words := hung.read_text().split()) and is_alive(int(words[1])):
            offset += 3600
        return time.monotonic() + offset

    monkeypatch.setattr(job, "time", SimpleNamespace(monotonic=monotonic))
    body = """
    import subprocess

    def run(mini_batch):
        if mini_batch[0].endswith("01.csv") and not contains("hung", "once"):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            note("hung", "once", os.getpid(), child.pid)
            time.sleep(600)
        return mini_batch
    """
    outcome = run(tmp_path, body, timeout=1800)
    assert (outcome.timeouts, outcome.retries, outcome.succeeded, outcome.failed) == (1, 1, 4, 0)
    assert len(notes(tmp_path, "inits")) == 2
    pids = [int(word) for word in notes(tmp_path, "hung")[0].split()[1:]]
    assert eventually(lambda: not any(map(is_alive, pids)))


@pytest.mark.parametrize(("threshold", "fails"), [(-1, False), (2, False), (1, True), (0, True)])
def test_the_job_fails_above_the_error_threshold(tmp_path: Path, threshold: int, fails: bool) -> None:
    """A mini-batch of three files that returns two rows counts as one failed file. If it raises, all files fail."""
    body = """
    def run(mini_batch):
        if len(mini_batch) == 1:
            raise ValueError("the last")
        return mini_batch[1:] if any(path.endswith("01.csv") for path in mini_batch) else mini_batch * 2
    """
    outcome = run(tmp_path, body, files=7, mini_batch_size=3, max_retries=0, error_threshold=threshold)
    assert (outcome.fault is not None) == fails
    if fails:
        assert f"--error-threshold allows {threshold}" in str(outcome.fault)
    else:
        assert (outcome.failed_files, outcome.rows) == (2, 8)


@pytest.mark.parametrize("body", ["def run(mini_batch):\n    return []", "def run(mini_batch):\n    raise ValueError"])
def test_a_job_without_a_successful_mini_batch_fails(tmp_path: Path, body: str) -> None:
    outcome = run(tmp_path, body, max_retries=1)
    assert "no succeeded mini batch" in str(outcome.fault)
    assert (outcome.succeeded, outcome.failed, outcome.failed_files) == (0, 4, 4)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def init():\n    raise ValueError('no model')\n" + NAMES, "ValueError: no model"),
        ("import nothing_of_the_kind", "No module named 'nothing_of_the_kind'"),
        ("run = None", "has no function run()"),
        ("def init():\n    os._exit(7)\n" + NAMES, "exit code 7"),
    ],
)
def test_a_script_that_cannot_start_fails_the_job(tmp_path: Path, body: str, message: str) -> None:
    outcome = run(tmp_path, body)
    assert message in str(outcome.fault)
    assert "worker-0.log" in str(outcome.fault)
    assert (outcome.deliveries, outcome.succeeded) == (0, 0)


# Simulated faults


DOOMED = """
def run(mini_batch):
    names = [Path(path).name for path in mini_batch]
    if (OUT / f"doomed-{names[0]}").exists():
        time.sleep(600)
    note("ended", *names)
    return names
"""


@pytest.fixture
def _kills_hit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a mini-batch of DOOMED wait for its kill, so that no kill comes too late."""
    assign = KillSchedule.assign

    def assign_and_report(self: KillSchedule, mini_batch: MiniBatch, *, is_new: bool) -> float | None:
        seconds = assign(self, mini_batch, is_new=is_new)
        marker = tmp_path / "out" / f"doomed-{Path(mini_batch.files[0]).name}"
        marker.unlink(missing_ok=True)
        if seconds is not None:
            marker.touch()
        return seconds

    monkeypatch.setattr(KillSchedule, "assign", assign_and_report)


@pytest.mark.usefixtures("_kills_hit")
def test_killed_mini_batches_are_retried(tmp_path: Path) -> None:
    outcome = run(tmp_path, DOOMED, files=20, mini_batch_size=2, workers=2, kill=0.3)
    assert (outcome.kills, outcome.kills_missed, outcome.retries, outcome.deliveries) == (3, 0, 3, 13)
    assert len(notes(tmp_path, "ended")) == 10
    assert sorted(predictions(tmp_path)) == [f"{index:02}.csv" for index in range(20)]
    assert len(notes(tmp_path, "inits")) > outcome.kills
    assert (outcome.succeeded, outcome.fault, outcome.deaths) == (10, None, 0)


@pytest.mark.usefixtures("_kills_hit")
def test_every_mini_batch_can_be_killed_once(tmp_path: Path) -> None:
    outcome = run(tmp_path, DOOMED, files=4, workers=2, kill=1.0)
    assert (outcome.kills, outcome.kills_missed, outcome.deliveries) == (4, 0, 8)
    assert sorted(predictions(tmp_path)) == [f"{index:02}.csv" for index in range(4)]


@pytest.mark.usefixtures("_kills_hit")
def test_kills_use_up_retries(tmp_path: Path) -> None:
    outcome = run(tmp_path, DOOMED, files=6, kill=0.3, max_retries=0)
    assert (outcome.kills, outcome.failed, outcome.retries, len(predictions(tmp_path))) == (2, 2, 0, 4)


def test_late_kills_are_counted_as_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assign = KillSchedule.assign
    monkeypatch.setattr(
        KillSchedule, "assign", lambda *args, is_new: None if assign(*args, is_new=is_new) is None else 500.0
    )
    outcome = run(tmp_path, NAMES, files=6, kill=0.3)
    assert (outcome.kills, outcome.retries, outcome.succeeded) == (0, 0, 6)
    assert outcome.kills_missed == 2


def test_kill_times_are_spread_over_the_duration_of_a_mini_batch() -> None:
    delays = []
    for seed in range(200):
        kills = KillSchedule(0.5, 2, random.Random(seed))
        first, second = MiniBatch(0, ("a",)), MiniBatch(1, ("b", "c"))
        assert kills.assign(first, is_new=True) is None  # the duration of a mini-batch is not known yet
        kills.record_duration(first, 10.0)
        delay = kills.assign(second, is_new=True)
        assert delay is not None
        delays.append(delay)
    assert all(0 <= delay <= 20 for delay in delays)
    assert all(count > 30 for count in Counter(int(delay // 5) for delay in delays).values())


def test_duplicates_are_delivered_twice(tmp_path: Path) -> None:
    outcome = run(tmp_path, NAMES, files=10, workers=2, duplicate=0.6, seed=3)
    assert (outcome.duplicates, outcome.deliveries, outcome.rows) == (6, 16, 16)
    assert (outcome.succeeded, outcome.retries) == (10, 0)
    assert sorted(Counter(predictions(tmp_path)).values()) == [1] * 4 + [2] * 6


# The command


def run_command(tmp_path: Path, body: str, *options: str, files: int = 4) -> runs.CommandResult:
    inputs, script = write_files(tmp_path / "in", files), write_script(tmp_path, body)
    out = tmp_path / "out"
    return runs.command("azureml-simulate", inputs, "--out", out, "--script", script, "--gpus", "0", *options)


def test_the_command_prints_the_outcome(tmp_path: Path) -> None:
    process = run_command(tmp_path, NAMES, "--mini-batch-size", "2", "--workers", "2", "--timeout", "20s")
    assert (process.code, process.stderr) == (0, "")
    lines = process.stdout.splitlines()
    assert lines[:2] == ["2 mini-batches of 4 files · 2 succeeded, 0 failed; 0 files failed", "2 deliveries"]
    assert lines[2].startswith("4 rows in ")
    assert lines[3:] == [f"rows     {tmp_path}/out/predictions.csv", f"logs     {tmp_path}/out/logs/azureml"]


def test_the_command_prints_json(tmp_path: Path) -> None:
    process = run_command(
        tmp_path, "def run(mini_batch):\n    return None", "--max-retries", "0", "--json", "-q", files=1
    )
    outcome = json.loads(process.stdout)
    assert (process.code, process.stderr) == (3, "")
    assert (outcome["mini_batches"], outcome["failed_files"], outcome["rows_per_second"]) == (1, 1, None)
    assert outcome["fault"].startswith("no succeeded mini batch")


def test_quiet_prints_nothing_on_success_and_a_usage_error_exits_with_2(tmp_path: Path) -> None:
    process = run_command(tmp_path, NAMES, "-q", "--output-action", "summary_only")
    assert (process.code, process.stdout, process.stderr) == (0, "", "")
    wrong = runs.command("azureml-simulate", tmp_path / "absent", "--script", tmp_path / "score.py")
    assert (wrong.code, wrong.stdout) == (2, "")
    assert "there is no such file or folder" in wrong.stderr
    assert runs.command("azureml-simulate", tmp_path, "--kill", "2").code == 2


HANGING = """
import subprocess

def run(mini_batch):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    note("hanging", os.getpid(), child.pid, os.getcwd())
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_and_their_folders_are_removed_with_the_command(tmp_path: Path, number: signal.Signals) -> None:
    inputs, script = write_files(tmp_path / "in", 2), write_script(tmp_path, HANGING)
    command = [sys.executable, "-m", "batch_infer", "azureml-simulate", str(inputs), "--out", str(tmp_path / "out"),
            "--script", str(script), "--gpus", "0", "--workers", "2", "--mini-batch-size", "1"]  # fmt: skip
    pipe, environment = subprocess.PIPE, {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert runs.wait_for(process, lambda: len(notes(tmp_path, "hanging")) == 2)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=600)
    workers = [line.split() for line in notes(tmp_path, "hanging")]
    assert eventually(lambda: not any(is_alive(int(pid)) for *pids, _ in workers for pid in pids))
    assert stdout == ""
    if number != signal.SIGKILL:
        assert process.returncode == 75
        assert "stopped by SIG" in stderr
        assert not any(Path(folder).exists() for *_, folder in workers)
