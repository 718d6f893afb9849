"""Define the exceptions of batch-infer. Any other uncaught exception is a bug: exit code 1 with a traceback."""

from __future__ import annotations

from pathlib import Path


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class BatchInferError(Exception):
    """Base class of errors with a message for the user. The command exits with `exit_code`."""

    exit_code = 1

    @classmethod
    def from_text(cls, text: str) -> BatchInferError:
        """Return an error of this class with the message of an error in another process."""
        return cls(text)


class UsageError(BatchInferError):
    """Nothing was rendered: the command or its settings must change."""

    exit_code = 2


class SettingsError(UsageError):
    """An option is invalid, or options conflict."""


class CompilationError(SettingsError):
    """torch.compile failed. `run` continues without it unless --compile was given."""


class TableError(UsageError):
    """No table can be read."""


class ModelError(UsageError):
    """The model cannot be loaded, or does not support the settings."""


class DamagedPartError(UsageError):
    """The manifest part at path `part` is damaged. `run` sets it aside and continues."""

    def __init__(self, part: Path, reason: str) -> None:
        super().__init__(part, reason)  # pickling needs both arguments
        self.part, self.reason = part, reason

    @classmethod
    def from_text(cls, text: str) -> BatchInferError:
        """Return a plain UsageError, since the text alone does not give `part`."""
        return UsageError(text)

    def __str__(self) -> str:
        return f"{self.part} is damaged ({self.reason}); run again: that sets it aside and renders its rows again"


class NewerPartError(UsageError):
    """A later version of batch-infer wrote a manifest part."""


class RetryableError(BatchInferError):
    """Run the same command again to continue."""

    exit_code = 75


class LockedError(RetryableError):
    """Another run has locked OUT."""


class StorageError(RetryableError):
    """OUT or the temporary folder cannot be read or written."""


class ServiceError(RetryableError):
    """A network service does not respond."""


class StoppedError(RetryableError):
    """SIGINT, SIGTERM, SIGHUP or the time limit stopped the command."""


class RowError(BatchInferError):
    """An error in one row sets the row's status and never ends a run."""


class FailedRowError(RowError):
    """A row failed for an unknown reason and is retried."""
