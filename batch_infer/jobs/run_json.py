"""Parse run.json, and change it for later commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from batch_infer.errors import SettingsError, UsageError
from batch_infer.jobs.summary import Counts
from batch_infer.settings import LORA_FIELD, Compute, OnFlagged, RunSettings
from batch_infer.table import RowRules

T = TypeVar("T")


class ScanRecord(msgspec.Struct, frozen=True, rename={"finished": "done", "skipped": "standing"}):
    """The entries of a recorded `ScanResult` that commands read, and which rows the tables had.

    `tables_digest` is `Tables.compute_digest`, and all runs from number `tables_since` on read tables with this digest.
    """

    finished_at: datetime
    total: int = 0
    tables_digest: str | None = None
    tables_since: int = 0
    finished: int = 0
    invalid: int = 0
    pending: int = 0
    skipped: Mapping[str, int] = {}


class SummaryRecord(Counts):
    """Counts of results.* at the end of the run, or after a later `merge` or `rescore`."""

    images_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class NameRecord:
    """Name of a model or scheduler."""

    name: str | None = None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The typed keys of run.json. The other keys, except `out.CLEARING`, are for human readers."""

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
    survey: ScanRecord | None = None
    run_number: int | None = None
    recover_from: int = 0
    rendering_since: datetime | None = None
    in_flight: int = 1
    has_strays: bool = False
    """Whether a lost worker may have written to OUT after the run ended; see TaskReport."""
    progress: Mapping[str, Any] | None = None
    """Summary of an active or killed run up to a moment ago. Its counts are only reasons and truncated prompts."""
    summary: SummaryRecord | None = None
    merged: SummaryRecord | None = None
    rescoring: Mapping[str, OnFlagged] = field(default_factory=dict)

    @property
    def ids_from(self) -> str | None:
        """Source of default ids, or None if none were used. Earlier versions recorded only --id-from."""
        if not isinstance(self.default_ids, UnsetType):
            return self.default_ids
        return None if isinstance(self.settings, UnsetType) else self.settings.table.id_from

    @property
    def known_rules(self) -> tuple[RowRules, ...]:
        """All rules by which runs in this OUT read rows, starting with those of the last run."""
        last = () if isinstance(self.rules, UnsetType) else (self.rules,)
        return *last, *self.earlier_rules


def parse_record(record: Any) -> RunRecord:
    """Parse run.json and check its types. Raises ValueError naming the key."""
    try:
        return msgspec.convert(record, RunRecord, dec_hook=_decode_path)
    except msgspec.ValidationError as error:
        reason, _, key = str(error).partition(" - at `$.")
        raise ValueError(f"{key.removesuffix('`')}: {reason}" if key else reason) from error
    except SettingsError as error:  # settings that contradict each other
        raise ValueError(f"settings: {error}") from error


def _decode_path(_: type, value: Any) -> Path:
    if isinstance(value, str):
        return Path(value)
    raise TypeError(f"expected a path, got {type(value).__name__}")


def require(value: T | UnsetType, key: str, out: str) -> T:
    """Return a key's value. Raises UsageError if run.json lacks the key because another version wrote it."""
    if isinstance(value, UnsetType):
        raise UsageError(
            f"{out}/run.json has no {key}, so another version of batch-infer wrote it: continue with "
            "`batch-infer run` and its options, which rewrites it"
        )
    return value


def read_settings(record: Mapping[str, Any], out: str, tables: Sequence[str] = ()) -> RunSettings:
    """Return a recorded run's settings for this OUT. `tables` replace the run's tables if given. Raises UsageError."""
    settings = require(parse_record(record).settings, "settings", out)
    folder, table, model = settings.table.folder, settings.table, settings.model
    if tables:
        table = replace(table, tables=tuple(tables), folder=Path.cwd())
    if model.name is not None and (folder / model.name).exists():
        model = replace(model, name=str(folder / model.name))
    loras = tuple(replace(lora, file=str(folder / Path(lora.file).expanduser())) for lora in model.loras)
    lora_folder = model.lora_folder and str(folder / Path(model.lora_folder).expanduser())
    embeddings = tuple(replace(spec, file=str(folder / Path(spec.file).expanduser())) for spec in model.embeddings)
    model = replace(model, loras=loras, lora_folder=lora_folder, embeddings=embeddings)
    return replace(settings, out=out, table=table, model=model, overwrite=False, rerender_changed=False)


def read_rules(record: Mapping[str, Any], out: str) -> RowRules:
    """Return the rules by which a recorded run read rows. Raises UsageError."""
    return require(parse_record(record).rules, "rules", out)


def find_lora_column(record: Mapping[str, Any]) -> str | None:
    """Return the carried column that names the LoRA of each row, or None if the run had no --lora-folder."""
    settings = parse_record(record).settings
    if isinstance(settings, UnsetType) or settings.model.lora_folder is None:
        return None
    return settings.table.columns.get(LORA_FIELD, LORA_FIELD)


def count_scanned_results(record: Mapping[str, Any]) -> int:
    """Return the number of results that a recorded run counted in its tables, or 0 if its scan did not finish."""
    return int((record.get("survey") or {}).get("total", 0))


def refuse_unrepeatable_tables(record: Mapping[str, Any], out: str) -> None:
    """Raise UsageError if tables cannot be read again: an endpoint's, standard input, and URLs stripped of secrets."""
    if not require(parse_record(record).settings, "settings", out).table.tables:
        raise SettingsError(
            f"{out} was written by an endpoint, whose tables are not recorded; name the TABLEs after OUT"
        )
    if tables := record.get("unrepeatable_tables"):
        names = ", ".join("standard input" if table == "-" else table for table in tables)
        raise SettingsError(f"{names}: {out}/run.json does not say how to read this again; name the TABLEs after OUT")


def without_tables_digest(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return run.json without the digest of the tables, because results.* were not merged from these tables."""
    survey = record.get("survey")
    return dict(record) if survey is None else {**record, "survey": {**survey, "tables_digest": None}}


def ended_cleanly(record: Mapping[str, Any] | None) -> bool:
    """Return whether a run ended without leftovers that the next command must recover."""
    return record is not None and record.get("summary") is not None and not record.get("has_strays")


def add_counts(record: Mapping[str, Any], counts: Counts) -> dict[str, Any]:
    """Return run.json with the current counts of results.*, which `status` reports."""
    summary = record.get("summary")
    key = "merged" if summary is None else "summary"
    figures = {name: value for name, value in (summary or {}).items() if name not in Counts.only_if_known}
    return {**record, key: {**figures, **counts.as_dict()}}
