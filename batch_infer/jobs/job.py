"""Combine tables, model, device and settings into a job, and check it against OUT before writing anything."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from batch_infer.errors import SettingsError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.checksums import refuse_foreign_results
from batch_infer.jobs.compute import choose_compute
from batch_infer.jobs.description import check_identity, describe_run, list_environments
from batch_infer.jobs.run_json import ended_cleanly, parse_record
from batch_infer.manifest import SCHEMA, Manifest, ManifestIndex, run_number
from batch_infer.models import LoraFolder, ModelCard, SamplingRules, read_card
from batch_infer.planning import Item, make_finished_check
from batch_infer.provenance import check_marks, restrict_sizes
from batch_infer.records import digest
from batch_infer.settings import C2paSigner, Compute, Device, RowDefaults, RunSettings, ServiceSettings
from batch_infer.store import Store, is_url, refuse_unprintable
from batch_infer.table import RowRules, Tables

log = logging.getLogger("batch_infer")


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a run needs to start, except an engine.

    `store` is OUT, locked by this command if it writes. `record` is the first content of its run.json, and `earlier`
    that of the run that it continues, or None.
    """

    settings: RunSettings
    store: Store
    tables: Tables
    card: ModelCard
    compute: Compute
    record: Mapping[str, Any]
    earlier: Mapping[str, Any] | None
    rules: RowRules

    @property
    def number(self) -> int:
        """Number of this run in OUT, starting from 1, or 0 for an endpoint."""
        return int(self.record.get("run_number", 0))

    def items(self, index: ManifestIndex) -> Iterator[Item]:
        """Yield one item per image or invalid row of the tables, in input order.

        `index` identifies finished rows, which are valid even if their texts or cells exceed the current limits.
        """
        return self.tables.read_rows(self.rules, make_finished_check(index))


def make_paths_absolute(settings: RunSettings) -> RunSettings:
    """Make OUT, unless it is a URL, the folder of the tables and the signer's files absolute. Raises SettingsError.

    Arrow would read a relative path with a colon as a URI. Workers on a Ray cluster have other working folders.
    """
    try:
        table = replace(settings.table, folder=settings.table.folder.absolute())
        out = settings.out if is_url(settings.out) else str(_absolute(Path(settings.out)))
        if (signer := settings.output.provenance.signer) is not None:
            paths = (str(_absolute(Path(path))) for path in (signer.certificates, signer.private_key))
            settings = use_signer(settings, C2paSigner(*paths))
    except FileNotFoundError as error:
        raise SettingsError("the working folder was deleted; change to one that exists") from error
    refuse_unprintable(out)
    return replace(settings, out=out, table=table)


def use_signer(settings: RunSettings, signer: C2paSigner | None) -> RunSettings:
    """Return recorded settings with the signer, which run.json does not record.

    Raises SettingsError if there is a signer, but the run does not sign its images.
    """
    provenance = settings.output.provenance
    if signer is not None and "c2pa" not in provenance.marks:
        raise SettingsError(
            f"--c2pa-cert and --c2pa-key: the last run in {settings.out} had no --provenance c2pa, so its images are "
            "not signed: leave both options out, or first run again with --provenance c2pa"
        )
    return replace(settings, output=replace(settings.output, provenance=replace(provenance, signer=signer)))


def _absolute(path: Path) -> Path:
    """Make a path absolute and resolve leading `..`, so that it stays valid if the working folder is deleted."""
    base, parts = Path(path.anchor or Path.cwd()), path.parts[bool(path.anchor) :]
    while parts[:1] == ("..",):
        base, parts = base.parent, parts[1:]
    return base.joinpath(*parts)


def use_current_endpoint(settings: RunSettings) -> RunSettings:
    """Take the safety endpoint from the environment: OUT must not decide where a key is sent. Raises SettingsError.

    Its API version is taken too, since another endpoint may support other versions.
    """
    if settings.safety.service is None:
        return settings
    current = ServiceSettings.from_environment(os.environ)
    if current is None:
        raise SettingsError("the run used a safety service, but CONTENT_SAFETY_ENDPOINT is not set")
    service = structs.replace(settings.safety.service, endpoint=current.endpoint, api_version=current.api_version)
    return replace(settings, safety=replace(settings.safety, service=service))


def open_tables(settings: RunSettings) -> Tables:
    """Open the tables and log which files in folders and globs are ignored.

    Raises TableError, ModelError, ServiceError, StorageError.
    """
    folder = settings.model.lora_folder
    tables = Tables(settings.table, SCHEMA.names, find_lora=LoraFolder(folder).find if folder else None)
    if ignored := str(tables.ignored_files):
        log.info("files ignored %s", ignored)
    return tables


def find_model(settings: RunSettings, read_facts: Callable[[Path], SamplingRules] | None = None) -> ModelCard:
    """Download the model if needed, and return its card. Warn if images cannot be checked for lack of a checker.

    `read_facts` reads model properties that only diffusers knows. The default imports torch in this process. Raises
    ModelError, and SettingsError if the safety settings contradict each other or require a checker or key that is
    missing.
    """
    safety, service = settings.safety, settings.safety.service
    card = read_card(settings.model, read_facts, needs_checker=safety.uses_checker(has_checker=True))
    if service is not None:
        from batch_infer.safety import check_credentials  # imports Azure's libraries

        check_credentials(service)
    if safety.mode == "none":
        if safety.required:
            raise SettingsError("--require-safety and --safety none contradict each other: leave one out")
    elif not card.has_checker and (service is None or safety.mode == "checker,azure"):
        if safety.required or safety.mode in ("checker", "checker,azure"):
            raise SettingsError(
                f"{card.name} has no safety checker, but this run requires one; images would not be checked"
            )
        message = "%s has no safety checker: images will not be checked; nsfw_content_detected will be null"
        log.warning(message, card.name)
    return card


def prepare(
    settings: RunSettings,
    store: Store,
    existing: Mapping[str, Any] | None,
    tables: Tables,
    card: ModelCard,
    device: Device,
) -> Job:
    """Check that a run can start in OUT, and return its job. Write nothing. Raises UsageError, StorageError.

    `existing` is the content of run.json, or None. If an earlier --overwrite was stopped before OUT was empty, the job
    finishes it.
    """
    if existing and existing.get(outdir.CLEARING):
        settings = replace(settings, overwrite=True)
    outdir.refuse_foreign_files(store, tables.locations, existing)
    written = parse_record(existing or {}).settings
    if not written or "openai" not in written.output.results:
        refuse_foreign_results(store, settings.output.results)
    if settings.overwrite:
        outdir.refuse_to_clear(store)
    outdir.refuse_foreign_images(store, existing)
    earlier = None if settings.overwrite else existing
    if settings.model.name is None and earlier is None:
        log.info(
            "no --model given: using the built-in demo model (try a prompt such as 'a small green star on the left')"
        )
    outdir.refuse_while_rescoring(settings.out, earlier)
    settings, compute, record, rules = resolve_run(settings, card, device, earlier, tables)
    parts = [] if settings.overwrite else Manifest(store).parts()
    if earlier is not None and parts:
        check_identity(earlier, record, settings.out)
        _check_sink(earlier, settings)
        _warn_about_finished_images(earlier, settings)
    history = parse_record(earlier or {})
    number = 1 + max([history.run_number or 0, *map(run_number, parts)])  # use parts too: run.json may be missing
    record |= {
        "run_number": number,
        # After a kill, recover all runs since the last one that ended cleanly.
        "recover_from": number if ended_cleanly(earlier) else history.recover_from,
        # `find_changes` needs all earlier rules, since any of these runs may have rendered an image.
        "earlier_rules": [msgspec.to_builtins(old) for old in dict.fromkeys(history.known_rules) if old != rules],
        "default_ids": tables.default_id_source or history.ids_from,
        **list_environments(record, earlier, number),
    }
    return Job(settings, store, tables, card, compute, record, earlier, rules)


def _check_sink(earlier: Mapping[str, Any], settings: RunSettings) -> None:
    """Raise SettingsError if the earlier run in OUT stored its images in another way."""
    earlier_settings, sink = parse_record(earlier).settings, settings.output.sink
    if earlier_settings and (earlier_sink := earlier_settings.output.sink) != sink:
        raise SettingsError(
            f"{settings.out} was made with --sink {earlier_sink}, and this run has --sink {sink}: give the same --sink "
            "or another --out, or start anew with --overwrite"
        )


def _warn_about_finished_images(earlier: Mapping[str, Any], settings: RunSettings) -> None:
    """Warn if options for image files differ from those of the earlier run, because finished images keep theirs."""
    earlier_settings = parse_record(earlier).settings
    if not earlier_settings:
        return
    old, new = earlier_settings.output, settings.output
    options = {
        "--image-format": old.image_format != new.image_format,
        "--provenance": old.provenance.marks != new.provenance.marks,
        "--prompt-metadata": old.provenance.prompt_metadata != new.provenance.prompt_metadata,
    }
    if changed := [option for option, differs in options.items() if differs]:
        message = "%s of this run and the last one in %s differ: this affects only images that are rendered now"
        log.warning(message, " and ".join(changed), settings.out)


def resolve_run(
    settings: RunSettings,
    card: ModelCard,
    device: Device,
    earlier: Mapping[str, Any] | None,
    tables: Tables | None = None,
) -> tuple[RunSettings, Compute, dict[str, Any], RowRules]:
    """Return the settings with the policy for flagged images, the compute settings, run.json, and the rules for rows.

    `tables` is None for an endpoint, which receives its tables one at a time. Raises SettingsError.
    """
    earlier_settings = parse_record(earlier or {}).settings
    earlier_safety = earlier_settings.safety if earlier_settings else None
    settings = replace(settings, safety=settings.safety.with_policy_of(earlier_safety))
    compute = choose_compute(settings, device, earlier, card)
    provenance = settings.output.provenance
    check_marks(provenance)
    record = describe_run(settings, card, compute, tables)
    model_defaults = RowDefaults(card.num_inference_steps, card.guidance_scale, card.guidance_rescale)
    native_size = {"height": card.sizes.native_height, "width": card.sizes.native_width}
    requested = {name: value for name, value in asdict(settings.defaults).items() if value is not None}
    defaults = replace(model_defaults, **{**native_size, **requested})
    fingerprint = digest(record["identity"])
    sizes = restrict_sizes(provenance, card.sizes, defaults)
    rules = RowRules(defaults, sizes, fingerprint, card.embedded_guidance, card.unsupported_fields)
    rules.validate()
    return settings, compute, {**record, "rules": msgspec.to_builtins(rules)}, rules
