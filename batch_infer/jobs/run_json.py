"""The form of run.json: which type each key has that commands read, and the default of a key that is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from batch_infer.errors import SettingsError, UsageError
from batch_infer.jobs.merge import Counts
from batch_infer.settings import Compute, OnFlagged, RunSettings
from batch_infer.table import RowRules

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SurveyRecord:
    """What a run counted in the tables before it rendered; see Survey."""

    finished_at: datetime
    total: int = 0
    done: int = 0
    invalid: int = 0
    pending: int = 0
    standing: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class SummaryRecord(Counts):
    """What a run came to; see Summary."""

    images_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class NameRecord:
    name: str | None = None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The keys of run.json that commands read. The file has others, which are for people."""

    identity: Mapping[str, str] | UnsetType = UNSET
    batch_infer: str | None = None
    started_at: str | UnsetType = UNSET
    settings: RunSettings | UnsetType = UNSET
    compute: Compute | UnsetType = UNSET
    rules: RowRules | UnsetType = UNSET
    earlier_rules: tuple[RowRules, ...] = ()
    default_ids: str | None | UnsetType = UNSET
    model: NameRecord = NameRecord()
    scheduler: NameRecord = NameRecord()
    tables: tuple[str, ...] = ()
    unreadable_tables: tuple[str, ...] = ()
    unrepeatable_tables: tuple[str, ...] = ()
    survey: SurveyRecord | None = None
    run_number: int | None = None
    recover_from: int = 0
    rendering_since: datetime | None = None
    in_flight: int = 1
    has_strays: bool = False
    """Whether a worker was lost that may still have been writing in OUT when the run ended; see Work."""
    summary: SummaryRecord | None = None
    merged: SummaryRecord | None = None
    """Counts of results.* where they were merged after a run that did not end; such a run has no summary."""
    rescoring: Mapping[str, OnFlagged] = field(default_factory=dict)

    @property
    def ids_from(self) -> str | None:
        """Where default ids are from, None where no row has one. Earlier versions record --id-from only."""
        if not isinstance(self.default_ids, UnsetType):
            return self.default_ids
        return None if isinstance(self.settings, UnsetType) else self.settings.table.id_from


def parse_record(record: Any) -> RunRecord:
    """Check the types of run.json's keys. Raises ValueError that names the key."""
    try:
        return msgspec.convert(record, RunRecord, dec_hook=_decode_path)
    except msgspec.ValidationError as error:
        reason, _, key = str(error).partition(" - at `$.")
        raise ValueError(f"{key.removesuffix('`')}: {reason}" if key else reason) from error
    except SettingsError as error:  # settings that do not go together
        raise ValueError(f"settings: {error}") from error


def ended_in_order(record: Mapping[str, Any] | None) -> bool:
    """Return whether the run of this run.json left nothing that the next command must recover."""
    return record is not None and record.get("summary") is not None and not record.get("has_strays")


def with_counts(record: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Any]:
    """Return run.json with the counts of results.* as they are now, for `status`."""
    summary = record.get("summary")
    key = "merged" if summary is None else "summary"
    return {**record, key: {**(summary or {}), **counts}}


def require(value: T | UnsetType, key: str, out: Path) -> T:
    """Return the value of a key. Raises UsageError where run.json lacks it, as one of another version may."""
    if isinstance(value, UnsetType):
        raise UsageError(
            f"{out / 'run.json'} has no {key}, so another version of batch-infer wrote it: go on with `batch-infer run`"
            " and its options, which writes it anew"
        )
    return value


def _decode_path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"expected a path, got {type(value).__name__}")
