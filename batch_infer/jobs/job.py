"""A job: tables, model and settings that were found to go together on an OUT, before anything is done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from msgspec import UnsetType

from batch_infer.errors import SettingsError
from batch_infer.jobs import cleanup
from batch_infer.jobs import out as outdir
from batch_infer.jobs.record import check_identity, choose_compute, describe_run
from batch_infer.jobs.run_json import ended_in_order, parse_record, require
from batch_infer.manifest import SCHEMA, Manifest, ManifestIndex, run_number
from batch_infer.models import ModelCard, SamplingRules, read_card
from batch_infer.planning import Item, make_finished_check
from batch_infer.records import digest
from batch_infer.settings import Compute, Device, RowDefaults, RunSettings
from batch_infer.table import RowRules, Tables

log = logging.getLogger("batch_infer")


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done. `record` will be its run.json, `earlier` is that of the run which it goes on with."""

    settings: RunSettings
    tables: Tables
    card: ModelCard
    compute: Compute
    record: Mapping[str, Any]
    earlier: Mapping[str, Any] | None
    rules: RowRules

    @property
    def number(self) -> int:
        """The number of this run among those of its OUT, from 1; 0 for an endpoint's."""
        return int(self.record.get("run_number", 0))

    def items(self, index: ManifestIndex) -> Iterator[Item]:
        """Every row of the tables, in input order. `index` says which rows are finished."""
        return self.tables.rows(self.rules, make_finished_check(index))


def make_paths_absolute(settings: RunSettings) -> RunSettings:
    """Settings that mean the same from any folder. (And Arrow takes a relative path with a colon for a URI.)"""
    try:
        table = replace(settings.table, folder=settings.table.folder.absolute())
        out = _absolute(settings.out)
    except FileNotFoundError as error:
        raise SettingsError("the working folder has been deleted; change to one that exists") from error
    outdir.refuse_unprintable(out)
    return replace(settings, out=out, table=table)


def _absolute(path: Path) -> Path:
    """Make a path absolute without its leading `..`: those lead through the working folder, which may be removed."""
    base, parts = Path(path.anchor or Path.cwd()), path.parts[bool(path.anchor) :]
    while parts[:1] == ("..",):
        base, parts = base.parent, parts[1:]
    return base.joinpath(*parts)


def finishing_overwrite(settings: RunSettings) -> RunSettings:
    """Return settings that clear OUT first where an earlier --overwrite was stopped before it was empty."""
    return replace(settings, overwrite=settings.overwrite or outdir.is_half_cleared(settings.out))


def open_tables(settings: RunSettings) -> Tables:
    """Open the tables and log which files of folders and globs are left out. Raises TableError, ServiceError."""
    tables = Tables(settings.table, SCHEMA.names)
    if left_out := str(tables.left_out):
        log.info("files left out %s", left_out)
    return tables


def find_model(settings: RunSettings, facts: Callable[[Path], SamplingRules] | None = None) -> ModelCard:
    """The model, fetched where needed, with a safety check as it was asked for. Raises ModelError, SettingsError.

    `facts` is asked what diffusers alone can tell of a model; by default that is told here, which imports torch.
    """
    card = read_card(settings.model, facts, needs_checker=settings.safety.uses_checker(has_checker=True))
    _check_safety(settings, card)
    return card


def prepare(settings: RunSettings, tables: Tables, card: ModelCard, device: Device) -> Job:
    """See that a job can be done on its OUT, as this is now. Writes nothing. Raises UsageError."""
    found = outdir.read_run(settings.out)
    outdir.refuse_foreign_files(settings.out, tables.local_paths, found)
    if settings.overwrite:
        cleanup.refuse_to_clear(settings.out)
    earlier = None if settings.overwrite else found
    if settings.model.name is None and earlier is None:
        log.info("no --model given: using the built-in demo model, which draws one coloured shape at 64x64 pixels")
    outdir.refuse_while_rescored(settings.out, earlier)
    settings = resolve_on_flagged(settings, earlier)
    compute = settle_compute(settings, card, device, earlier)
    record = describe_run(settings, card, compute, tables)
    parts = [] if settings.overwrite else Manifest(settings.out).parts()
    if earlier is not None and parts:
        check_identity(earlier, record, settings.out)
    rules = make_row_rules(settings, card, record)
    record = {**record, "rules": asdict(rules), **_number(earlier, parts), **_history(earlier, tables, rules)}
    return Job(settings, tables, card, compute, record, earlier, rules)


def _history(earlier: Mapping[str, Any] | None, tables: Tables, rules: RowRules) -> dict[str, Any]:
    """Record all other rules by which runs of this OUT read their rows, and where default ids are from.

    So `find_changes` knows the images that an option would replace, whichever run made them.
    """
    known = parse_record(earlier or {})
    before = () if isinstance(known.rules, UnsetType) else (known.rules,)
    others = [asdict(each) for each in dict.fromkeys((*before, *known.earlier_rules)) if each != rules]
    return {"earlier_rules": others, "default_ids": tables.default_id_source or known.ids_from}


def _number(earlier: Mapping[str, Any] | None, parts: Sequence[Path]) -> dict[str, int]:
    """Number this run, and say which runs the next one is to recover if this one is killed.

    These are all runs since the last one that ended in order. The parts are looked at too: run.json may be missing.
    """
    known = earlier or {}
    number = 1 + max([known.get("run_number") or 0, *map(run_number, parts)])
    return {"run_number": number, "recover_from": number if ended_in_order(known) else known.get("recover_from", 0)}


def resolve_on_flagged(settings: RunSettings, earlier: Mapping[str, Any] | None) -> RunSettings:
    """Settle what is stored of flagged images: as requested, as in the earlier run, or black ones."""
    before = parse_record(earlier or {}).settings
    return replace(settings, safety=settings.safety.with_policy_of(before.safety if before else None))


def settle_compute(
    settings: RunSettings, card: ModelCard, device: Device, earlier: Mapping[str, Any] | None
) -> Compute:
    """How to compute, as was asked for, as the earlier run did, or as suits. Raises SettingsError."""
    compute = choose_compute(_typed(settings, card, device, earlier), earlier, device)
    if card.uses_pipeline_call and compute.compiled:
        if settings.compute.compiled:
            raise SettingsError(f"--compile: {card.name} is driven by its pipeline's own call, which is not compiled")
        compute = replace(compute, compiled=False)
    return compute


def make_row_rules(settings: RunSettings, card: ModelCard, record: Mapping[str, Any]) -> RowRules:
    """How rows are read by a run that this run.json speaks of. Raises SettingsError."""
    defaults = _fill(settings.defaults, card)
    rules = RowRules(defaults, card.sizes, digest(record["identity"]), card.embedded_guidance, card.fixed)
    rules.check()
    return rules


def settings_of(record: Mapping[str, Any], out: Path, tables: Sequence[str] = ()) -> RunSettings:
    """Return the settings of the run that a run.json describes, for OUT and the tables as they are named now.

    Raises UsageError where it lacks them.
    """
    settings = require(parse_record(record).settings, "settings", out)
    table, model = settings.table, settings.model
    if tables:
        table = replace(table, tables=tuple(tables), folder=Path.cwd())
    if model.name is not None and (settings.table.folder / model.name).exists():
        model = replace(model, name=str(settings.table.folder / model.name))
    loras = tuple(replace(lora, file=str(settings.table.folder / Path(lora.file).expanduser())) for lora in model.loras)
    model = replace(model, loras=loras)
    return replace(settings, out=out, table=table, model=model, overwrite=False, rerender_changed=False)


def refuse_unrepeatable(record: Mapping[str, Any], out: Path) -> None:
    """What was piped in, or a URL with a secret, which run.json does not keep, cannot be read again.

    Raises SettingsError.
    """
    if not require(parse_record(record).settings, "settings", out).table.tables:
        raise SettingsError(f"{out} is an endpoint's, to which tables came one by one; name the TABLEs after OUT")
    if found := record.get("unrepeatable_tables"):
        told = ", ".join("standard input" if table == "-" else table for table in found)
        raise SettingsError(f"{told}: {out / 'run.json'} cannot say how to read this again; name the TABLEs after OUT")


def rules_of(record: Mapping[str, Any], out: Path) -> RowRules:
    """Return the rules by which the run that a run.json describes read its tables. Raises UsageError."""
    return require(parse_record(record).rules, "rules", out)


def _typed(settings: RunSettings, card: ModelCard, device: Device, earlier: Mapping[str, Any] | None) -> RunSettings:
    """Settings with bfloat16 for Stable Diffusion 3 and driven pipelines on a GPU where no dtype is given.

    In float16 many of them overflow. A Stable Diffusion 3 run in float16, an earlier version's default, stays in it.
    """
    if settings.model.dtype != "auto" or device.kind != "cuda":
        return settings
    is_sd3 = card.family == "stable_diffusion_3"
    began_in_float16 = (earlier or {}).get("compute", {}).get("dtype") == "float16"
    if not (card.uses_pipeline_call or is_sd3) or (is_sd3 and began_in_float16):
        return settings
    return replace(settings, model=replace(settings.model, dtype="bfloat16"))


def _fill(defaults: RowDefaults, card: ModelCard) -> RowDefaults:
    """The defaults of rows, option over model."""
    own: dict[str, Any] = {
        "num_inference_steps": card.num_inference_steps,
        "guidance_scale": card.guidance_scale,
        "guidance_rescale": card.guidance_rescale,
        "height": card.sizes.native_height,
        "width": card.sizes.native_width,
    }
    missing: dict[str, Any] = {name: value for name, value in own.items() if getattr(defaults, name) is None}
    return replace(defaults, **missing)


def _check_safety(settings: RunSettings, card: ModelCard) -> None:
    """See that who is to judge is there. Raises SettingsError."""
    safety = settings.safety
    if safety.service is not None:
        from batch_infer.safety import check_credentials  # imports Azure's libraries

        check_credentials(safety.service)
    if safety.mode == "none":
        if safety.required:
            raise SettingsError("--require-safety and --safety none do not go together")
        return
    if card.has_checker or (safety.service is not None and safety.mode != "checker,azure"):
        return
    if safety.required or safety.mode in ("checker", "checker,azure"):
        raise SettingsError(
            f"{card.name} has no safety checker, and this run asks for one; images would not be checked"
        )
    log.warning("%s has no safety checker: images will not be checked; nsfw_content_detected will be null", card.name)
