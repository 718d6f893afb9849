"""Names of options, of their environment variables and of --config keys, and suggestions for misspelt ones."""

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
"""Variables that only processes started by a launcher read. Every other variable belongs to an option."""
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
"""Names that other tools use for our options."""
_SIMILARITY = 0.7


def variable_of(option: str) -> str:
    """Return the environment variable for an option's long name."""
    return f"{PREFIX}{option.removeprefix('--').replace('-', '_').upper()}"


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
    """Return the environment variables of the options of a command, or of all commands of a group."""
    commands = command.commands.values() if isinstance(command, click.Group) else [command]
    options = [param for each in commands for param in each.params if isinstance(param, click.Option)]
    return {name for option in options for name in variables_of_option(option)}


def variables_of_option(option: click.Option) -> list[str]:
    """Return the environment variables of an option."""
    if option.envvar is None:
        return [variable_of(str(option.name))]
    return [option.envvar] if isinstance(option.envvar, str) else list(option.envvar)


def suggest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to `name`, or None."""
    names = {each: each for each in known}
    candidates = {synonym: option for synonym, option in SYNONYMS.items() if option in names} | names
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=_SIMILARITY)
    return candidates[near[0]] if near else None


def check_environment(environment: Mapping[str, str], group: click.Group) -> None:
    """Raise SettingsError if a BATCH_INFER_ variable has a value but belongs to no option."""
    known = variables_of(group).union(ENDPOINT_VARIABLES, LAUNCH_VARIABLES)
    unknown = sorted(
        name
        for name, value in environment.items()
        if value and name.startswith(PREFIX) and name not in known and not _KUBERNETES.fullmatch(name)
    )
    if unknown:
        raise SettingsError(" · ".join(_unknown_variable(name, known) for name in unknown))


def _unknown_variable(name: str, known: set[str]) -> str:
    options = {_option_name(variable): variable for variable in known}
    near = suggest(_option_name(name), options)
    hint = f"did you mean {options[near]}?" if near else "remove it; `batch-infer run --help` lists the options"
    return f"no option reads the environment variable {name}: {hint}"


def _option_name(variable: str) -> str:
    return variable.removeprefix(PREFIX).lower().replace("_", "-")


def with_suggestion(error: click.ClickException) -> click.ClickException:
    """Add a suggestion to the error for an unknown option. Other errors are returned unchanged."""
    if not isinstance(error, click.NoSuchOption) or error.ctx is None:
        return error
    command, name = error.ctx.command, error.option_name.removeprefix("--")
    group = error.ctx.parent.command if error.ctx.parent else None
    siblings = group.commands if isinstance(group, click.Group) else {}
    if owners := [sibling for sibling, each in siblings.items() if name in options_of(each)]:
        hint = f" It is an option of {', '.join(owners)}."
    else:
        near = suggest(name, options_of(command)) if error.option_name.startswith("--") else None
        hint = f" Did you mean --{near}?" if near else ""
    return click.UsageError(f"{command.name} has no option {error.option_name}.{hint}", ctx=error.ctx)
