"""`import batch_infer` in scripts: the functions do what the commands do, raise errors, and print nothing."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import click
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import batch_infer
from batch_infer import spawning
from batch_infer.api.calls import name_arguments
from batch_infer.autotune.probe import Probe
from batch_infer.cli.keywords import options_by_keyword
from batch_infer.cli.main import commands
from batch_infer.errors import (
    BatchInferError,
    ModelError,
    SettingsError,
    StoppedError,
    TableError,
    TooManyFailedError,
    UsageError,
)
from batch_infer.jobs import run as rendering
from batch_infer.stopping import Stopper
from batch_infer.table.memory import find_in_memory, in_memory_tables, make_in_memory
from tests.deaths import eventually
from tests.runs import assert_whole, command, hashes, results, run_json
from tests.tables import write_csv

LOG = logging.getLogger("batch_infer")
ROOT = Path(__file__).parent.parent
QUICK: dict[str, Any] = {
    **{"steps": 2, "slots": 8, "threads": 1, "device": "cpu", "on_flagged": "keep"},
    "num_processes": 0,
}
"""The options of tests.runs.QUICK."""
FRAME = pd.DataFrame(
    {
        "prompt": ["a red circle", "a blue square", "a green star"],
        "seed": [1, np.nan, 3],
        "width": pd.array([48, None, 64], dtype="Int64"),
        "negative_prompt": [None, "blurry", float("nan")],
        "tag": pd.Categorical(["a", "b", "a"]),
        "score": [0.5, np.nan, 1.5],
    },
    index=[7, 8, 9],
)


def run(table: Any, out: Path, **options: Any) -> batch_infer.Summary:
    return batch_infer.run(table, out=out, **{**QUICK, **options})


def test_arguments_are_the_options_of_the_command() -> None:
    parameters = dict(inspect.signature(batch_infer.run).parameters)
    del parameters["table"], parameters["progress"]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values())
    check_parameters(parameters, options_by_keyword())
    assert inspect.signature(batch_infer.plan).parameters == inspect.signature(batch_infer.run).parameters
    parameters = dict(inspect.signature(batch_infer.gallery).parameters)
    del parameters["out"], parameters["progress"]
    check_parameters(parameters, options_by_keyword(commands.commands["gallery"]))


def check_parameters(parameters: Mapping[str, inspect.Parameter], options: Mapping[str, click.Option]) -> None:
    """Check that the parameters have the names, the order and the defaults of the options."""
    assert list(parameters) == list(options)
    context = click.Context(click.Command("run"))
    for name, parameter in parameters.items():
        default = options[name].get_default(context)
        known = default if isinstance(default, (str, int, float, bool)) else None
        assert str(parameter.default) == str(() if options[name].multiple else known), name


def test_importing_the_package_loads_no_library() -> None:
    script = "import sys, batch_infer; print(sorted({'torch', 'pandas', 'pyarrow', 'click'} & sys.modules.keys()))"
    script += "; print(batch_infer.errors.SettingsError.__name__, {*batch_infer.__all__} <= {*dir(batch_infer)})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["[]", "SettingsError True"]


@pytest.mark.usefixtures("probe_here")
def test_a_run_is_that_of_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table = write_csv(tmp_path / "t.csv", [["prompt", "seed"], ["a red circle", "5"], ["a blue square", ""]])
    options = ["--steps", "2", "--slots", "8", "--threads", "1", "--device", "cpu", "--on-flagged", "keep"]
    assert command("run", table, "-o", tmp_path / "a", *options, "--num-processes", "0").code == 0
    capfd.readouterr()
    summary = run(table, tmp_path / "b")
    assert (summary.rendered, summary.counts.ok + summary.counts.flagged, summary.counts.rows) == (2, 2, 2)
    assert batch_infer.plan(table, out=tmp_path / "b", **QUICK).finished == 2
    assert batch_infer.status(tmp_path / "b").state == "finished"
    assert batch_infer.verify(tmp_path / "b").counts == {}
    assert capfd.readouterr() == ("", "")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    ours, theirs = (run_json(tmp_path / name)["settings"] for name in "ba")
    assert {**ours, "out": "", "table": ""} == {**theirs, "out": "", "table": ""}


# Tables in memory


def test_a_dataframe_is_a_table(tmp_path: Path) -> None:
    assert run(FRAME, tmp_path / "out").rendered == 3
    assert_whole(tmp_path / "out")
    rows = results(tmp_path / "out")
    assert [row["id"] for row in rows] == [f"dataframe-0000000{number}" for number in range(3)]
    assert [row["seed"] for row in rows][::2] == [1, 3]
    assert [row["width"] for row in rows] == [48, 64, 64]
    assert [row["negative_prompt"] for row in rows] == [None, "blurry", None]
    assert [row["tag"] for row in rows] == ["a", "b", "a"]
    assert [row["score"] for row in rows] == [0.5, None, 1.5]
    assert {row["source_file"] for row in rows} == {"dataframe"}
    assert "__index_level_0__" not in rows[0]


def test_a_second_call_continues(tmp_path: Path) -> None:
    run(FRAME.head(2), tmp_path / "out")
    before = hashes(tmp_path / "out")
    assert run(FRAME, tmp_path / "out").rendered == 1
    assert run(FRAME, tmp_path / "out").rendered == 0
    assert hashes(tmp_path / "out").items() > before.items()
    run_record = run_json(tmp_path / "out")
    assert run_record["unrepeatable_tables"] == ["<dataframe>"]
    assert str(tmp_path) not in str(run_record["tables"])


def test_commands_on_an_out_whose_table_was_in_memory(tmp_path: Path) -> None:
    run(FRAME, tmp_path / "out")
    retried = command("retry", tmp_path / "out", "--status", "missing")
    assert retried.code == 2
    assert "<dataframe>" in retried.stderr
    assert "name the TABLEs after OUT" in retried.stderr
    before = results(tmp_path / "out")
    assert command("merge", tmp_path / "out").code == 0
    assert results(tmp_path / "out") == before
    assert batch_infer.verify(tmp_path / "out", FRAME).counts == {}
    assert batch_infer.verify(tmp_path / "out", FRAME.assign(width=32)).counts == {"missing_row": 3}


def test_a_list_of_prompts_is_a_table(tmp_path: Path) -> None:
    assert run(["a red circle", 'a, "quoted"\nprompt'], tmp_path / "out").rendered == 2
    rows = results(tmp_path / "out")
    assert [(row["id"], row["prompt"]) for row in rows] == [
        ("prompts-00000000", "a red circle"),
        ("prompts-00000001", 'a, "quoted"\nprompt'),
    ]


def test_a_tuple_names_several_tables(tmp_path: Path) -> None:
    tables = tuple(write_csv(tmp_path / f"{name}.csv", [["prompt"], [f"a {name} circle"]]) for name in ("red", "blue"))
    assert run(tables, tmp_path / "out").rendered == 2
    assert [row["id"] for row in results(tmp_path / "out")] == ["red-00000000", "blue-00000000"]


def test_tables_of_arrow_and_polars(tmp_path: Path) -> None:
    table = pa.table({"prompt": pa.array(["a red circle"], pa.string_view()), "seed": [5.0], "x": [[1, 2]]})
    assert run(table, tmp_path / "a").rendered == 1
    assert results(tmp_path / "a")[0]["x"] == [1, 2]
    polars = pytest.importorskip("polars")
    kinds = polars.Series(["x"], dtype=polars.Categorical), polars.Series([None], dtype=polars.Enum(["x"]))
    run(polars.DataFrame({"prompt": ["a red circle"], "seed": [5], "a": kinds[0], "b": kinds[1]}), tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert [results(tmp_path / "b")[0][name] for name in ("a", "b")] == ["x", None]
    objects = polars.DataFrame({"prompt": ["a"], "k": polars.Series([{}], dtype=polars.Object)})
    with pytest.raises(TableError, match="column 'k' of the dataframe contains Python objects"):
        run(objects, tmp_path / "c")
    lists = polars.DataFrame({"prompt": ["a"], "k": polars.Series([["x"]], dtype=polars.List(polars.Categorical))})
    with pytest.raises(TableError, match="convert the column of this type to text"):
        run(lists, tmp_path / "c")


def test_other_threads_do_not_see_a_table() -> None:
    seen: list[object] = []
    name, table = cast(tuple[str, pa.Table], make_in_memory(["a red circle"]))
    with in_memory_tables({name: table}):
        thread = threading.Thread(target=lambda: seen.append(find_in_memory(name)))
        thread.start()
        thread.join()
        assert find_in_memory(name) is table
    assert seen == [None]
    assert find_in_memory(name) is None


@pytest.mark.parametrize(
    ("table", "options", "error", "text"),
    [
        (5, {}, SettingsError, "cannot read a table from int: pass a path, a tuple of paths"),
        ((FRAME,), {}, SettingsError, "cannot read a table from tuple"),
        ([5], {}, TableError, "item 0 is int"),
        ([Path("t.csv")], {}, TableError, "pass several tables as a tuple"),
        (["a.csv", "b.parquet"], {}, TableError, "'a.csv' looks like a file: pass tables as a tuple"),
        (["a\ud800"], {}, TableError, "item 0 of the list contains a lone surrogate"),
        ("none.csv", {}, TableError, "none.csv: no such file"),
        (pd.DataFrame({"prompt": ["a", "b"], "id": [1, "x"]}), {}, TableError, "for column id .*give each column one"),
        (pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"]), {}, TableError, "Duplicate column names"),
        (pd.DataFrame({("a", "prompt"): ["a"]}), {}, TableError, "columns of several levels"),
        (pd.DataFrame, {}, SettingsError, "cannot read a table from type"),
        ("", {}, TableError, "a TABLE argument is empty"),
        (["a"], {"slots": 5000}, SettingsError, "'5000' is neither a number from 2 to 4096 nor auto"),
        (["a"], {"price_per_hour": np.nan}, SettingsError, "'nan' is not a finite number"),
        (["a"], {"max_failed": "nan"}, SettingsError, "^max_failed nan: expected a number of rows"),
        (pd.DataFrame({"caption": ["a"]}), {}, TableError, "no column 'prompt'"),
        (["a"], {"steps": "thirty"}, SettingsError, "steps='thirty': 'thirty' is not a valid integer"),
        (["a"], {"steps": 2.5}, SettingsError, "steps=2.5"),
        (["a"], {"steps": True}, SettingsError, "steps=True: pass a string or a number"),
        (["a"], {"steps": [2]}, SettingsError, "pass one value"),
        (["a"], {"dtype": "fp16"}, SettingsError, "'fp16' is not one of 'auto', 'float32'"),
        (["a"], {"overwrite": "yes"}, SettingsError, "pass True or False"),
        (["a"], {"column": {"promt": "text"}}, SettingsError, "FIELD is one of prompt"),
        (["a"], {"time_limit": "soon"}, SettingsError, "is not a duration"),
        (["a"], {"model": "./none"}, ModelError, "neither a model folder nor"),
    ],
)
def test_errors_are_exceptions(
    tmp_path: Path, table: Any, options: dict[str, Any], error: type[BatchInferError], text: str
) -> None:
    with pytest.raises(error, match=text):
        run(table, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "images").exists()


def test_a_path_of_out_with_a_nul_character_is_refused() -> None:
    for call in (
        batch_infer.status,
        batch_infer.results,
        batch_infer.verify,
        functools.partial(batch_infer.run, ["a"]),
    ):
        with pytest.raises(SettingsError, match="NUL"):
            call(out="a\0b")


@pytest.mark.usefixtures("probe_here")
def test_plan_has_the_defaults_of_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert batch_infer.plan(["a red circle"]).pending == 1
    assert list(tmp_path.iterdir()) == []


def test_threads_render_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the logger, and libraries that load models at the same time break each other."""
    active: list[int] = []
    render = rendering._render_tables

    def render_and_count(*arguments: Any) -> Any:
        active.append(1)
        assert sum(active) == 1
        try:
            return render(*arguments)
        finally:
            active.append(-1)

    monkeypatch.setattr(rendering, "_render_tables", render_and_count)
    before = LOG.level, LOG.propagate, list(LOG.handlers)
    outs = [tmp_path / name for name in "abc"]
    threads = [threading.Thread(target=run, args=(["a red circle"], out)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(results(out)) for out in outs] == [1, 1, 1]
    assert (LOG.level, LOG.propagate, LOG.handlers) == before


def test_a_thread_that_waits_for_another_can_be_stopped(tmp_path: Path) -> None:
    with rendering._rendering, pytest.raises(StoppedError, match="while another thread of this process rendered"):
        run(["a red circle"], tmp_path / "out", time_limit=0.1)


def test_ctrl_c_at_the_start_of_a_turn_does_not_block_later_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def interrupted() -> Iterator[None]:
        yield
        raise KeyboardInterrupt

    monkeypatch.setattr(rendering, "deferred", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(["a red circle"], tmp_path / "out")
    assert not rendering._rendering.locked()


def test_a_daemonic_process_cannot_start_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawning, "current_process", lambda: SimpleNamespace(daemon=True))
    with pytest.raises(SettingsError, match="a daemonic process, such as a worker of multiprocessing.Pool"):
        run(["a red circle"], tmp_path / "out", num_processes=1)


def test_unknown_arguments_are_type_errors() -> None:
    for function in (batch_infer.run, batch_infer.plan):
        with pytest.raises(TypeError, match="unexpected keyword argument 'stepz'"):
            function(["a"], stepz=3)  # type: ignore[call-arg]


def test_options_take_paths_numbers_of_numpy_and_none(tmp_path: Path, demo_folder: Path) -> None:
    options = {"model": demo_folder, "steps": np.int64(3), "guidance_scale": np.float32(2.5), "dtype": None}
    run(pd.DataFrame({"caption": ["a red circle"]}), tmp_path / "out", column={"prompt": "caption"}, **options)
    (row,) = results(tmp_path / "out")
    assert (row["num_inference_steps"], row["guidance_scale"]) == (3, 2.5)


def test_environment_variables_of_options_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_INFER_NEGATIVE_PROMPT", "blurry")
    run(["a red circle"], tmp_path / "out")
    assert results(tmp_path / "out")[0]["negative_prompt"] is None


# Outcomes


@pytest.mark.usefixtures("probe_here")
def test_bad_rows_raise_unless_they_are_allowed(tmp_path: Path) -> None:
    with pytest.raises(TooManyFailedError, match="1 of 2 rows failed or are invalid.*the prompt is empty") as caught:
        run(["a red circle", ""], tmp_path / "out")
    assert (caught.value.summary.counts.invalid, caught.value.exit_code) == (1, 3)
    assert run(["a red circle", ""], tmp_path / "out", max_failed=1).counts.invalid == 1
    assert run(["a red circle", ""], tmp_path / "out", max_failed="50%").counts.invalid == 1
    plan = batch_infer.plan(["a red circle", ""], out=tmp_path / "new", **QUICK)
    assert (plan.invalid_rows, plan.pending) == (1, 1)
    assert plan.bad_results == ["prompts, row 1 (prompts-00000001): the prompt is empty"]


def test_results_are_a_dataframe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contains no run"):
        batch_infer.results(tmp_path / "out")
    run(["a red circle", ""], tmp_path / "out", max_failed=1)
    frame = batch_infer.results(str(tmp_path / "out"))
    assert frame["status"].isin(["ok", "flagged", "invalid"]).all()
    assert str(frame["seed"].dtype) == "int64[pyarrow]"
    assert frame["seed"].isna().tolist() == [False, True]
    assert frame["height"].tolist()[0] == 64
    assert Path(frame["generated_image"][0]).is_absolute()
    assert Path(frame["generated_image"][0]).is_file()
    assert pd.isna(frame["generated_image"][1])
    (tmp_path / "out" / "results.parquet").unlink()
    with pytest.raises(UsageError, match="run `batch-infer merge"):
        batch_infer.results(tmp_path / "out")


@pytest.mark.usefixtures("probe_here")
def test_a_plan_names_the_refusal(tmp_path: Path) -> None:
    run(["a red circle"], tmp_path / "out")
    changed = {**QUICK, "steps": 3}
    refusal = batch_infer.plan(["a red circle"], out=tmp_path / "out", **changed).refusal
    assert "because steps differs" in str(refusal)
    with pytest.raises(SettingsError, match="or add rerender_changed=True to .* or overwrite=True to start anew"):
        run(["a red circle"], tmp_path / "out", steps=3)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("--steps 0: add --overwrite or give another --out", "steps 0: add overwrite=True or give another out"),
        ("leave --no-compile out, or --compile", "leave compile=False out, or compile=True"),
        (
            "run `batch-infer rescore o --safety checker` or give --safety",
            "run `batch-infer rescore o --safety checker` or give safety",
        ),
        ("--torch-option, x--steps and --", "--torch-option, x--steps and --"),
    ],
)
def test_errors_name_the_arguments_of_the_call(message: str, named: str) -> None:
    assert name_arguments(message, options_by_keyword()) == named


def test_the_time_limit_raises(tmp_path: Path) -> None:
    with pytest.raises(StoppedError, match="the time limit was reached with 60 images left; .*call the same"):
        run(["a red circle"] * 60, tmp_path / "out", time_limit=0.001)
    assert batch_infer.status(tmp_path / "out").remaining == 60


def interrupt_after(condition: Callable[[], object]) -> threading.Thread:
    """Send SIGINT to this process once a condition holds."""

    def wait() -> None:
        eventually(condition)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_ctrl_c_keeps_finished_rows(tmp_path: Path) -> None:
    prompts = [f"a red circle {number}" for number in range(300)]
    thread = interrupt_after(lambda: any((tmp_path / "out" / "images").rglob("*.png")))
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT; what was committed is kept"):
        run(prompts, tmp_path / "out")
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Stopper.active is None
    frame = batch_infer.results(tmp_path / "out")
    assert 0 < len(frame) < 300
    assert_whole(tmp_path / "out")
    finished = set(frame["id"])
    left = [f"prompts-{number:08}" for number in range(300) if f"prompts-{number:08}" not in finished]
    assert run(prompts, tmp_path / "out", limit=int(left[2][-8:]) + 1).rendered == 3


def test_a_failed_plan_ends_no_process_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # so that the probe starts its process
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.raises(ZeroDivisionError), Probe() as probe:
            probe.detect_device("auto")
            (measuring,) = active_children()
            number = pool.submit(os.getpid).result()
            raise ZeroDivisionError
        measuring.join()
        assert pool.submit(os.getpid).result() == number


def test_a_handler_of_the_program_is_left_alone(tmp_path: Path) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        thread = interrupt_after(lambda: (tmp_path / "out" / "run.json").exists())
        assert run(["a red circle"] * 8, tmp_path / "out").rendered == 8
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert received == [signal.SIGINT]


def test_progress_is_a_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["a red circle"], tmp_path / "out", progress=True)
    assert batch_infer.verify(tmp_path / "out", progress=True).counts == {}
    out, err = capsys.readouterr()
    assert out == ""
    assert "1/1" in err
    assert "1/1 [" in err


def test_messages_go_to_the_log_of_the_program(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "batch_infer")
    run(pd.DataFrame({"prompt": ["a red circle"], "Seed": [3]}), tmp_path / "out")
    assert "column 'Seed' is carried and has no effect" in caplog.text
    assert "no --model given" in caplog.text


# Scripts, whose workers are processes

SCRIPT = """
import batch_infer
options = dict(out={out!r}, steps=2, threads=1, device="cpu")
assert batch_infer.run(["a red circle", ""], max_failed=1, **options).rendered == 1
assert batch_infer.plan(["a red circle", "", "a blue square"], **options).pending == 1
"""


@pytest.mark.promises
@pytest.mark.parametrize("kind", ["file", "guarded", "-c", "-"])
def test_scripts_need_no_main_guard_and_print_nothing(tmp_path: Path, kind: str) -> None:
    script = SCRIPT.format(out=str(tmp_path / "out"))
    if kind == "guarded":
        script = "def main():\n" + script.replace("\n", "\n    ") + "\nif __name__ == '__main__':\n    main()\n"
    (tmp_path / "script.py").write_text(script)
    arguments = {"-c": ["-c", script], "-": ["-"]}.get(kind, [str(tmp_path / "script.py")])
    done = subprocess.run(
        [sys.executable, *arguments], input=script if kind == "-" else "", capture_output=True, text=True, timeout=600,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(results(tmp_path / "out")) == 2


TYPED = """
import batch_infer
from pathlib import Path
summary = batch_infer.run("t.csv", out=Path("out"), steps=30, lora=["a.safetensors"], column={"prompt": "caption"})
reveal_type(summary)
reveal_type(batch_infer.plan("t.csv", steps=30))
batch_infer.plan("t.csv", stepz=30)
batch_infer.run("t.csv", steps="many")
"""


@pytest.mark.promises
def test_type_checkers_see_the_functions(tmp_path: Path) -> None:
    (tmp_path / "typed.py").write_text(TYPED)
    line = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(tmp_path / "typed.py")]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=600)
    assert done.stdout.count("error:") == 2, done.stdout
    assert 'Revealed type is "batch_infer.jobs.summary.Summary"' in done.stdout
    assert 'Revealed type is "batch_infer.jobs.plan.Plan"' in done.stdout
    assert 'Unexpected keyword argument "stepz"' in done.stdout
    assert '"steps" to "run" has incompatible type "str"' in done.stdout


def test_the_run_log_has_all_levels_and_the_program_only_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = LOG.level, LOG.propagate, list(LOG.handlers)
    run(["a red circle"], tmp_path / "out")
    assert (LOG.level, LOG.propagate, LOG.handlers) == before
    assert " DEBUG " in (tmp_path / "out" / "logs" / "run.log").read_text()
    assert "DEBUG" not in {record.levelname for record in caplog.records}


def test_a_time_limit_ends_verify(tmp_path: Path) -> None:
    run(["a red circle"], tmp_path / "out")
    with pytest.raises(StoppedError, match="the verification is incomplete"):
        batch_infer.verify(tmp_path / "out", time_limit=1e-7)
    assert not batch_infer.verify(tmp_path / "out", time_limit=600).counts
