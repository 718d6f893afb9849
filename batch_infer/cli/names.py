"""Names that users type: options, their environment variables and --config keys, and the suggestion for a wrong one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

import click

from batch_infer.errors import SettingsError

PREFIX = "BATCH_INFER_"
ENDPOINT_VARIABLES = ("BATCH_INFER_PREDICTIONS", "BATCH_INFER_REQUEST_TIMEOUT")
"""Variables that only the Azure ML scoring scripts read."""
LAUNCH_VARIABLES = ("BATCH_INFER_LAUNCH_SECRET",)
"""Variables that only ranks under a launcher read. Every other one belongs to an option."""
_KUBERNETES = re.compile(
    rf"{PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
"""Kubernetes sets these in every pod of a namespace that has a service named batch-infer or batch-infer-NAME
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
"""What other tools call an option."""
_CUTOFF = 0.7


def options_of(command: click.Command) -> dict[str, click.Option]:
    """Return the options of a command, or of all commands of a group, by long name without dashes."""
    commands = command.commands.values() if isinstance(command, click.Group) else [command]
    return {
        name.removeprefix("--"): option
        for each in commands
        for option in each.params
        if isinstance(option, click.Option)
        for name in option.opts
        if name.startswith("--") and name not in ("--config", "--help")
    }


def variables_of(command: click.Command) -> set[str]:
    """Return the environment variables of a command's options, or of those of all commands of a group."""
    commands = command.commands.values() if isinstance(command, click.Group) else [command]
    options = [param for each in commands for param in each.params if isinstance(param, click.Option)]
    return {name for option in options for name in variables_of_option(option)}


def variables_of_option(option: click.Option) -> list[str]:
    """Return the environment variables that an option is read from."""
    if option.envvar is None:
        return [f"{PREFIX}{option.name}".upper()]
    return [option.envvar] if isinstance(option.envvar, str) else list(option.envvar)


def suggest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most likely meant, or None."""
    names = {each: each for each in known}
    meant = {synonym: option for synonym, option in SYNONYMS.items() if option in names} | names
    return next((meant[near] for near in difflib.get_close_matches(name, meant, n=1, cutoff=_CUTOFF)), None)


def check_environment(environment: Mapping[str, str], group: click.Group) -> None:
    """Raise SettingsError for a BATCH_INFER_ variable that has a value and that nothing reads."""
    known = variables_of(group).union(ENDPOINT_VARIABLES, LAUNCH_VARIABLES)
    unknown = sorted(
        name
        for name, value in environment.items()
        if value and name.startswith(PREFIX) and name not in known and not _KUBERNETES.fullmatch(name)
    )
    if unknown:
        raise SettingsError(" · ".join(_unknown_variable(name, known) for name in unknown))


def _unknown_variable(name: str, known: set[str]) -> str:
    options = {_as_option(variable): variable for variable in known}
    near = suggest(_as_option(name), options)
    hint = f"did you mean {options[near]}?" if near else "remove it; `batch-infer run --help` lists the options"
    return f"no option reads the environment variable {name}: {hint}"


def _as_option(variable: str) -> str:
    return variable.removeprefix(PREFIX).lower().replace("_", "-")


def with_suggestion(error: click.ClickException) -> click.ClickException:
    """Return the error for an unknown option with the option that is meant, any other error as it is."""
    if not isinstance(error, click.NoSuchOption) or error.ctx is None:
        return error
    command, name = error.ctx.command, error.option_name.removeprefix("--")
    owners = _owners(name, error.ctx.parent)
    if owners:
        hint = f" It is an option of {', '.join(owners)}."
    else:
        near = suggest(name, options_of(command)) if error.option_name.startswith("--") else None
        hint = f" Did you mean --{near}?" if near else ""
    return click.UsageError(f"{command.name} has no option {error.option_name}.{hint}", ctx=error.ctx)


def _owners(name: str, parent: click.Context | None) -> list[str]:
    """Return the commands that have this option."""
    group = parent.command if parent else None
    if not isinstance(group, click.Group):
        return []
    return [command for command, each in group.commands.items() if name in options_of(each)]
