"""Test that shells complete commands, options and files with the script of `batch-infer completion`."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batch_infer.cli.shells import is_path
from tests.runs import command

ROOT = Path(__file__).parent.parent

# Outside of an interactive session, bash calls no completion function: the script does, as bash would.
BASH = """
compopt() {{ echo "compopt $1 $2"; }}
source ./script
complete -p batch-infer
COMP_WORDS=({words}) COMP_CWORD={last}
_batch_infer_completion batch-infer
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a `batch-infer` with this code in PATH, and return a folder with its name."""
    path = tmp_path / "bin" / "batch-infer"
    path.parent.mkdir()
    path.write_text(
        f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} -m batch_infer "$@"\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")
    return tmp_path


def complete(shell: str, script: str, folder: Path) -> str:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (folder / "script").write_text(command("completion", shell).stdout)
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, cwd=folder, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["comp"], ["completion"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["run", "--num-proc"], ["--num-processes"]),
        (["run", "--image-format", "j"], ["jpeg"]),
        (["run", "pro"], ["compopt -o default"]),
        (["run", "--out", "o"], ["compopt -o default"]),
        (["run", "--lora-folder", "o"], ["compopt -o default"]),
        (["diff", "a", "b"], ["compopt -o default"]),
    ],
)
def test_bash_completes_commands_options_and_files(program: Path, words: list[str], expected: list[str]) -> None:
    script = BASH.format(words=shlex.join(["batch-infer", *words]), last=len(words))
    bound, *replies = complete("bash", script, program).split("\n")
    assert "-F _batch_infer_completion batch-infer" in bound
    assert [reply for reply in replies if reply] == expected


def test_fish_completes_commands(program: Path) -> None:
    replies = complete("fish", 'source ./script; complete -C "batch-infer complet"', program)
    assert replies.split("\t")[0] == "completion"


def test_zsh_binds_the_function(program: Path) -> None:
    script = "autoload -U compinit; compinit -D; source ./script; echo $_comps[batch-infer]"
    assert complete("zsh", script, program) == "_batch_infer_completion\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_default_is_the_shell_of_this_session(monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    assert command("completion").stdout == command("completion", shell).stdout


@pytest.mark.parametrize("shell", ["", "/bin/dash"])
def test_a_shell_without_completion_is_refused(monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    monkeypatch.setenv("SHELL", shell)
    done = command("completion")
    assert (done.code, done.stdout) == (2, "")
    assert "give one of bash, zsh, fish" in done.stderr


@pytest.mark.parametrize(
    ("metavar", "expected"),
    [("ID|DIR|FILE", True), ("FILE[:WEIGHT]", True), ("OUT", True), ("N", False), (None, False)],
)
def test_options_with_paths_are_recognized(metavar: str | None, expected: bool) -> None:
    assert is_path(metavar) == expected
