"""Turn the values of options into settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from batch_infer import settings as s
from batch_infer.cli.values import parse_out
from batch_infer.errors import SettingsError

SERVICE_VARIABLES = (
    *("CONTENT_SAFETY_KEY", "CONTENT_SAFETY_THRESHOLD"),
    *("CONTENT_SAFETY_BLOCKLISTS", "CONTENT_SAFETY_API_VERSION"),
)
"""Variables that have no effect without CONTENT_SAFETY_ENDPOINT."""


def make_run_settings(options: Mapping[str, Any]) -> s.RunSettings:
    """Return the settings of `run`. Raises SettingsError."""
    columns = _parse_columns(options["columns"])
    if s.LORA_FIELD in columns and not options["lora_folder"]:
        raise SettingsError("--column lora=... needs --lora-folder, the folder of the LoRAs that the column names")
    return s.RunSettings(
        table=s.TableSettings(options["tables"], columns, options["limit"], id_from=options["id_from"]),
        out=parse_out(options["out"]),
        model=make_model_settings(options),
        defaults=s.RowDefaults(
            num_inference_steps=options["steps"],
            guidance_scale=options["guidance_scale"],
            guidance_rescale=options["guidance_rescale"],
            height=options["height"],
            width=options["width"],
            negative_prompt=options["negative_prompt"],
            num_images_per_prompt=options["images_per_prompt"],
            seed=options["seed"],
        ),
        safety=make_safety_settings(options),
        output=s.OutputSettings(
            options["image_format"],
            options["results"],
            options["base64"],
            options["sign_key"],
            options["sink"],
            _make_provenance_settings(options),
        ),
        compute=make_compute_settings(options),
        max_failed=s.FailureBudget.parse(options["max_failed"]),
        overwrite=options["overwrite"],
        rerender_changed=options["rerender_changed"],
        price_per_hour=options["price_per_hour"],
    )


def _parse_columns(options: tuple[str, ...]) -> dict[str, str]:
    """Return the given column name of each field. Raises SettingsError if an option has no `=` or an unknown field."""
    columns: dict[str, str] = {}
    for text in options:
        field, equals, name = text.partition("=")
        if not equals or field not in (*s.FIELDS, s.LORA_FIELD):
            raise SettingsError(
                f"--column {text}: write FIELD=NAME, where FIELD is one of {', '.join((*s.FIELDS, s.LORA_FIELD))}"
            )
        columns[field] = name
    return columns


def make_model_settings(options: Mapping[str, Any]) -> s.ModelSettings:
    """Return the settings of the model. Raises SettingsError."""
    return s.ModelSettings(
        options["model"],
        options["revision"],
        options["variant"],
        options["dtype"],
        options["device"],
        s.SchedulerSpec.parse(options["scheduler"]) if options["scheduler"] else None,
        tuple(map(s.LoraSpec.parse, options["loras"])),
        options["long_prompts"],
        options["quantize"],
        options["lora_folder"],
        tuple(map(s.EmbeddingSpec.parse, options["embeddings"])),
    )


def _make_provenance_settings(options: Mapping[str, Any]) -> s.ProvenanceSettings:
    """Return the settings of the marks in image files. Raises SettingsError."""
    marks, signer = s.parse_marks(options["provenance"]), s.make_signer(options["c2pa_cert"], options["c2pa_key"])
    if signer is not None and "c2pa" not in marks:
        raise SettingsError("--c2pa-cert and --c2pa-key need --provenance c2pa or a list that contains it")
    return s.ProvenanceSettings(marks, options["prompt_metadata"], signer)


def make_safety_settings(options: Mapping[str, Any]) -> s.SafetySettings:
    """Return the settings of the safety checks.

    The service, if the mode may use it, is configured by environment variables. Raises SettingsError.
    """
    mode, service = options["safety"], None
    if mode in ("auto", "azure", "checker,azure"):
        service = s.ServiceSettings.from_environment(os.environ)
        if service is None and mode != "auto":
            raise SettingsError(f"--safety {mode}: CONTENT_SAFETY_ENDPOINT is not set, so the service cannot be called")
        if service is None and (names := [name for name in SERVICE_VARIABLES if os.environ.get(name)]):
            raise SettingsError(
                f"{names[0]} is set but CONTENT_SAFETY_ENDPOINT is not: set it too, or use --safety checker or none"
            )
    return s.SafetySettings(mode, options["on_flagged"], options["require_safety"], service)


def make_compute_settings(options: Mapping[str, Any]) -> s.ComputeSettings:
    """Return the settings of batch size, threads, compilation and processes."""
    return s.ComputeSettings(
        options["slots"],
        options["threads"],
        options["compiled"],
        options.get("num_processes"),
        options.get("engine", "local"),
        options.get("ray_address"),
        options.get("offload"),
    )
