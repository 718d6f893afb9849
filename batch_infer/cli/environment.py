"""Settings of `run` that come from the BATCH_INFER_* variables alone, without a command line."""

from __future__ import annotations

import copy
from collections.abc import Collection

import click

from batch_infer.cli.asked import make_run_settings
from batch_infer.cli.main import commands
from batch_infer.cli.names import variables_of_option
from batch_infer.cli.run import run
from batch_infer.errors import SettingsError
from batch_infer.settings import RunSettings


def settings_from_environment(table: str, out: str, ignored: Collection[str] = ()) -> RunSettings:
    """Return the settings that `batch-infer run TABLE --out OUT` would have in this environment.

    `ignored` names variables that are not read, nor are their options in a --config file: these options keep their
    defaults. Raises SettingsError.
    """
    options = [param for param in run.params if isinstance(param, click.Option)]
    fixed = [option for option in options if set(variables_of_option(option)) & set(ignored) and option.name != "out"]
    command = copy.copy(run)
    command.params = [_with_default(param) if param in fixed else param for param in run.params]
    parent = click.Context(commands, info_name="batch-infer")
    try:
        with command.make_context("run", ["--out", out, "--", table], parent=parent) as context:
            return make_run_settings(context.params)
    except click.ClickException as error:
        raise SettingsError(error.format_message()) from error


def _with_default(param: click.Parameter) -> click.Parameter:
    """Return the option under its own name, but read from nowhere: neither the environment nor a file names it."""
    option = copy.copy(param)
    option.envvar, option.opts, option.secondary_opts = None, [], []
    if isinstance(option, click.Option):
        option.allow_from_autoenv = False
    return option
