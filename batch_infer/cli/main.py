"""The commands of batch-infer. No torch here: --help answers at once."""

from __future__ import annotations

import click

from batch_infer import __version__
from batch_infer.cli.azureml_simulate import azureml_simulate
from batch_infer.cli.bench import bench
from batch_infer.cli.export_mlflow import export_mlflow
from batch_infer.cli.merge import merge
from batch_infer.cli.plan import plan
from batch_infer.cli.rescore import rescore
from batch_infer.cli.retry import retry
from batch_infer.cli.run import run
from batch_infer.cli.status import status


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="batch-infer")
def commands() -> None:
    """Render tables of prompts into images and a results table that accounts for every row."""


for command in (run, plan, status, retry, rescore, merge, bench, azureml_simulate, export_mlflow):
    commands.add_command(command)
