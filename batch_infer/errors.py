"""The errors that batch-infer raises by name.

    BatchInferError
    ├── UsageError          exit 2: nothing was rendered, the command or its settings must change
    │   ├── SettingsError   an option, or options that do not go together
    │   │   └── CompilationError   torch.compile failed; `run` does without it where --compile was not given
    │   ├── TableError      no table can be read
    │   │   └── azureml.payload.TooMany   more than one real-time request may ask for
    │   ├── ModelError      the model cannot be loaded, or not with these settings
    │   ├── DamagedPart     a part of the manifest is not what was written; `run` sets it aside and continues
    │   └── NewerPart       a part of the manifest was written by a later version of batch-infer
    ├── TryAgainLater       exit 75: run the same command again to go on
    │   ├── LockedError     another run holds OUT
    │   ├── StorageError    OUT cannot be written or read, or the temporary folder not be written
    │   │   └── MissingResults   the manifest lists fewer results than were committed
    │   ├── ServiceError    somebody else's server does not answer
    │   ├── WorkersLost     every worker has died, again and again
    │   ├── Interrupted     SIGINT or SIGTERM
    │   └── azureml.service.GivenUp   a real-time caller has gone, or has no time left
    └── RowError            one row's fault: becomes that row's status, never ends a run
        └── RowBroken       nobody can say that it is the row's fault: it has failed, and is tried again

Anything else that escapes is a bug: exit 1 with its traceback.
"""

from __future__ import annotations

from pathlib import Path


def first_line(error: Exception) -> str:
    """What a library's error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class BatchInferError(Exception):
    """Base of all errors that have a clear sentence for the user; `exit_code` is the command's."""

    exit_code = 1

    @classmethod
    def from_text(cls, text: str) -> BatchInferError:
        """Return an error with the text of one of this class that was raised in another process."""
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
    """`part` is the path of the part, `reason` what was found."""

    def __init__(self, part: Path, reason: str) -> None:
        super().__init__(part, reason)  # both, so that it can be sent from one process to another
        self.part, self.reason = part, reason

    @classmethod
    def from_text(cls, text: str) -> BatchInferError:
        """Return a plain UsageError, since the part is unknown here."""
        return UsageError(text)

    def __str__(self) -> str:
        return f"{self.part} is damaged ({self.reason}); run again: that sets it aside and renders its rows anew"


class NewerPart(UsageError):
    pass


class TryAgainLater(BatchInferError):
    exit_code = 75


class LockedError(TryAgainLater):
    pass


class StorageError(TryAgainLater):
    pass


class MissingResults(StorageError):
    pass


class ServiceError(TryAgainLater):
    pass


class WorkersLost(TryAgainLater):
    pass


class Interrupted(TryAgainLater):
    pass


class RowError(BatchInferError):
    pass


class RowBroken(RowError):
    pass
