"""Test that the README and --help agree with the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from batch_infer.cli import commands
from batch_infer.cli.run import run
from batch_infer.manifest import SCHEMA
from batch_infer.settings import FIELDS
from batch_infer.table.formats import FORMATS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (batch-infer .*?)(?: {2,}#.*)?$", README, re.MULTILINE)


def test_readme_shows_commands() -> None:
    assert len(COMMANDS) > 4


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_readme_are_valid(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    command = commands.commands[name]
    if "--help" in arguments:
        return
    with command.make_context(name, arguments) as context:
        names = {"tables", "out", "out_a", "folder"}
        assert names.intersection(name for name, value in context.params.items() if value) or name == "bench"


def test_every_table_format_is_in_the_readme_and_in_the_help_of_run() -> None:
    for ending in FORMATS:
        assert f"`{ending}`" in README
        assert re.search(rf"{re.escape(ending)}\b", run.help or "")


def test_every_command_is_in_the_readme() -> None:
    assert {shlex.split(line)[1] for line in COMMANDS} == set(commands.commands)


def test_options_of_the_readme_exist() -> None:
    parameters = [parameter for command in commands.commands.values() for parameter in command.params]
    options = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    text = re.sub(r"^    (torchrun|accelerate) .*$", "", README, flags=re.MULTILINE)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) - {"--help"} <= options


@pytest.mark.parametrize("command", commands.commands.values(), ids=list(commands.commands))
def test_every_option_has_a_help_text(command: click.Command) -> None:
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help or isinstance(parameter.type, click.Choice), parameter.name


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets
    assert {"demo", "test", "promises", "soak", "lint", "bench", "gpu-check"} <= targets


def test_columns_are_in_the_readme() -> None:
    for column in FIELDS:
        assert f"`{column}`" in README, column
    for column in SCHEMA.names[:7]:
        assert f"`{column}`" in README, column


def test_links_of_the_readme_exist() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


def test_exit_codes_are_in_the_readme_and_the_help() -> None:
    help_text = run.help or ""
    for code in ("0", "2", "3", "75", "1"):
        assert f"| {code} |" in README
        assert re.search(rf"\b{code}\b", help_text)
