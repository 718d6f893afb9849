"""A job: tables, model, device and settings that fit together and fit OUT, before anything is written."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batch_infer.errors import SettingsError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.run_json import check_identity, describe_run, ended_cleanly, parse_record
from batch_infer.manifest import SCHEMA, Manifest, ManifestIndex, run_number
from batch_infer.models import ModelCard, SamplingRules, read_card
from batch_infer.planning import Item, make_finished_check
from batch_infer.records import digest
from batch_infer.settings import BatchShape, Compute, Device, RowDefaults, RunSettings
from batch_infer.table import RowRules, Tables

SLOTS = {"cpu": 16, "cuda": 32}
DECODE_BATCH = 8

log = logging.getLogger("batch_infer")


@dataclass(frozen=True, slots=True)
class Job:
    """What to do. `record` is the run.json to write, `earlier` that of the run that this one continues."""

    settings: RunSettings
    tables: Tables
    card: ModelCard
    compute: Compute
    record: Mapping[str, Any]
    earlier: Mapping[str, Any] | None
    rules: RowRules

    @property
    def number(self) -> int:
        """The number of this run among those of its OUT, from 1; 0 for an endpoint."""
        return int(self.record.get("run_number", 0))

    def items(self, index: ManifestIndex) -> Iterator[Item]:
        """Yield every row of the tables in input order. `index` says which rows are finished."""
        return self.tables.rows(self.rules, make_finished_check(index))


def make_paths_absolute(settings: RunSettings) -> RunSettings:
    """Return settings that mean the same from any folder. (Arrow reads a relative path with a colon as a URI.)"""
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


def finish_overwrite(settings: RunSettings) -> RunSettings:
    """Return settings with --overwrite where an earlier --overwrite was stopped before OUT was empty."""
    return replace(settings, overwrite=settings.overwrite or outdir.is_clearing(settings.out))


def open_tables(settings: RunSettings) -> Tables:
    """Open the tables and log which files of folders and globs are left out. Raises TableError, ServiceError."""
    tables = Tables(settings.table, SCHEMA.names)
    if left_out := str(tables.left_out):
        log.info("files left out %s", left_out)
    return tables


def find_model(settings: RunSettings, facts: Callable[[Path], SamplingRules] | None = None) -> ModelCard:
    """Return the model, fetched where needed, with the safety check that the settings require.

    `facts` reads what only diffusers knows about a model; by default that happens here, which imports torch. Raises
    ModelError, SettingsError.
    """
    card = read_card(settings.model, facts, needs_checker=settings.safety.uses_checker(has_checker=True))
    _check_safety(settings, card)
    return card


def _check_safety(settings: RunSettings, card: ModelCard) -> None:
    """Raise SettingsError where a required checker is missing, and warn where none will run."""
    safety = settings.safety
    if safety.service is not None:
        from batch_infer.safety import check_credentials  # imports Azure's libraries

        check_credentials(safety.service)
    if safety.mode == "none":
        if safety.required:
            raise SettingsError("--require-safety and --safety none contradict each other: leave one out")
        return
    if card.has_checker or (safety.service is not None and safety.mode != "checker,azure"):
        return
    if safety.required or safety.mode in ("checker", "checker,azure"):
        raise SettingsError(
            f"{card.name} has no safety checker, and this run asks for one; images would not be checked"
        )
    log.warning("%s has no safety checker: images will not be checked; nsfw_content_detected will be null", card.name)


def prepare(settings: RunSettings, tables: Tables, card: ModelCard, device: Device) -> Job:
    """Check that a run can start on OUT as it is now, and return its job. Writes nothing. Raises UsageError."""
    existing = outdir.read_run(settings.out)
    outdir.refuse_foreign_files(settings.out, tables.local_paths, existing)
    if settings.overwrite:
        outdir.refuse_to_clear(settings.out)
    earlier = None if settings.overwrite else existing
    if settings.model.name is None and earlier is None:
        log.info("no --model given: using the built-in demo model, which draws one coloured shape at 64x64 pixels")
    outdir.refuse_while_rescoring(settings.out, earlier)
    settings, compute, record, rules = resolve_run(settings, card, device, earlier, tables)
    parts = [] if settings.overwrite else Manifest(settings.out).parts()
    if earlier is not None and parts:
        check_identity(earlier, record, settings.out)
    record |= {**_number_run(earlier, parts), **_history(earlier, tables, rules)}
    return Job(settings, tables, card, compute, record, earlier, rules)


def resolve_run(
    settings: RunSettings,
    card: ModelCard,
    device: Device,
    earlier: Mapping[str, Any] | None,
    tables: Tables | None = None,
) -> tuple[RunSettings, Compute, dict[str, Any], RowRules]:
    """Return what is left open by the settings of a run, and its run.json: from the earlier run, model and device.

    `tables` is None for an endpoint, whose tables come one by one. Raises SettingsError.
    """
    before = parse_record(earlier or {}).settings
    settings = replace(settings, safety=settings.safety.with_policy_of(before.safety if before else None))
    compute = choose_compute(settings, device, earlier, card)
    record = describe_run(settings, card, compute, tables)
    rules = RowRules(
        _fill_defaults(settings.defaults, card),
        card.sizes,
        digest(record["identity"]),
        card.embedded_guidance,
        card.fixed,
    )
    rules.check()
    return settings, compute, {**record, "rules": asdict(rules)}, rules


def _fill_defaults(defaults: RowDefaults, card: ModelCard) -> RowDefaults:
    """Return the defaults of rows, with the model's own where no option sets one."""
    own: dict[str, Any] = {
        "num_inference_steps": card.num_inference_steps,
        "guidance_scale": card.guidance_scale,
        "guidance_rescale": card.guidance_rescale,
        "height": card.sizes.native_height,
        "width": card.sizes.native_width,
    }
    missing: dict[str, Any] = {name: value for name, value in own.items() if getattr(defaults, name) is None}
    return replace(defaults, **missing)


def _number_run(earlier: Mapping[str, Any] | None, parts: Sequence[Path]) -> dict[str, int]:
    """Return this run's number, and the first run to recover if this one is killed: all since one that ended cleanly.

    The parts are read too: run.json may be missing.
    """
    known = earlier or {}
    number = 1 + max([known.get("run_number") or 0, *map(run_number, parts)])
    return {"run_number": number, "recover_from": number if ended_cleanly(known) else known.get("recover_from", 0)}


def _history(earlier: Mapping[str, Any] | None, tables: Tables, rules: RowRules) -> dict[str, Any]:
    """Return all other rules by which runs of this OUT read their rows, and the source of default ids.

    So `find_changes` knows the images that an option would replace, whichever run made them.
    """
    known = parse_record(earlier or {})
    others = [asdict(each) for each in dict.fromkeys(known.known_rules) if each != rules]
    return {"earlier_rules": others, "default_ids": tables.default_id_source or known.ids_from}


# Compute


def choose_compute(
    settings: RunSettings, device: Device, earlier: Mapping[str, Any] | None = None, card: ModelCard | None = None
) -> Compute:
    """Return how to compute: as requested, else as in the earlier run, else as suits the device.

    `decode_batch` follows from the first slots of an OUT and is kept. So are batch sizes of single image sizes, which
    were measured, or halved on out-of-memory, until another number of slots is requested. Raises SettingsError where
    --compile does not suit the model.
    """
    earlier_compute = (earlier or {}).get("compute", {})
    requested = settings.compute.slots if isinstance(settings.compute.slots, int) else None
    slots = requested or earlier_compute.get("slots") or SLOTS[device.kind]
    shapes = earlier_compute.get("by_size", ()) if requested in (None, earlier_compute.get("slots")) else ()
    threads = max(1, count_cores() // max(1, count_workers(settings, device)))
    return Compute(
        device=device.kind,
        dtype=_choose_dtype(settings, device, earlier_compute, card),
        slots=slots,
        decode_batch=earlier_compute.get("decode_batch") or max(1, min(DECODE_BATCH, slots // 2)),
        threads=settings.compute.threads or earlier_compute.get("threads") or threads,
        device_name=device.name,
        compiled=_choose_compiled(settings, device, earlier_compute, card),
        by_size=tuple(BatchShape(**shape) for shape in shapes),
    )


def _choose_dtype(
    settings: RunSettings, device: Device, earlier_compute: Mapping[str, Any], card: ModelCard | None
) -> str:
    """Return the requested dtype, else float32 on a CPU, and float16 or bfloat16 on a GPU.

    Stable Diffusion 3 and other pipelines often overflow in float16. A Stable Diffusion 3 run in float16, the default
    of an earlier version, keeps it.
    """
    if settings.model.dtype != "auto":
        return settings.model.dtype
    if device.kind != "cuda":
        return "float32"
    is_sd3 = card is not None and card.family == "stable_diffusion_3"
    overflows = is_sd3 or (card is not None and card.uses_pipeline_call)
    return "bfloat16" if overflows and not (is_sd3 and earlier_compute.get("dtype") == "float16") else "float16"


def _choose_compiled(
    settings: RunSettings, device: Device, earlier_compute: Mapping[str, Any], card: ModelCard | None
) -> bool:
    """Return whether to use torch.compile, which needs Triton and a C compiler for it on a GPU."""
    requested = settings.compute.compiled
    if card is not None and card.uses_pipeline_call:
        if requested:
            raise SettingsError(f"--compile: {card.name} is driven by its pipeline's own call, which is not compiled")
        return False
    if requested is not None:
        return requested
    compilers = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    is_possible = find_spec("triton") is not None and any(map(shutil.which, compilers))
    return bool(earlier_compute.get("compiled", device.kind == "cuda" and is_possible))


def count_workers(settings: RunSettings, device: Device) -> int:
    """Return how many workers render, 0 where the command itself does: as requested, else one per device."""
    return device.count if settings.compute.processes is None else settings.compute.processes


def count_parallel(workers: int, compute: Compute) -> int:
    """Return how many workers compute at the same time: on a CPU as many as have cores of their own."""
    return max(1, min(workers, count_cores() // compute.threads) if compute.device == "cpu" else workers)


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
