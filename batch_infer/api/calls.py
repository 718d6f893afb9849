"""Convert the arguments of a call from Python, and let Ctrl-C stop it."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import click

from batch_infer import cli
from batch_infer import settings as s
from batch_infer.engines import read_rank_info
from batch_infer.errors import BatchInferError, SettingsError, StoppedError
from batch_infer.stopping import CallStopper, StopRequested
from batch_infer.store import refuse_unprintable
from batch_infer.table import in_memory_tables, make_in_memory

if TYPE_CHECKING:
    import pandas as pd


class ArrowStream(Protocol):
    """A table of Arrow, a data frame of Polars, or another object with Arrow's PyCapsule interface."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


PathLike: TypeAlias = "str | os.PathLike[str]"
Table: TypeAlias = "PathLike | tuple[PathLike, ...] | list[str] | pd.DataFrame | ArrowStream"
"""A TABLE of the command, several as a tuple, a list of prompts, or a data frame. See `make_in_memory`."""
RESUME = "what was committed is kept: call the same function again to continue"
OLD_PAGE = "the old page is unchanged: call the same function again to continue"
UNCHANGED = "the verification is incomplete; nothing was changed"
_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")
log = logging.getLogger("batch_infer")

for _name in ("batch_infer", "py.warnings"):  # otherwise Python prints their warnings to stderr
    logging.getLogger(_name).addHandler(logging.NullHandler())


@contextmanager
def make_settings(table: Table, keywords: Mapping[str, Any]) -> Iterator[tuple[s.RunSettings, dict[str, Any]]]:
    """Yield the settings of a run, and the values of its options. Tables in memory can be read inside the context."""
    if read_rank_info() is not None:
        raise SettingsError("batch_infer.run does not run under a launcher: use the command `batch-infer run`")
    arguments, tables = name_tables(table)
    with in_memory_tables(tables), named_arguments(cli.options_by_keyword()):
        yield cli.make_settings(arguments, keywords)


@contextmanager
def named_arguments(options: Mapping[str, click.Option]) -> Iterator[None]:
    """Inside the context, let the messages of errors name the arguments of a function instead of its options."""
    try:
        yield
    except BatchInferError as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (name_arguments(error.args[0], options),)
        raise


def name_arguments(message: str, options: Mapping[str, click.Option]) -> str:
    """Replace the options in a message by the arguments of a function, except in commands, which are in backquotes.

    `options` are those of the command, by the name of the argument.
    """

    def name(match: re.Match[str]) -> str:
        keyword = match[1].replace("-", "_")
        if keyword in options:
            return f"{keyword}=True" if options[keyword].is_flag else keyword
        keyword = keyword.removeprefix("no_")
        is_negated_flag = match[0] in getattr(options.get(keyword), "secondary_opts", ())
        return f"{keyword}=False" if is_negated_flag else match[0]

    parts = message.split("`")
    return "`".join(part if index % 2 else _OPTION.sub(name, part) for index, part in enumerate(parts))


def parse_out(out: PathLike) -> str:
    """Return OUT, a path or a URL, in the form that messages show. Raises SettingsError."""
    text = cli.parse_out(os.fsdecode(out))
    refuse_unprintable(text)
    return text


def name_tables(table: Table) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the TABLE arguments, and the tables in memory by argument. Raises SettingsError, TableError."""
    paths = table if isinstance(table, tuple) else (table,)
    if all(isinstance(path, (str, os.PathLike)) for path in paths):
        return tuple(os.fsdecode(path) for path in paths if isinstance(path, (str, os.PathLike))), {}
    in_memory = None if isinstance(table, tuple) else make_in_memory(table)
    if in_memory is None:
        raise SettingsError(
            f"cannot read a table from {type(table).__name__}: pass a path, a tuple of paths, a list of prompts, or a "
            "DataFrame"
        )
    return (in_memory[0],), dict([in_memory])


@contextmanager
def stoppable(
    time_limit: float | None, metrics: AbstractContextManager[object] | None = None, hint: str = RESUME
) -> Iterator[CallStopper]:
    """Inside the context, let Ctrl-C stop the call cleanly. Raises KeyboardInterrupt afterwards."""
    message = "stopping; finished images are being committed" if hint == RESUME else "stopping"
    stop = CallStopper(time_limit, hint, log_stop=functools.partial(log.warning, message))
    try:
        with metrics or nullcontext():
            try:
                with stop:
                    yield stop
            except StopRequested:
                raise stop.error() from None
    except StoppedError as error:
        if stop.is_interrupted:
            raise KeyboardInterrupt(str(error)) from None
        raise
    if stop.is_interrupted:
        raise KeyboardInterrupt(str(stop.error()))


def parse_time_limit(value: float | str | None) -> float | None:
    """Return a time limit in seconds. Raises SettingsError."""
    try:
        return None if value is None else cli.parse_duration(value)
    except click.BadParameter as error:
        raise SettingsError(f"time_limit: {error.message}") from error
