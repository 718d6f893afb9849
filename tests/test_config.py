"""Test options from flags, environment variables and the --config file, their precedence and their errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batch_infer.cli import commands
from batch_infer.cli.run import run as run_command
from batch_infer.errors import SettingsError
from tests.runs import command


def parse(*arguments: str, name: str = "run") -> dict[str, Any]:
    with commands.commands[name].make_context(name, list(arguments), parent=group_context()) as context:
        return dict(context.params)


def group_context() -> Any:
    return commands.make_context("batch-infer", ["run"], resilient_parsing=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(
        'steps = 30\nguidance-scale = 6\nguidance_rescale = 0.5\nresults = ["csv", "jsonl"]\n'
        'column = "prompt=caption"\nmax_failed = "1%"\nquiet = true\nnegative-prompt = "dull"\nsafety = "none"\n'
    )
    return path


def test_file_sets_options_like_flags(file: Path) -> None:
    flags = "--steps 30 --guidance-scale 6 --guidance-rescale 0.5 --results csv --results jsonl --column prompt=caption"
    more = ("--max-failed", "1%", "-q", "--negative-prompt", "dull", "--safety", "none")
    assert parse("t.csv", "--config", str(file)) == parse("t.csv", *flags.split(), *more)


def test_flag_overrides_environment_which_overrides_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("t.csv", "--config", str(file))["steps"] == 30
    monkeypatch.setenv("BATCH_INFER_STEPS", "20")
    assert parse("t.csv", "--config", str(file))["steps"] == 20
    assert parse("t.csv", "--config", str(file), "--steps", "10")["steps"] == 10


@pytest.mark.parametrize("content", ['steps = "ten"', "num-inference-steps = [1, 2]"])
def test_overridden_value_is_not_checked(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "job.toml").write_text(content)
    assert parse("t.csv", "--config", str(path), "--steps", "10")["steps"] == 10
    assert command("run", "--config", path, "--help").code == 0
    monkeypatch.setenv("BATCH_INFER_STEPS", "20")
    assert parse("t.csv", "--config", str(path))["steps"] == 20
    monkeypatch.setenv("BATCH_INFER_STEPS", "twenty")
    assert parse("t.csv", "--steps", "10")["steps"] == 10
    path.write_text(content + "\nstepps = 3")
    with pytest.raises(SettingsError, match="there is no option 'stepps'"):
        parse("t.csv", "--config", str(path), "--steps", "10")


def test_two_names_of_one_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of two flags counts. Two variables have no order, so they are refused."""
    assert parse("t.csv", "--steps", "3", "--num-inference-steps", "4")["steps"] == 4
    assert parse("t.csv", "--num-inference-steps", "4", "--steps", "3")["steps"] == 3
    monkeypatch.setenv("BATCH_INFER_STEPS", "")
    monkeypatch.setenv("BATCH_INFER_NUM_INFERENCE_STEPS", "4")
    assert parse("t.csv")["steps"] == 4
    monkeypatch.setenv("BATCH_INFER_STEPS", "3")
    with pytest.raises(SettingsError, match="BATCH_INFER_STEPS and BATCH_INFER_NUM_INFERENCE_STEPS set the same"):
        parse("t.csv")


def test_environment_can_name_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_INFER_CONFIG", str(file))
    assert parse("t.csv")["steps"] == 30


@pytest.mark.parametrize("name", ["plan", "retry", "status", "merge"])
def test_one_file_serves_every_command(file: Path, name: str) -> None:
    """Each command reads its own options and ignores those of other commands."""
    more = ("--status", "failed") if name == "retry" else ()
    assert "config" not in parse("t.csv", "--config", str(file), *more, name=name)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("stepps = 3", r"there is no option 'stepps'; did you mean 'steps'\?"),
        ("cfg_scale = 3", r"there is no option 'cfg_scale'; did you mean 'guidance-scale'\?"),
        ("zzz = 3", "there is no option 'zzz'; the options are against, "),
        ("steps = 2.5", r"steps = 2.5: '2.5' is not a valid integer"),
        ('steps = "ten"', "steps = 'ten': 'ten' is not a valid integer"),
        ("steps = [1, 2]", "this option takes one value"),
        ("steps = true", "write a string or a number"),
        ("quiet = 1", "write true or false"),
        ('safety = "maybe"', "'maybe' is not one of"),
        ('results = ["csv", "xml"]', "'xml' is not one of"),
        ("[run]\nsteps = 3", "there is no option 'run'"),
        ("steps = \nx", "is not TOML: .*line 1"),
        ("config = 'other.toml'", "there is no option 'config'"),
        ("steps = 3\nnum-inference-steps = 3", "steps and num-inference-steps set the same option; remove one"),
        ("batch_size = 8\nslots = 4", "batch_size and slots set the same option"),
        ("guidance-scale = 3\nguidance_scale = 3", "guidance-scale and guidance_scale set the same option"),
    ],
)
def test_error_in_the_file_names_it(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "job.toml"
    path.write_text(content)
    with pytest.raises(SettingsError, match=sentence) as exc_info:
        parse("t.csv", "--config", str(path))
    assert str(path) in str(exc_info.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["missing", "not text"])
def test_file_that_cannot_be_read_ends_with_2(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "job.toml"
    if content is not None:
        path.write_bytes(content)
    done = command("run", "t.csv", "--config", path)
    assert (done.code, done.stdout) == (2, "")
    assert str(path) in done.stderr


def test_every_option_can_be_set_in_a_file(tmp_path: Path) -> None:
    values = {
        "flag": "true",
        "integer": "5",
        "float": "2.5",
        "parse_slots": "5",
        "parse_duration": '"2h"',
        "file": '"x.prom"',
    }
    for option in run_command.params:
        name = option.opts[-1] if not option.opts[0].startswith("--") else option.opts[0]
        if not name.startswith("--") or name in ("--config", "--help", "--log-format"):
            continue
        kind = "flag" if getattr(option, "is_flag", False) else option.type.name
        choices = getattr(option.type, "choices", None)
        value = f'"{choices[0]}"' if choices else values.get(kind.split(" ")[0]) or '"x"'
        path = tmp_path / "job.toml"
        path.write_text(f"{name.removeprefix('--')} = {value}\n")
        assert parse("t.csv", "--config", str(path))[str(option.name)] not in (None, (), False), name


# Names


def test_aliases_are_options_variables_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        **{"num-inference-steps": ("steps", 7), "guidance": ("guidance_scale", 3.0), "batch-size": ("slots", 4)},
        "num-images-per-prompt": ("images_per_prompt", 2),
    }
    for name, (option, value) in names.items():
        assert parse("t.csv", f"--{name}", str(value))[option] == value
        (tmp_path / "job.toml").write_text(f"{name} = {value}\n")
        assert parse("t.csv", "--config", str(tmp_path / "job.toml"))[option] == value
        with monkeypatch.context() as patch:
            patch.setenv(f"BATCH_INFER_{name.replace('-', '_').upper()}", str(value))
            assert parse("t.csv")[option] == value


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("run t.csv --cfg-scale 3", "run has no option --cfg-scale. Did you mean --guidance-scale?"),
        ("run t.csv --num-step 3", "run has no option --num-step. Did you mean --steps?"),
        ("run t.csv --output-dir x", "run has no option --output-dir. Did you mean --out?"),
        ("run t.csv --stepps 3", "run has no option --stepps. Did you mean --steps?"),
        ("bench --num-inference-steps 3", "It is an option of run, plan."),
        ("retry out --steps 3", "retry has no option --steps. It is an option of run, plan, bench."),
        ("run t.csv --zzz", "run has no option --zzz.\n"),
    ],
)
def test_unknown_option_suggests_a_similar_one(line: str, sentence: str) -> None:
    done = command(*line.split())
    assert done.code == 2
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("STEP", "did you mean BATCH_INFER_STEPS?"),
        ("CFG_SCALE", "did you mean BATCH_INFER_GUIDANCE_SCALE?"),
        ("COLUMNS", "did you mean BATCH_INFER_COLUMN?"),
        ("ZZZ", "remove it"),
    ],
)
@pytest.mark.parametrize("line", ["status out", "run t.csv"])
def test_unknown_variable_is_refused(line: str, name: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"BATCH_INFER_{name}", "30")
    done = command(*line.split())
    assert (done.code, done.stdout) == (2, "")
    assert f"no option reads the environment variable BATCH_INFER_{name}: {hint}" in done.stderr


def test_variables_of_other_commands_endpoints_and_kubernetes_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROUNDS", "STATUS", "REQUEST_TIMEOUT", "PORT", "ONLINE_SERVICE_PORT_HTTP", "PORT_80_TCP_PROTO"):
        monkeypatch.setenv(f"BATCH_INFER_{name}", "tcp://10.0.0.1:80")
    monkeypatch.setenv("BATCH_INFER_STEPPS", "")  # an empty variable counts as unset
    parse("t.csv")


def test_help_ignores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_INFER_STEP", "30")
    assert command("run", "--help").code == 0
