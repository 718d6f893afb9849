"""`--config FILE`: options from a TOML file. A flag beats the environment, and the environment beats the file."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from batch_infer.cli.logs import set_log_format
from batch_infer.cli.names import check_environment, options_of, suggest, variables_of_option
from batch_infer.errors import SettingsError


def detect_log_format() -> None:
    """Have the log's format as it can be told before the command line is read, which may be faulty, as may the file."""
    found: Any = _typed("log-format")
    if found is None and (path := _typed("config")) is not None:
        try:
            values = _read(Path(path))
        except SettingsError:  # told when the file is read for its own sake
            values = {}
        found = values.get("log-format", values.get("log_format"))
    set_log_format("json" if found == "json" else "text")


def _typed(option: str) -> str | None:
    """What stands after an option, or else in its environment variable."""
    found = os.environ.get(f"BATCH_INFER_{option.replace('-', '_').upper()}") or None
    for before, argument in zip(sys.argv, sys.argv[1:], strict=False):
        if before == f"--{option}":
            found = argument
        elif argument.startswith(f"--{option}="):
            found = argument.partition("=")[2]
    return found


def _load(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Make the file's values the command's defaults, and check the environment's names. Raises SettingsError.

    This runs for every command, also where no file is given.
    """
    group = context.parent.command if context.parent else context.command
    if isinstance(group, click.Group):
        check_environment(os.environ, group)
    own = options_of(context.command)
    for option in own.values():
        _refuse_two([name for name in variables_of_option(option) if os.environ.get(name)], "environment")
    if path is None:
        return
    known = options_of(group)
    values: dict[str, _Value] = {}
    for key, value in _read(path).items():
        name = key.replace("_", "-")
        if name not in known:
            raise SettingsError(f"{path}: there is no option {key!r}{_near(name, known)}")
        if name in own:  # one file may serve several commands
            option = own[name]
            if earlier := values.get(str(option.name)):
                _refuse_two([earlier.key, key], str(path))
            values[str(option.name)] = _Value(value, option, context, path, key)
    context.default_map = {**(context.default_map or {}), **values}


def _refuse_two(names: list[str], where: str) -> None:
    """Raise SettingsError if several names that set the same option are given."""
    if len(names) > 1:
        raise SettingsError(f"{where}: {' and '.join(names)} set the same option; remove one of them")


@dataclass(frozen=True)
class _Value:
    """A value of the file, which click calls for only where neither a flag nor the environment replaces it."""

    value: Any
    option: click.Option
    context: click.Context
    path: Path
    key: str

    def __call__(self) -> Any:
        """Return the value as it would be typed after the option. Raises SettingsError."""
        return _checked(self.value, self.option, self.context, f"{self.path}: {self.key} = {self.value!r}")

    def __str__(self) -> str:
        """Return the default that --help shows."""
        return str(self.value)


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_load,
    help="TOML file with options: `steps = 30`, `results = ['csv']`. Flags and environment beat it.",
)


def _read(path: Path) -> Mapping[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        found: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise SettingsError(f"--config {path} is not TOML: {error}") from error
    return found


def _checked(value: Any, option: click.Option, context: click.Context, where: str) -> Any:
    """A value as it would be typed after the option, so that click reads both alike. Raises SettingsError."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise SettingsError(f"{where}: say true or false")
        return value
    if isinstance(value, list) and not option.multiple:
        raise SettingsError(f"{where}: this option takes one value")
    values = [_text(item, where) for item in (value if isinstance(value, list) else [value])]
    typed: Any = values if option.multiple else values[0]
    try:
        option.type_cast_value(context, typed)
    except click.BadParameter as error:
        raise SettingsError(f"{where}: {error.message}") from error
    return typed


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise SettingsError(f"{where}: say a text or a number")
    return str(value)


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = suggest(name, known)
    return f"; did you mean {near!r}?" if near else f"; the options are {', '.join(sorted(known))}"
