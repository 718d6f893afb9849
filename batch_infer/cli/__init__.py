"""The commands of batch-infer. No torch here: --help answers at once."""

from __future__ import annotations

import click

from batch_infer import __version__
from batch_infer.cli.run import run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="batch-infer")
def commands() -> None:
    """Render tables of prompts into images and a results table that accounts for every row."""


commands.add_command(run)
