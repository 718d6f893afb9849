"""Check keyword arguments of the Python API as options of the commands, and turn those of `run` into settings."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

import click

from batch_infer.cli.run import run
from batch_infer.cli.settings import make_run_settings
from batch_infer.errors import SettingsError
from batch_infer.settings import RunSettings


def make_settings(tables: tuple[str, ...], keywords: Mapping[str, Any]) -> tuple[RunSettings, dict[str, Any]]:
    """Return the settings of a run, and the values of all options under click's names. Raises SettingsError.

    Keywords have the long names of the options, with underscores for hyphens. Neither BATCH_INFER_ variables nor
    configuration files are read, but the variables of the content safety service are.
    """
    values = {"tables": tables, **convert_keywords(run, keywords)}
    return make_run_settings(values), values


def convert_keywords(command: click.Command, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a command's options under click's names. Raises SettingsError.

    An option without a keyword, or with None, has its default.
    """
    context = click.Context(command)
    options = options_by_keyword(command)
    return {str(option.name): _convert(name, keywords.get(name), option, context) for name, option in options.items()}


def options_by_keyword(command: click.Command = run) -> dict[str, click.Option]:
    """Return the options of a command for which its function in Python has a keyword argument."""
    names = {
        next(opt for opt in option.opts if opt.startswith("--")).removeprefix("--").replace("-", "_"): option
        for option in command.params
        if isinstance(option, click.Option)
    }
    shell_only = ("config", "json", "no_progress", "quiet", "verbose", "log_format")
    return {name: option for name, option in names.items() if name not in shell_only}


def _convert(name: str, value: Any, option: click.Option, context: click.Context) -> Any:
    """Convert and check a value as if it were given on the command line. None is the option's default."""
    if value is None and name == "out":
        raise SettingsError("out=None: pass a folder or a URL")
    if value is None:
        default = option.get_default(context)  # click uses a sentinel for no default
        has_default = isinstance(default, (str, int, float))
        return option.type_cast_value(context, default) if has_default else () if option.multiple else None
    if option.is_flag:
        if not isinstance(value, bool):
            raise SettingsError(f"{name}={value!r}: pass True or False")
        return value
    if isinstance(value, Mapping) and name == "column":
        value = [f"{field}={column}" for field, column in value.items()]
    if name == "provenance" and isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    is_single = isinstance(value, (str, os.PathLike)) or not isinstance(value, Iterable)
    if not is_single and not option.multiple:
        raise SettingsError(f"{name}={value!r}: pass one value")
    texts = [_to_text(name, item) for item in ([value] if is_single else value)]
    try:
        return option.type_cast_value(context, texts if option.multiple else texts[0])
    except click.BadParameter as error:
        raise SettingsError(f"{name}={value!r}: {error.message}") from error


def _to_text(name: str, value: Any) -> str:
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:  # a NumPy number
        value = value.item()
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise SettingsError(f"{name}={value!r}: pass a string or a number")
    text = str(value)
    return f"{Decimal(text):f}" if isinstance(value, float) and "e-" in text else text  # durations have no exponents
