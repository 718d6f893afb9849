"""Define the command group, and read the settings of `run` from environment variables instead of arguments."""

from __future__ import annotations

import copy
from collections.abc import Collection

import click

from batch_infer import __version__
from batch_infer.cli.azureml import azureml_simulate, export_mlflow
from batch_infer.cli.bench import bench
from batch_infer.cli.completion import completion
from batch_infer.cli.config import variables_of_option
from batch_infer.cli.diff import diff
from batch_infer.cli.existing import merge, rescore, status
from batch_infer.cli.export_recipe import export_recipe
from batch_infer.cli.gallery import gallery
from batch_infer.cli.plan import plan
from batch_infer.cli.run import retry, run
from batch_infer.cli.settings import make_run_settings
from batch_infer.cli.verify import verify
from batch_infer.errors import SettingsError
from batch_infer.settings import RunSettings


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="batch-infer")
def commands() -> None:
    """Render tables of prompts into images and a results table that accounts for every row."""


existing = (status, retry, rescore, merge, verify, diff, gallery, export_recipe)
for command in (run, plan, *existing, bench, azureml_simulate, export_mlflow, completion):
    commands.add_command(command)


def settings_from_environment(table: str, out: str, ignored: Collection[str] = ()) -> RunSettings:
    """Return the settings of `batch-infer run TABLE --out OUT` in this environment. Raises SettingsError.

    The options of `ignored` variables always have their defaults, even if the file in BATCH_INFER_CONFIG sets them.
    """
    endpoint_run = copy.copy(run)
    endpoint_run.params = [_without_sources(param, ignored) for param in run.params]
    parent = click.Context(commands, info_name="batch-infer")
    try:
        with endpoint_run.make_context("run", ["--out", out, "--", table], parent=parent) as context:
            return make_run_settings(context.params)
    except click.ClickException as error:
        raise SettingsError(error.format_message()) from error


def _without_sources(param: click.Parameter, ignored: Collection[str]) -> click.Parameter:
    """Return a copy of an ignored option (not --out) that always has its default, and other parameters unchanged."""
    if not isinstance(param, click.Option) or param.name == "out" or not {*variables_of_option(param)} & {*ignored}:
        return param
    option = copy.copy(param)
    option.envvar, option.opts, option.secondary_opts = None, [], []
    option.allow_from_autoenv = False
    return option
