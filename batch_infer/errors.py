"""Define the exceptions of batch-infer.

Any other uncaught exception is a bug and ends the command with a traceback and exit code 1.
"""

from __future__ import annotations

from typing import Any


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class BatchInferError(Exception):
    """Base class of errors with a message for the user. The command exits with `exit_code`."""

    exit_code = 1

    @classmethod
    def from_text(cls, text: str) -> BatchInferError:
        """Return an error of this class with the text of an error from another process."""
        return cls(text)


class UsageError(BatchInferError):
    """The command cannot succeed until its options, its input or OUT changes."""

    exit_code = 2


class SettingsError(UsageError):
    """Settings are invalid or conflict, or do not suit OUT, this machine or a service."""


class CompilationError(SettingsError):
    """torch.compile failed.

    `run` continues without torch.compile unless --compile was given, OUT contains images, or a launcher started it.
    """


class TableError(UsageError):
    """A table, or the body of an HTTP request, cannot be read."""


class ModelError(UsageError):
    """The model cannot be loaded, or does not support the settings."""


class DamagedPartError(UsageError):
    """A manifest part is damaged. `part` is its location. `run` sets it aside and continues."""

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(part, reason)  # pickling needs both arguments
        self.part, self.reason = part, reason

    @classmethod
    def from_text(cls, text: str) -> BatchInferError:
        """Return a plain UsageError, since `part` cannot be restored from the text."""
        return UsageError(text)

    def __str__(self) -> str:
        return f"{self.part} is damaged ({self.reason}); run again to set it aside and render its rows again"


class NewerPartError(UsageError):
    """A later version of batch-infer wrote a manifest part."""


class RetryableError(BatchInferError):
    """Base class of errors after which the same command can be run again to continue."""

    exit_code = 75


class LockedError(RetryableError):
    """Another process has locked OUT."""


class StorageError(RetryableError):
    """A file or folder cannot be read or written, for example because the disk is full."""


class ServiceError(RetryableError):
    """A network service fails or does not respond."""


class StoppedError(RetryableError):
    """SIGINT, SIGTERM, SIGHUP or the time limit stopped the command."""


class TooManyFailedError(BatchInferError):
    """A run has finished, but more rows failed or were invalid than allowed. Only `batch_infer.run` raises this.

    `summary` is the `batch_infer.Summary` of the run, whose results are complete.
    """

    exit_code = 3
    summary: Any = None


class RowError(BatchInferError):
    """A single row cannot be processed. The error determines the row's status and never ends a run."""


class FailedRowError(RowError):
    """A row failed, perhaps only temporarily, so later runs retry it."""
