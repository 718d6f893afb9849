"""Read a run.json that was edited, damaged, or written by another version."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batch_infer.errors import UsageError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.run_json import RunRecord, parse_record
from batch_infer.records import utc_now
from batch_infer.settings import (
    BatchShape,
    Compute,
    LoraSpec,
    ModelSettings,
    RunSettings,
    SafetySettings,
    SchedulerSpec,
    ServiceSettings,
    TableSettings,
)
from batch_infer.store import LocalStore
from tests.runs import QUICK, command, run
from tests.tables import RULES, write_csv

Keys = tuple[str | int, ...]
SETTINGS = RunSettings(
    TableSettings(("t.csv",), {"prompt": "caption"}, limit=3),
    "out",
    model=ModelSettings(scheduler=SchedulerSpec("DDIMScheduler", (("eta", 0.5),)), loras=(LoraSpec("a.safetensors"),)),
    safety=SafetySettings("azure", service=ServiceSettings("https://x.cognitiveservices.azure.com")),
)
RECORD: dict[str, Any] = json.loads(
    json.dumps(
        {
            "identity": {"model": "m", "safety": "none"},
            "batch_infer": "0.1.0",
            "started_at": utc_now(),
            "settings": msgspec.to_builtins(SETTINGS, enc_hook=str),
            "compute": asdict(Compute("cpu", "float32", 8, 4, 1, by_size=(BatchShape(64, 64, 8, 4),))),
            "rules": msgspec.to_builtins(RULES),
            "model": {"name": "m"},
            "scheduler": {"name": "s"},
            "tables": ["t.csv"],
            "unreadable_tables": ["b.csv"],
            "unrepeatable_tables": ["-"],
            "survey": {
                "finished_at": utc_now(),
                "total": 1,
                "done": 0,
                "invalid": 0,
                "pending": 1,
                "standing": {"ok": 1},
            },
            "rendering_since": utc_now(),
            "summary": {"rows": 1, "ok": 1, "left": 0, "images_per_second": 0.5},
            "rescoring": {"fingerprint": "keep"},
        },
        default=str,
    )
)
ANYTHING: set[Keys] = {("settings", "model", "scheduler", "options", 0, 1)}
"""Keys whose values may have any type: the value of a scheduler's option."""


def keys_of(value: Any, above: Keys = ()) -> Iterator[Keys]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*above, key)
        if isinstance(inner, (dict, list)):
            yield from keys_of(inner, (*above, key))


def changed(keys: Keys, value: Any, record: dict[str, Any] = RECORD) -> dict[str, Any]:
    record = copy.deepcopy(record)
    inner: Any = record
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return record


def test_a_record_is_parsed_as_written() -> None:
    record = parse_record(RECORD)
    assert record.settings == SETTINGS
    assert record.rules == RULES
    assert parse_record({}) == RunRecord()


def value_at(keys: Keys) -> Any:
    inner: Any = RECORD
    for key in keys:
        inner = inner[key]
    return inner


def test_a_value_of_another_type_is_refused_and_its_key_is_named() -> None:
    """The test covers every key at every level."""
    for keys in set(keys_of(RECORD)) - ANYTHING:
        wrong: Any = 7.5 if isinstance(value_at(keys), (dict, list)) else {"x": [{}]}
        with pytest.raises(ValueError, match=f"^{keys[0]}[.:[]"):
            parse_record(changed(keys, wrong))


@pytest.mark.parametrize(
    ("keys", "value", "sentence"),
    [
        (("settings", "safety", "on_flagged"), "hide", "settings.safety.on_flagged: Invalid enum value 'hide'"),
        (("settings", "table", "folder"), 7, "settings.table.folder: expected a path, got int"),
        (("compute", "slots"), 0, "compute.slots: Expected `int` >= 1"),
        (("compute", "slots"), True, "compute.slots: Expected `int`, got `bool`"),
        (("survey", "finished_at"), "yesterday", "survey.finished_at: Invalid RFC3339 encoded datetime"),
        (("summary",), [], "summary: Expected `object | null`, got `array`"),
        (("rules", "sizes", "factor"), "8", "rules.sizes.factor: Expected `int`, got `str`"),
        (("identity",), "m", "identity: Expected `object`, got `str`"),
    ],
)
def test_every_command_names_the_key(tmp_path: Path, keys: Keys, value: Any, sentence: str) -> None:
    out = tmp_path / "out"
    table = tmp_path / "t.csv"
    table.write_text("caption\nx\n")
    out.mkdir()
    outdir.write_run(LocalStore(out), changed(keys, value))
    before = (out / "run.json").read_bytes()
    for line in (
        ("status", out),
        ("merge", out),
        ("retry", out, "--status", "failed"),
        ("rescore", out, "--safety", "checker"),
        ("run", table, "-o", out, "--column", "prompt=caption", "--num-processes", "0", "--device", "cpu"),
    ):
        done = command(*line)
        assert (done.code, done.stdout) == (2, ""), line
        assert f"{out / 'run.json'} is damaged or was edited: {sentence}" in done.stderr
        assert "remove it to continue" in done.stderr and "Traceback" not in done.stderr
    assert (out / "run.json").read_bytes() == before
    assert {path.name for path in out.iterdir()} <= {"run.json", ".lock"}


@pytest.mark.parametrize(
    ("key", "line"),
    [("settings", ("merge",)), ("rules", ("merge",)), ("settings", ("rescore", "--safety", "checker"))],
)
def test_a_key_that_another_version_does_not_write_is_named(tmp_path: Path, key: str, line: tuple[str, ...]) -> None:
    record = {name: value for name, value in RECORD.items() if name not in (key, "rescoring", "unrepeatable_tables")}
    outdir.write_run(LocalStore(tmp_path), record)
    done = command(line[0], tmp_path, *line[1:])
    assert done.code == 2
    assert f"has no {key}, so another version of batch-infer wrote it: continue with `batch-infer run`" in done.stderr


def test_keys_that_an_earlier_version_did_not_write_take_their_defaults() -> None:
    """Keys of a later version are ignored."""
    record = copy.deepcopy(RECORD)
    del record["settings"]["model"]["long_prompts"], record["settings"]["compute"]["processes"]
    del record["rules"]["fixed"], record["compute"]["by_size"], record["rendering_since"], record["unreadable_tables"]
    record["settings"]["model"]["of a later version"] = record["of a later version"] = {"x": 1}
    parsed = parse_record(record)
    assert parsed.settings == SETTINGS
    assert parsed.rules == RULES


WRONG: tuple[Any, ...] = (None, True, 0, -1, 10**30, 1.5, float("nan"), "", "x", [], {})
READ_BY_PEOPLE = ("finished_at", "versions", "summary.", "survey.sizes", "survey.reasons", "survey.changes", "model.")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that contains a table of one row and its OUT."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(write_csv(folder / "t.csv", [["prompt"], ["a red circle"]]), folder / "out", "--steps", "1").code == 0
    return folder


def wrong_records(record: dict[str, Any]) -> Iterator[tuple[Keys, Any, dict[str, Any]]]:
    """Yield each key of run.json with each value in WRONG that its type accepts, and the edited run.json."""
    for keys in keys_of(record):
        for value in WRONG:
            edited = changed(keys, value, record)
            with suppress(ValueError):
                parse_record(edited)
                yield keys, value, edited


def assert_no_traceback(folder: Path, *names: str, left_out: tuple[str, ...] = (), every: int = 1) -> None:
    """Run commands on OUT with each of these run.json files. `command` raises unexpected exceptions."""
    out = folder / "out"
    lines: dict[str, tuple[str | Path, ...]] = {
        "status": ("status", out),
        "merge": ("merge", out),
        "retry": ("retry", out, "--status", "failed"),
        "rescore": ("rescore", out, "--safety", "checker"),
        "run": ("run", folder / "t.csv", "-o", out, *QUICK, "--steps", "1"),
    }
    records = wrong_records(json.loads((out / "run.json").read_text()))
    for keys, value, edited in islice(records, 0, None, every):
        if not ".".join(map(str, keys)).startswith(left_out or ("none",)):
            for name in names:
                outdir.write_run(LocalStore(out), edited)
                assert command(*lines[name]).code in (0, 2, 3, 75), (name, keys, value)


def test_a_sample_of_wrong_values_gives_no_traceback(finished: Path, tmp_path: Path) -> None:
    """Check one of every 60 values. The test below checks all of them."""
    shutil.copytree(finished, tmp_path / "copy")
    assert_no_traceback(tmp_path / "copy", "status", "merge", every=60)


@pytest.mark.promises
@pytest.mark.parametrize("name", ["status", "merge", "retry", "rescore", "run"])
def test_no_wrong_value_gives_a_traceback(finished: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    assert_no_traceback(tmp_path / "copy", name, left_out=READ_BY_PEOPLE)


def test_a_limit_may_exceed_the_number_of_rows(finished: Path, tmp_path: Path) -> None:
    done = command("run", finished / "t.csv", "-o", tmp_path / "out", *QUICK, "--steps", "1", "--limit", str(10**30))
    assert done.code == 0, done.stderr


def test_a_run_without_a_number_is_continued(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    out = tmp_path / "copy" / "out"
    outdir.write_run(LocalStore(out), {**json.loads((out / "run.json").read_text()), "run_number": None})
    assert command("run", tmp_path / "copy" / "t.csv", "-o", out, *QUICK, "--steps", "1").code == 0


def test_contradictory_settings_in_run_json_are_named(tmp_path: Path) -> None:
    outdir.write_run(LocalStore(tmp_path), changed(("settings", "output", "base64"), True))
    done = command("status", tmp_path)
    assert done.code == 2
    assert f"{tmp_path / 'run.json'} is damaged or was edited: settings: --base64 needs results.csv" in done.stderr


@pytest.mark.parametrize("content", ["[" * 100_000 + "]" * 100_000, '{"identity": ' + "9" * 5_000 + "}"])
def test_unparsable_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UsageError, match=r"run.json .*, or remove it to continue"):
        outdir.read_run(LocalStore(tmp_path))
