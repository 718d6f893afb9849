"""Describe a run in run.json, and compare the descriptions of runs."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import msgspec

from batch_infer import __version__
from batch_infer.errors import SettingsError
from batch_infer.models import ModelCard
from batch_infer.provenance import describe_watermark, list_libraries
from batch_infer.records import utc_now
from batch_infer.settings import CATEGORIES, Compute, OutputSettings, ProvenanceSettings, RunSettings, SafetySettings
from batch_infer.table import Tables, is_in_memory, redact_url

ENVIRONMENT = ("batch_infer", "compute", "versions")
"""The keys of run.json on which, besides its identity, the bytes of images may depend."""
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "pyarrow", "pillow", "numpy")


def describe_run(settings: RunSettings, card: ModelCard, compute: Compute, tables: Tables | None) -> dict[str, Any]:
    """Return run.json for the start of a run. `tables` is None for an endpoint, which receives them one at a time.

    Later runs in OUT must have the same `identity`.
    """
    arguments, provenance = settings.table.tables, settings.output.provenance
    libraries = (*LIBRARIES, *list_libraries(provenance))
    table = replace(settings.table, tables=tuple(map(redact_url, arguments)))
    return {
        "batch_infer": __version__,
        "started_at": utc_now(),
        "finished_at": None,
        "tables": tables.files if tables else [],
        "unreadable_tables": sorted(tables.unreadable_files) if tables else [],
        "settings": _describe_settings(replace(settings, table=table)),
        "unrepeatable_tables": [redact_url(name) for name in arguments if _is_unrepeatable(name)],
        "model": {
            "name": card.name,
            "path": card.path,
            "revision": card.revision,
            "family": card.family,
            "fingerprint": card.fingerprint,
            "loras": [
                {"path": lora.path, "weight": lora.weight, "fingerprint": lora.fingerprint} for lora in card.loras
            ],
            **({"quantize": card.quantize} if card.quantize else {}),
            **_describe_embeddings(card),
        },
        "scheduler": {"name": card.scheduler_name, "fingerprint": card.scheduler_fingerprint},
        "identity": {
            "model": card.fingerprint,
            "scheduler": card.scheduler_fingerprint,
            "dtype": compute.dtype,
            "safety": describe_safety(settings.safety, card),
            **describe_watermark(provenance),
        },
        "compute": asdict(compute),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "survey": None,
        "summary": None,
    }


def _is_unrepeatable(argument: str) -> bool:
    """Return whether run.json does not say how to read a table again: standard input, a table in memory, a secret."""
    return argument == "-" or is_in_memory(argument) or redact_url(argument) != argument


def _describe_embeddings(card: ModelCard) -> dict[str, Any]:
    """Return the entry of textual inversion embeddings, if there are any."""
    embeddings = [
        {"path": embedding.path, "token": embedding.token, "fingerprint": embedding.fingerprint}
        for embedding in card.embeddings
    ]
    return {"embeddings": embeddings} if embeddings else {}


def _describe_settings(settings: RunSettings) -> dict[str, Any]:
    """Return the settings that continue a run. Those of marks are left out if they are the defaults."""
    described: dict[str, Any] = msgspec.to_builtins(_without_transient(settings), enc_hook=str)
    if settings.output.provenance == ProvenanceSettings():
        del described["output"]["provenance"]
    return described


def _without_transient(settings: RunSettings) -> RunSettings:
    """Reset the options that apply to one command and not to those that continue it.

    Some name keys: an OUT from elsewhere must not choose the key with which another command signs it or its images.
    """
    compute = replace(settings.compute, ray_address=None)
    return replace(settings, rerender_changed=False, output=without_keys(settings.output), compute=compute)


def without_keys(output: OutputSettings) -> OutputSettings:
    """Return the settings without the paths of keys, as run.json records them."""
    return replace(output, sign_key=None, provenance=replace(output.provenance, signer=None))


def describe_safety(safety: SafetySettings, card: ModelCard) -> str:
    """Describe the checkers and all settings that affect which images are flagged and how they are stored."""
    checkers = [f"checker {card.checker_fingerprint}"] if safety.uses_checker(has_checker=card.has_checker) else []
    if (service := safety.service) is not None:
        levels = ", ".join(f"{name} {level}" for name, level in zip(CATEGORIES, service.thresholds, strict=True))
        lists = "".join(f", blocklist {name}" for name in sorted(service.blocklists))
        checkers.append(f"azure above {levels}{lists}")
    return f"{' and '.join(checkers)}, on flagged {safety.policy}" if checkers else "none"


def check_identity(earlier: Mapping[str, Any], record: Mapping[str, Any], out: str) -> None:
    """Raise SettingsError if the earlier run in OUT has another identity."""
    identity, earlier_identity = record["identity"], earlier.get("identity", {})
    for name in dict.fromkeys((*identity, *earlier_identity)):
        if earlier_identity.get(name) != identity.get(name):
            remedies = {"safety": "check its images again with `batch-infer rescore`, "}
            remedies["watermark"] = "give the same --provenance, "
            remedy = remedies.get(name, "")
            raise SettingsError(
                f"{out} was made with {name} {format_identity(earlier, name)}, and this run has {name} "
                f"{format_identity(record, name)}: {remedy}give another --out, or start anew with --overwrite"
            )


def format_identity(record: Mapping[str, Any], name: str) -> str:
    """Return a name with the start of its fingerprint, or only the fingerprint if there is no name."""
    value = str(record.get("identity", {}).get(name, "none"))
    part = record.get(name)
    if not isinstance(part, Mapping) or not part.get("name"):
        return value
    quantized = f" in {part['quantize']}" if part.get("quantize") else ""
    return f"{part['name']}{quantized} ({value[:12]})"


def list_environments(record: Mapping[str, Any], earlier: Mapping[str, Any] | None, number: int) -> dict[str, Any]:
    """Return the entry `environments` of run.json, or no entry if all runs in OUT had the same environment.

    It lists the compute settings, versions and marks of each run, with its number, that had others than the run
    before. The images of earlier runs may depend on them.
    """
    current = json.loads(json.dumps(_describe_environment(record)))  # as run.json has it
    environments = list((earlier or {}).get("environments", ()))
    if earlier and not environments:
        environments.append({"run_number": 0, **_describe_environment(earlier)})
    if not environments or {**environments[-1], "run_number": 0} != {**current, "run_number": 0}:
        environments.append({"run_number": number, **current})
    return {"environments": environments} if len(environments) > 1 else {}


def _describe_environment(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of run.json on which image files may depend, and the marks unless they are the defaults."""
    marks = record.get("settings", {}).get("output", {}).get("provenance")
    return {**{name: record.get(name) for name in ENVIRONMENT}, **({"provenance": marks} if marks else {})}


def has_one_set_of_marks(record: Mapping[str, Any]) -> bool:
    """Return whether all runs in OUT had the same marks.

    The number of a result's run does not say which marks its image has, since a rescore keeps images of earlier runs.
    """
    environments: list[Mapping[str, Any]] = record.get("environments", [])
    return all(environment.get("provenance") == environments[0].get("provenance") for environment in environments)


def find_environment(record: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """Return the compute settings and versions of the run with this number, under their keys in run.json."""
    environments: list[Mapping[str, Any]] = record.get("environments") or [record]
    known = [environment for environment in environments if environment.get("run_number", 0) <= number]
    return known[-1] if known else environments[0]
