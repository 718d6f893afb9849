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
from batch_infer.cli.names import check_environment, options_of, suggest, variable_of, variables_of_option
from batch_infer.errors import SettingsError


def detect_log_format() -> None:
    """Set the log format before click parses the command line, because its errors are logged in that format too."""
    name: Any = _option_value("log-format")
    if name is None and (path := _option_value("config")) is not None:
        try:
            values = _read(Path(path))
        except SettingsError:  # raised again when the option is processed
            values = {}
        name = values.get("log-format", values.get("log_format"))
    set_log_format("json" if name == "json" else "text")


def _option_value(option: str) -> str | None:
    """Return the value of an option on the command line, or else in its environment variable."""
    value = os.environ.get(variable_of(option)) or None
    for previous, argument in zip(sys.argv, sys.argv[1:], strict=False):
        if previous == f"--{option}":
            value = argument
        elif argument.startswith(f"--{option}="):
            value = argument.partition("=")[2]
    return value


def _load(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Make the file's values the command's defaults, and check the environment's names. Raises SettingsError.

    click calls this for every command, also without --config.
    """
    group = context.parent.command if context.parent else context.command
    if isinstance(group, click.Group):
        check_environment(os.environ, group)
    own = options_of(context.command)
    for option in own.values():
        _check_single([name for name in variables_of_option(option) if os.environ.get(name)], "environment")
    if path is None:
        return
    known = options_of(group)
    values: dict[str, ConfigValue] = {}
    for key, value in _read(path).items():
        name = key.replace("_", "-")
        if name not in known:
            near = suggest(name, known)
            hint = f"did you mean {near!r}?" if near else f"the options are {', '.join(sorted(known))}"
            raise SettingsError(f"{path}: there is no option {key!r}; {hint}")
        if name in own:  # one file may serve several commands
            option = own[name]
            if earlier := values.get(str(option.name)):
                _check_single([earlier.key, key], str(path))
            values[str(option.name)] = ConfigValue(value, option, context, path, key)
    context.default_map = {**(context.default_map or {}), **values}


def _check_single(names: list[str], where: str) -> None:
    """Raise SettingsError if there are several names, all of which set the same option."""
    if len(names) > 1:
        raise SettingsError(f"{where}: {' and '.join(names)} set the same option; remove one of them")


@dataclass(frozen=True)
class ConfigValue:
    """A value of the file, which click calls only if neither a flag nor the environment overrides it."""

    value: Any
    option: click.Option
    context: click.Context
    path: Path
    key: str

    def __call__(self) -> Any:
        """Return the value in the form in which click reads it from the command line. Raises SettingsError."""
        option, value = self.option, self.value
        if option.is_flag:
            if not isinstance(value, bool):
                raise self._error("write true or false")
            return value
        if isinstance(value, list) and not option.multiple:
            raise self._error("this option takes one value")
        texts = [self._text(item) for item in (value if isinstance(value, list) else [value])]
        typed: Any = texts if option.multiple else texts[0]
        try:
            option.type_cast_value(self.context, typed)
        except click.BadParameter as error:
            raise self._error(error.message) from error
        return typed

    def __str__(self) -> str:
        """Return the default that --help shows."""
        return str(self.value)

    def _text(self, item: Any) -> str:
        if isinstance(item, bool) or not isinstance(item, (str, int, float)):
            raise self._error("write a text or a number")
        return str(item)

    def _error(self, message: str) -> SettingsError:
        return SettingsError(f"{self.path}: {self.key} = {self.value!r}: {message}")


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_load,
    help="TOML file with options: `steps = 30`, `results = ['csv']`. Flags and environment override it.",
)


def _read(path: Path) -> Mapping[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        values: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise SettingsError(f"--config {path} is not TOML: {error}") from error
    return values
