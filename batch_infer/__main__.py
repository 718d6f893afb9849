"""The command line's entry: `batch-infer` and `python -m batch_infer`."""

from __future__ import annotations

import sys

import click

from batch_infer.cli import commands
from batch_infer.errors import BatchInferError, Interrupted


def main() -> None:
    """Run the command and end the process with its exit code; a fault of the user's or the world's is one sentence."""
    try:
        code = commands.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except BatchInferError as error:
        click.echo(f"batch-infer: {error}", err=True)
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("batch-infer: interrupted; what was committed is kept, the same command goes on", err=True)
        code = Interrupted.exit_code
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
