"""Settings that no command line gives: those of the BATCH_INFER_* variables, as `run` reads them."""

from __future__ import annotations

import click

from batch_infer.cli.asked import run_settings
from batch_infer.cli.run import run
from batch_infer.errors import SettingsError
from batch_infer.settings import RunSettings


def settings_of_environment(table: str, out: str) -> RunSettings:
    """What `batch-infer run TABLE --out OUT` would be asked to do in this environment. Raises SettingsError."""
    try:
        with run.make_context("run", ["--out", out, "--", table]) as context:
            return run_settings(context.params)
    except click.ClickException as error:
        raise SettingsError(error.format_message()) from error
