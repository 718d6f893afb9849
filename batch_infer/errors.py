"""Exceptions of batch-infer. The tree includes those defined in other modules.

    BatchInferError
    ├── UsageError          exit 2: nothing was rendered; the command or its settings must change
    │   ├── SettingsError   an invalid option, or options that conflict
    │   │   └── CompilationError   torch.compile failed; `run` continues without it unless --compile was given
    │   ├── TableError      no table can be read
    │   │   └── azureml.payload.TooManyImagesError   a real-time request has too many prompts
    │   ├── ModelError      the model cannot be loaded, or does not support the settings
    │   ├── DamagedPartError   a manifest part is corrupt; `run` sets it aside and continues
    │   └── NewerPartError  a manifest part was written by a later version of batch-infer
    ├── RetryableError      exit 75: run the same command again to continue
    │   ├── LockedError     another run has locked OUT
    │   ├── StorageError    OUT or the temporary folder cannot be read or written
    │   │   └── jobs.merge.MissingResultsError   the manifest lists fewer results than were committed
    │   ├── ServiceError    a network service does not respond
    │   ├── engines.protocol.WorkersLostError   every worker died, repeatedly
    │   ├── StoppedError    SIGINT, SIGTERM or the time limit
    │   └── serving.service.RequestCancelledError   the client of a real-time request disconnected or timed out
    └── RowError            an error in one row: sets the row's status and never ends a run
        ├── FailedRowError  a row failed for an unknown reason and is retried
        └── diffusion.solver.NotBatchableError   the scheduler cannot batch rows with different settings

Any other uncaught exception is a bug: exit 1 with a traceback.
"""

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
        """Return an error of this class from its message in another process."""
        return cls(text)


class UsageError(BatchInferError):
    exit_code = 2


class SettingsError(UsageError):
    pass


class CompilationError(SettingsError):
    pass


class TableError(UsageError):
    pass


class ModelError(UsageError):
    pass


class DamagedPartError(UsageError):
    """`part` is the path of the damaged part and `reason` describes the damage."""

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
    pass


class RetryableError(BatchInferError):
    exit_code = 75


class LockedError(RetryableError):
    pass


class StorageError(RetryableError):
    pass


class ServiceError(RetryableError):
    pass


class StoppedError(RetryableError):
    pass


class RowError(BatchInferError):
    pass


class FailedRowError(RowError):
    pass
