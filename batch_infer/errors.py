"""The errors that batch-infer raises by name. Errors of one package are defined there and drawn here.

    BatchInferError
    ├── UsageError          exit 2: nothing was rendered; the command or its settings must change
    │   ├── SettingsError   an option, or options that contradict each other
    │   │   └── CompilationError   torch.compile failed; `run` continues without it unless --compile was given
    │   ├── TableError      no table can be read
    │   │   └── azureml.payload.TooManyImages   more prompts than one real-time request may have
    │   ├── ModelError      the model cannot be loaded, or not with these settings
    │   ├── DamagedPart     a manifest part is not what was written; `run` sets it aside and continues
    │   └── NewerPart       a manifest part was written by a later version of batch-infer
    ├── TryAgainLater       exit 75: run the same command again to continue
    │   ├── LockedError     another run holds OUT
    │   ├── StorageError    OUT or the temporary folder cannot be read or written
    │   │   └── jobs.merge.MissingResults   the manifest lists fewer results than were committed
    │   ├── ServiceError    a service on the network does not answer
    │   ├── engines.protocol.WorkersLost   every worker died, repeatedly
    │   ├── Interrupted     SIGINT, SIGTERM or the time limit
    │   └── serving.service.RequestCancelled   the caller of a real-time request is gone or out of time
    └── RowError            the fault of one row: becomes its status and never ends a run
        ├── RowBroken       a row failed for an unknown reason and is tried again
        └── diffusion.solver.NotPackable   the scheduler cannot run with rows of other settings in one batch

Anything else that escapes is a bug: exit 1 with a traceback.
"""

from __future__ import annotations

from pathlib import Path


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class BatchInferError(Exception):
    """Base of all errors with a message for the user; `exit_code` is that of the command."""

    exit_code = 1

    @classmethod
    def from_text(cls, text: str) -> BatchInferError:
        """Return an error with the message of one of this class that was raised in another process."""
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


class DamagedPart(UsageError):
    """`part` is the path of the part, `reason` what is wrong with it."""

    def __init__(self, part: Path, reason: str) -> None:
        super().__init__(part, reason)  # both, so that it can be pickled
        self.part, self.reason = part, reason

    @classmethod
    def from_text(cls, text: str) -> BatchInferError:
        """Return a plain UsageError, since the part is unknown here."""
        return UsageError(text)

    def __str__(self) -> str:
        return f"{self.part} is damaged ({self.reason}); run again: that sets it aside and renders its rows again"


class NewerPart(UsageError):
    pass


class TryAgainLater(BatchInferError):
    exit_code = 75


class LockedError(TryAgainLater):
    pass


class StorageError(TryAgainLater):
    pass


class ServiceError(TryAgainLater):
    pass


class Interrupted(TryAgainLater):
    pass


class RowError(BatchInferError):
    pass


class RowBroken(RowError):
    pass
