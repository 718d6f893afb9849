"""Read options from environment variables and the --config file, and suggest corrections of misspelt names.

A flag overrides the environment, and the environment overrides the file.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from batch_infer.cli.logs import set_log_format
from batch_infer.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "BATCH_INFER_"
ENDPOINT_VARIABLES = ("BATCH_INFER_PREDICTIONS", "BATCH_INFER_REQUEST_TIMEOUT")
"""Variables that only the Azure ML scoring scripts read."""
LAUNCH_VARIABLES = ("BATCH_INFER_LAUNCH_SECRET",)
"""Variables that only processes started by a launcher read."""
_KUBERNETES = re.compile(
    rf"{PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
"""Variables that Kubernetes sets by default in pods of a namespace with a service named batch-infer or batch-infer-NAME
(https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables)."""
SYNONYMS = {
    **dict.fromkeys(("num-inference-steps", "inference-steps", "num-steps", "sampling-steps"), "steps"),
    **dict.fromkeys(("guidance", "cfg", "cfg-scale"), "guidance-scale"),
    **dict.fromkeys(("batch-size", "batch"), "slots"),
    **dict.fromkeys(("num-images-per-prompt", "num-images", "n"), "images-per-prompt"),
    **dict.fromkeys(("negative", "neg-prompt"), "negative-prompt"),
    **dict.fromkeys(("output", "output-dir", "outdir", "out-dir"), "out"),
    **dict.fromkeys(("workers", "num-workers", "num-gpus", "gpus", "nproc-per-node"), "num-processes"),
    **dict.fromkeys(("checkpoint", "ckpt", "model-id", "pretrained-model-name-or-path"), "model"),
    **dict.fromkeys(("precision", "torch-dtype"), "dtype"),
    **dict.fromkeys(("format", "output-format"), "image-format"),
    **dict.fromkeys(("timeout", "max-time"), "time-limit"),
    "sampler": "scheduler",
    "max-failures": "max-failed",
}
"""Names that users of other tools may expect, and our options for them."""
_SIMILARITY = 0.7


def variable_of(option: str) -> str:
    """Return the environment variable for an option's long name."""
    return f"{PREFIX}{option.removeprefix('--').replace('-', '_').upper()}"


def variables_of_option(option: click.Option) -> list[str]:
    """Return the environment variables of an option."""
    if option.envvar is None:
        return [variable_of(str(option.name))]
    return [option.envvar] if isinstance(option.envvar, str) else list(option.envvar)


def _options_of(command: click.Command) -> list[click.Option]:
    """Return the options of a command, or of all commands of a group."""
    commands = command.commands.values() if isinstance(command, click.Group) else [command]
    return [param for member in commands for param in member.params if isinstance(param, click.Option)]


def variables_of(command: click.Command) -> set[str]:
    """Return the environment variables of the options of a command, or of all commands of a group."""
    return {name for option in _options_of(command) for name in variables_of_option(option)}


def _options_by_name(command: click.Command) -> dict[str, click.Option]:
    """Return the options of a command or group, except --config and --help, by long name without the leading dashes."""
    names = [(name, option) for option in _options_of(command) for name in option.opts if name.startswith("--")]
    return {name.removeprefix("--"): option for name, option in names if name not in ("--config", "--help")}


def _suggest(name: str, options: Iterable[str]) -> str | None:
    """Return the option whose name or synonym is most similar to `name`, or None if none is similar."""
    names = {option: option for option in options}
    candidates = {synonym: option for synonym, option in SYNONYMS.items() if option in names} | names
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=_SIMILARITY)
    return candidates[matches[0]] if matches else None


def _check_environment(group: click.Group) -> None:
    """Raise SettingsError if a BATCH_INFER_ variable has a value but is unknown to batch-infer and Kubernetes."""
    variables = variables_of(group).union(ENDPOINT_VARIABLES, LAUNCH_VARIABLES)
    options = {variable.removeprefix(PREFIX).lower().replace("_", "-"): variable for variable in variables}
    errors = []
    for name in sorted(name for name, value in os.environ.items() if value and name.startswith(PREFIX)):
        if name in variables or _KUBERNETES.fullmatch(name):
            continue
        match = _suggest(name.removeprefix(PREFIX).lower().replace("_", "-"), options)
        hint = f"did you mean {options[match]}?" if match else "remove it; `batch-infer run --help` lists the options"
        errors.append(f"no option reads the environment variable {name}: {hint}")
    if errors:
        raise SettingsError(" · ".join(errors))


def with_suggestion(error: click.ClickException) -> click.ClickException:
    """Return the error for an unknown option with a hint, if there is one, and other errors unchanged."""
    if not isinstance(error, click.NoSuchOption) or error.ctx is None:
        return error
    command, name = error.ctx.command, error.option_name.removeprefix("--")
    group = error.ctx.parent.command if error.ctx.parent else None
    siblings = group.commands if isinstance(group, click.Group) else {}
    if owners := [sibling for sibling, member in siblings.items() if name in _options_by_name(member)]:
        hint = f" It is an option of {', '.join(owners)}."
    else:
        match = _suggest(name, _options_by_name(command)) if error.option_name.startswith("--") else None
        hint = f" Did you mean --{match}?" if match else ""
    return click.UsageError(f"{command.name} has no option {error.option_name}.{hint}", ctx=error.ctx)


def detect_log_format() -> None:
    """Set the log format before click parses the command line, so that usage errors are logged in this format too."""
    name: Any = _option_value("log-format")
    if name is None and (path := _option_value("config")) is not None:
        try:
            values = _read(Path(path))
        except SettingsError:  # ignored here, because it is raised again when click processes the option
            values = {}
        name = values.get("log-format", values.get("log_format"))
    set_log_format("json" if name == "json" else "text")


def _option_value(option: str) -> str | None:
    """Return the value of an option on the command line, else that of its environment variable, else None."""
    value = os.environ.get(variable_of(option)) or None
    for previous, argument in zip(sys.argv, sys.argv[1:], strict=False):
        if previous == f"--{option}":
            value = argument
        elif argument.startswith(f"--{option}="):
            value = argument.partition("=")[2]
    return value


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise SettingsError(f"--config {path} is not TOML: {error}") from error
    return values


def _load(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Check the environment variables, and use the file's values as the command's defaults. Raises SettingsError.

    click calls this for every command, even without --config.
    """
    group = context.parent.command if context.parent else context.command
    if isinstance(group, click.Group):
        _check_environment(group)
    for option in _options_of(context.command):
        _check_single([name for name in variables_of_option(option) if os.environ.get(name)], "environment")
    if path is None:
        return
    all_options, command_options = _options_by_name(group), _options_by_name(context.command)
    values: dict[str, ConfigValue] = {}
    for key, value in _read(path).items():
        name = key.replace("_", "-")
        if name not in all_options:
            match = _suggest(name, all_options)
            hint = f"did you mean {match!r}?" if match else f"the options are {', '.join(sorted(all_options))}"
            raise SettingsError(f"{path}: there is no option {key!r}; {hint}")
        if name in command_options:  # ignore other commands' options: one file may serve several
            option = command_options[name]
            if earlier := values.get(str(option.name)):
                _check_single([earlier.key, key], str(path))
            values[str(option.name)] = ConfigValue(value, option, context, path, key)
    context.default_map = {**(context.default_map or {}), **values}


def _check_single(names: list[str], source: str) -> None:
    """Raise SettingsError if several names set the same option."""
    if len(names) > 1:
        raise SettingsError(f"{source}: {' and '.join(names)} set the same option; remove one of them")


@dataclass(frozen=True)
class ConfigValue:
    """A value from the file. click calls it only if neither a flag nor the environment overrides it."""

    value: Any
    option: click.Option
    context: click.Context
    path: Path
    key: str

    def __call__(self) -> Any:
        """Return the value as click expects it: a boolean for a flag, else text or a list. Raises SettingsError."""
        option, value = self.option, self.value
        if option.is_flag:
            if not isinstance(value, bool):
                raise self._error("write true or false")
            return value
        if isinstance(value, list) and not option.multiple:
            raise self._error("this option takes one value")
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, (str, int, float)) for item in items):
            raise self._error("write a string or a number")
        parsed: Any = [str(item) for item in items] if option.multiple else str(value)
        try:
            option.type_cast_value(self.context, parsed)
        except click.BadParameter as error:
            raise self._error(error.message) from error
        return parsed

    def __str__(self) -> str:
        """Return the default that --help shows."""
        return str(self.value)

    def _error(self, message: str) -> SettingsError:
        return SettingsError(f"{self.path}: {self.key} = {self.value!r}: {message}")


config_option = click.Option(
    ["--config"],
    type=click.Path(path_type=Path),
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_load,
    help="TOML file with options: `steps = 30`, `results = ['csv']`. One file may serve several commands; a key that "
    "is not an option of any command is an error. Flags and environment variables override the file.",
)
