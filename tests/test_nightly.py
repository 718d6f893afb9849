"""Test examples/nightly: three nights with cron and three with systemd, on a growing table."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from batch_infer.errors import RetryableError
from tests.runs import assert_whole, results

NIGHTLY = Path(__file__).parent.parent / "examples" / "nightly"
APPEND = NIGHTLY / "append.py"
ANALYZE = shutil.which("systemd-analyze")


@dataclass(frozen=True)
class Crontab:
    """A crontab with one job: variables, schedule, command and standard input."""

    variables: dict[str, str]
    schedule: list[str]
    command: str
    stdin: str

    @classmethod
    def read(cls, path: Path) -> Crontab:
        """Parse a file as crontab(5) describes: a % without a backslash ends the command."""
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
        settings = [re.fullmatch(r"(\w+)\s*=\s*(.*)", line) for line in lines]
        (job,) = (line for line, setting in zip(lines, settings, strict=True) if not setting)
        *schedule, entry = job.split(None, 5)
        command, *stdin = re.split(r"(?<!\\)%", entry)
        variables = {match[1]: match[2].strip("\"'") for match in settings if match}
        return cls(variables, schedule, command.replace(r"\%", "%"), "\n".join(stdin))


def read_unit(path: Path) -> dict[str, list[str]]:
    """Return the settings of a systemd unit, each with its values in order."""
    values: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith(("#", ";", "[")):
            name, _, value = line.partition("=")
            values.setdefault(name, []).append(value)
    return values


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a home folder with a copy of the example and the environment of its README."""
    home = tmp_path / "a home"
    shutil.copytree(NIGHTLY, home / "nightly")
    (home / "nightly" / ".venv").symlink_to(sys.prefix)
    config = home / "nightly" / "job.toml"
    config.write_text(config.read_text().replace("steps = 20", "steps = 2"))
    return home


Done = subprocess.CompletedProcess[str]


def by_cron(home: Path) -> Done:
    """Run the job with /bin/sh in the home folder, with the variables that cron sets."""
    crontab = Crontab.read(home / "nightly" / "crontab")
    variables = {"HOME": str(home), "LOGNAME": "nobody", "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin"}
    shell = ["/bin/sh", "-c", crontab.command]
    return _run(shell, home, {**variables, **crontab.variables}, crontab.stdin)


def by_systemd(home: Path) -> Done:
    """Run the commands of the service without a shell, up to the first that fails."""
    service = read_unit(home / "nightly" / "batch-infer.service")
    variables = {"HOME": str(home), "LOGNAME": "nobody", "USER": "nobody", "SHELL": "/bin/sh",
                 "PATH": "/usr/local/bin:/usr/bin:/bin"}  # fmt: skip
    (folder,) = (_expand(value, home) for value in service["WorkingDirectory"])
    (start,) = service["ExecStart"]
    for line in (*service["ExecStartPre"], start):
        words = [_expand(word, home) for word in shlex.split(line)]
        assert Path(words[0]).is_absolute()
        done = _run(words, Path(folder), variables, "")
        if done.returncode:
            break
    return done


def _expand(text: str, home: Path) -> str:
    assert "$" not in text, "this function does not expand variables"
    return re.sub("%(.)", lambda match: {"h": str(home), "%": "%"}[match[1]], text)


def _run(line: list[str], folder: Path, variables: dict[str, str], stdin: str) -> Done:
    return subprocess.run(
        line, cwd=folder, env=variables, input=stdin, capture_output=True, text=True, check=False, timeout=600
    )


def read_metrics(file: Path) -> dict[str, float]:
    families = text_string_to_metric_families(file.read_text())
    samples = [sample for family in families for sample in family.samples if "status" not in sample.labels]
    return {sample.name.removeprefix("batch_infer_"): sample.value for sample in samples}


@pytest.mark.promises
@pytest.mark.parametrize(
    ("night", "new_row_counts"), [(by_cron, (2, 1, 1)), (by_systemd, (2, 1, 0))], ids=["cron", "systemd"]
)
def test_three_nights(home: Path, night: Callable[[Path], Done], new_row_counts: tuple[int, ...]) -> None:
    folder = home / "nightly"
    before: dict[str, dict[str, Any]] = {}
    written: dict[str, int] = {}
    for day, new in enumerate(new_row_counts):
        if new:
            (folder / "inbox").mkdir(exist_ok=True)
            (folder / "inbox" / f"day {day}.txt").write_text("a large red circle\n" * new)
        started = datetime.now(timezone.utc)
        done = night(home)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        now = {row["id"]: row for row in results(folder / "out")}
        assert len(now) == len(results(folder / "out")) == sum(new_row_counts[: day + 1])
        assert {name: now[name] for name in before} == before, "finished rows do not change in any column"
        assert {row["attempt"] for row in now.values()} == {1}
        assert all(row["finished_at"] > started for name, row in now.items() if name not in before)
        images = {path.name: path.stat().st_mtime_ns for path in (folder / "out" / "images").rglob("*.png")}
        assert written.items() <= images.items()
        assert len(images) == len(now)
        values = read_metrics(folder / "nightly.prom")
        assert (values["exit_code"], values["running"], values["images_rendered"]) == (0, 0, new)
        assert values["last_success_timestamp_seconds"] == values["end_timestamp_seconds"] >= started.timestamp()
        before, written = now, images
    assert_whole(folder / "out")
    assert len((folder / "out" / "results.csv").read_text().splitlines()) == sum(new_row_counts) + 1


def test_night_without_a_table_is_an_error(home: Path) -> None:
    for night in (by_cron, by_systemd):
        done = night(home)
        assert (done.returncode, done.stdout) == (1, "")
        assert "inbox has no prompts" in done.stderr
        assert not (home / "nightly" / "out").exists()


def test_crontab_is_valid() -> None:
    crontab = Crontab.read(NIGHTLY / "crontab")
    assert (list(crontab.variables), crontab.stdin) == (["MAILTO"], "")
    assert all(re.fullmatch(r"\*|\d+", field) for field in crontab.schedule)
    minute, hour, *others = crontab.schedule
    assert (int(minute) < 60, int(hour) < 24, others) == (True, True, ["*", "*", "*"])


@pytest.mark.parametrize(("code", "mailed"), [(0, ""), (75, ""), (3, "said\n"), (1, "said\n")])
def test_command_for_cron_is_silent_for_75(tmp_path: Path, code: int, mailed: str) -> None:
    """Run the command of the README with stub programs."""
    command = re.findall(r"^    (cd .*)$", (NIGHTLY / "README.md").read_text(), re.MULTILINE)[-1]
    programs = tmp_path / "nightly" / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, end in (("python", 0), ("batch-infer", code)):
        (programs / name).write_text(f"#!/bin/sh\n{'echo said >&2' if end else ':'}\nexit {end}\n")
        (programs / name).chmod(0o755)
    done = _run(["/bin/sh", "-c", command], tmp_path, {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, "")
    assert done.stdout + done.stderr == mailed


def test_only_unattended_runs_are_quiet() -> None:
    texts = [(NIGHTLY / name).read_text() for name in ("crontab", "batch-infer.service", "README.md")]
    ends = [end for text in texts for end in re.findall(r"batch-infer run prompts\.jsonl --config job\.toml(.*)", text)]
    assert [end.startswith(" -q") for end in ends] == [True, True, False, True]
    assert "quiet" not in (NIGHTLY / "job.toml").read_text()


def test_service_treats_75_as_success_and_leaves_time_to_stop() -> None:
    service = read_unit(NIGHTLY / "batch-infer.service")
    assert service["SuccessExitStatus"] == [str(RetryableError.exit_code)]
    assert (service["Type"], service["KillSignal"]) == (["oneshot"], ["SIGTERM"])
    assert not {"Restart", "RestartForceExitStatus"} & service.keys(), "it would start again at once"


@pytest.mark.skipif(ANALYZE is None, reason="systemd is not installed")
def test_systemd_accepts_the_units(home: Path, tmp_path: Path) -> None:
    folder = home / "nightly"
    line = [str(ANALYZE), "verify", "--user", str(folder / "batch-infer.service"), str(folder / "batch-infer.timer")]
    done = _run(line, tmp_path, {"HOME": str(home), "XDG_RUNTIME_DIR": str(tmp_path), "PATH": os.environ["PATH"]}, "")
    if "initialize manager" in done.stderr:
        pytest.skip("systemd-analyze does not work on this machine")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    (when,) = read_unit(NIGHTLY / "batch-infer.timer")["OnCalendar"]
    subprocess.run([str(ANALYZE), "calendar", when], check=True, capture_output=True)


# append.py


def run_append(folder: Path) -> Done:
    return _run([sys.executable, str(APPEND), "prompts.jsonl", "inbox"], folder, dict(os.environ), "")


def add_to_inbox(folder: Path, name: str, text: str) -> None:
    (folder / "inbox").mkdir(exist_ok=True)
    (folder / "inbox" / name).write_text(text, "utf-8")


def read_table(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "prompts.jsonl").read_text("utf-8").splitlines()
    return [(row["id"], row["prompt"]) for row in map(json.loads, lines)]


def test_files_are_appended_once(tmp_path: Path) -> None:
    add_to_inbox(tmp_path, "b.txt", 'one\n\n  two, ünder "quotes"  \n')
    add_to_inbox(tmp_path, "a.txt", "zero")
    add_to_inbox(tmp_path, "half.tmp", "not whole")
    assert (done := run_append(tmp_path)).returncode == 0, done.stderr
    first = [("a-000000", "zero"), ("b-000000", "one"), ("b-000002", 'two, ünder "quotes"')]
    assert read_table(tmp_path) == first
    assert sorted(path.name for path in (tmp_path / "inbox" / "taken").iterdir()) == ["a.txt", "b.txt"]
    add_to_inbox(tmp_path, "0.txt", "later")
    assert run_append(tmp_path).returncode == 0
    assert read_table(tmp_path) == [*first, ("0-000000", "later")], "rows are only appended"
    os.utime(tmp_path / "prompts.jsonl", (0, 0))
    before = (tmp_path / "prompts.jsonl").stat()
    assert run_append(tmp_path).returncode == 0
    after = (tmp_path / "prompts.jsonl").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "nothing is written"


def test_crash_before_files_are_moved_duplicates_no_rows(tmp_path: Path) -> None:
    add_to_inbox(tmp_path, "a.txt", "one\ntwo")
    assert run_append(tmp_path).returncode == 0
    add_to_inbox(tmp_path, "a.txt", "one\ntwo")
    (tmp_path / ".prompts.jsonl.new").write_text("half of a li")
    add_to_inbox(tmp_path, "b.txt", "three")
    assert run_append(tmp_path).returncode == 0
    assert read_table(tmp_path) == [("a-000000", "one"), ("a-000001", "two"), ("b-000000", "three")]
    assert not list((tmp_path / "inbox").glob("*.txt")) + list(tmp_path.glob(".*"))


def test_file_with_an_error_stays_and_is_named(tmp_path: Path) -> None:
    add_to_inbox(tmp_path, "a.txt", "one")
    assert run_append(tmp_path).returncode == 0
    add_to_inbox(tmp_path, "a.txt", "two")
    (tmp_path / "inbox" / "latin.txt").write_bytes("grün".encode("latin-1"))
    (tmp_path / "inbox" / "folder.txt").mkdir()
    add_to_inbox(tmp_path, "0.txt", "\ufeffzero")
    done = run_append(tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), "the run continues"
    lines = done.stderr.splitlines()
    assert [line.partition(" is not appended: ")[0] for line in lines] == [
        f"inbox/{name}.txt" for name in ("a", "folder", "latin")
    ]
    assert lines[0].endswith("a file of this name with other prompts was appended before; give it a new name")
    assert read_table(tmp_path) == [("a-000000", "one"), ("0-000000", "zero")], "without the BOM"
    assert sorted(path.name for path in (tmp_path / "inbox").glob("*.txt")) == ["a.txt", "folder.txt", "latin.txt"]
    assert (tmp_path / "inbox" / "taken" / "a.txt").read_text() == "one"
