"""The command line's entry: `batch-infer` and `python -m batch_infer`."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import click

from batch_infer.cli import commands, detect_log_format, is_json, log_error, restore_stderr, with_suggestion
from batch_infer.errors import BatchInferError, Interrupted, UsageError
from batch_infer.terminal import escape_controls, never_fail_to_encode


def main() -> None:
    """Run the command and end the process with its exit code; a fault of the user's or the world's is one sentence."""
    _fill_standard_streams()
    detect_log_format()
    try:
        code = _run()
    finally:
        restore_stderr()
    sys.exit(code or 0)


def _fill_standard_streams() -> None:
    """Put nothing where a standard stream is closed: a file that we open would else be what is written to."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8"))
    never_fail_to_encode(sys.stdout)
    never_fail_to_encode(sys.stderr)


def _has_folder() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def _run() -> int | None:
    if not _has_folder():
        log_error("the current folder was removed: change to one that exists, and run again", UsageError.exit_code)
        return UsageError.exit_code
    try:
        code: int | None = commands.main(standalone_mode=False)
    except click.ClickException as found:
        error = with_suggestion(found)
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
        log_error("interrupted. Run the same command again to continue", Interrupted.exit_code)
        return Interrupted.exit_code
    return code


if __name__ == "__main__":
    main()
