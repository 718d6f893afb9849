"""Print the options of a command under titles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click


@dataclass(frozen=True, slots=True)
class Section:
    """Options that the help prints under a title."""

    title: str
    options: tuple[click.Option, ...]


class SectionedCommand(click.Command):
    """A command whose help prints the options of each section under its title, and all others after them."""

    def __init__(self, *args: Any, sections: Sequence[Section] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, options in self.group_options(ctx).items():
            with formatter.section(title):
                formatter.write_dl([record for option in options if (record := option.get_help_record(ctx))])

    def group_options(self, ctx: click.Context) -> dict[str, list[click.Option]]:
        """Return the options, with --help, by title."""
        titles = {option: section.title for section in self.sections for option in section.options}
        other = "Other options" if titles else "Options"
        groups: dict[str, list[click.Option]] = {title: [] for title in (*(s.title for s in self.sections), other)}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option):
                groups[titles.get(param, other)].append(param)
        return groups


def flatten(params: Iterable[click.Parameter | Section]) -> Iterator[click.Parameter]:
    """Yield the parameters, and the options of each section."""
    for param in params:
        if isinstance(param, Section):
            yield from param.options
        else:
            yield param
