"""Entry point of `batch-infer` and `python -m batch_infer`."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import click

from batch_infer.cli import (
    COMPLETE_VARIABLE,
    commands,
    detect_log_format,
    is_json,
    log_error,
    restore_stderr,
    with_suggestion,
)
from batch_infer.errors import BatchInferError, StoppedError, UsageError
from batch_infer.terminal import escape_controls, never_fail_to_encode


def main() -> None:
    """Run the command and exit with its code. An expected error prints one message, a bug prints a traceback."""
    _open_standard_streams()
    detect_log_format()
    try:
        code = _run()
    finally:
        restore_stderr()
    sys.exit(code)


def _open_standard_streams() -> None:
    """Open os.devnull for closed standard streams. Otherwise files opened later would get their descriptors."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8"))
    never_fail_to_encode(sys.stdout)
    never_fail_to_encode(sys.stderr)


def _run() -> int:
    try:
        Path.cwd()
    except FileNotFoundError:
        log_error("the current folder was removed: change to one that exists, and run again", UsageError.exit_code)
        return UsageError.exit_code
    try:
        return commands.main(standalone_mode=False, complete_var=COMPLETE_VARIABLE) or 0
    except click.ClickException as click_error:
        error = with_suggestion(click_error)
        if is_json():
            log_error(error.format_message(), error.exit_code)
        else:
            text = io.StringIO()
            error.show(text)
            click.echo(escape_controls(text.getvalue(), keep="\n"), err=True, nl=False)
        return error.exit_code
    except BatchInferError as error:
        log_error(error, error.exit_code)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        log_error("interrupted. Run the same command again to continue", StoppedError.exit_code)
        return StoppedError.exit_code


if __name__ == "__main__":
    main()
