"""Write the reference of all commands from their click definitions."""

from __future__ import annotations

import inspect
import re
from typing import cast

import click

from batch_infer.cli import commands
from batch_infer.cli.config import variables_of_option
from batch_infer.cli.run import run
from batch_infer.cli.sections import SectionedCommand

INTRODUCTION = """# Commands

Every command prints its result to stdout, and messages and progress to stderr. `batch-infer COMMAND -h` prints the text
of its section. Each option is followed by the environment variable that sets it;
[Configuration](configuration.md) describes these variables and the file of `--config`, and
[Results](results.md#exit-codes) the exit codes.

"""
_MARKUP = re.compile(r"([\\*_<>\[\]])")
_VERBATIM = "\b\n"
"""First line of a paragraph whose lines click does not wrap."""


def command_reference() -> str:
    """Return the reference as Markdown, with a section per command."""
    return INTRODUCTION + "\n".join(_section(name, command) for name, command in commands.commands.items())


def _section(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"batch-infer {name}")
    usage = f"```text\nbatch-infer {name} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    help_text = "\n\n".join(map(_paragraph, inspect.cleandoc(command.help or "").split("\n\n")))
    lines, shared = [f"## {name}\n", usage, help_text, ""], []
    groups = _grouped_options(command)
    entries_of_run = {_entry(option) for options in _grouped_options(run).values() for option in options}
    for title, options in groups.items():
        common = [option for option in options if command is not run and _entry(option) in entries_of_run]
        own = [option for option in options if option not in common]
        shared += common
        lines += [f"**{title}**\n"] * bool(own and len(groups) > 1)
        lines += map(_entry, own)
    if shared:
        names = ", ".join(f"`{max(option.opts, key=len)}`" for option in shared)
        lines.append(f"These options are described in [run](#run): {names}.\n")
    return "\n".join(lines)


def _grouped_options(command: click.Command) -> dict[str, list[click.Option]]:
    """Return the options by title, without --help, which every command has."""
    groups = cast("SectionedCommand", command).group_options(click.Context(command))
    return {title: [option for option in options if option in command.params] for title, options in groups.items()}


def _entry(option: click.Option) -> str:
    """Return an entry of a definition list: the names and variables of an option, and its help."""
    names, text = option.get_help_record(click.Context(click.Command("help"))) or ("", "")
    variables = "".join(f" · `{variable}`" for variable in variables_of_option(option))
    return f"`{names}`{variables}\n:   {_escape(' '.join(text.split())) or 'See above.'}\n"


def _paragraph(text: str) -> str:
    if text.startswith(_VERBATIM):
        return f"```text\n{text.removeprefix(_VERBATIM)}\n```"
    return _escape(text)


def _escape(text: str) -> str:
    """Escape the characters that Markdown would interpret, except in code between backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else _MARKUP.sub(r"\\\1", part) for part in parts)
