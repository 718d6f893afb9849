"""Complete the arguments of commands in a shell."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMPLETE_VARIABLE = "_BATCH_INFER_COMPLETE"
"""The variable with which a completion script asks `batch-infer` for words."""
_PATH_METAVAR = re.compile(r"\b(FILE|DIR|OUT)\b")


def complete_path(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Leave completion to the shell, which completes files and folders."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def is_path(metavar: str | None) -> bool:
    """Return whether the metavar of an option says that its value is a path."""
    return bool(metavar and _PATH_METAVAR.search(metavar))


def argument(name: str, metavar: str, **attributes: Any) -> click.Argument:
    """Return an argument that is a path or several, which the shell completes."""
    return click.Argument([name], metavar=metavar, shell_complete=complete_path, **attributes)
