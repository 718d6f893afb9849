"""Settings made from the option values of a command."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batch_infer import settings as s
from batch_infer.errors import SettingsError

SERVICE_VARIABLES = ("CONTENT_SAFETY_KEY", "CONTENT_SAFETY_THRESHOLD", "CONTENT_SAFETY_BLOCKLISTS")
"""Variables that are set only where the content safety service is meant to be used."""


def make_run_settings(options: Mapping[str, Any]) -> s.RunSettings:
    """Return the settings of `run`. Raises SettingsError."""
    if "://" in options["out"]:
        raise SettingsError(f"--out {options['out']}: this version writes to a local folder")
    return s.RunSettings(
        table=s.TableSettings(
            options["tables"], _parse_columns(options["columns"]), options["limit"], id_from=options["id_from"]
        ),
        out=Path(options["out"]).expanduser(),
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
        output=s.OutputSettings(options["image_format"], options["results"], options["base64"]),
        compute=make_compute_settings(options),
        max_failed=s.FailureBudget.parse(options["max_failed"]),
        overwrite=options["overwrite"],
        rerender_changed=options["rerender_changed"],
        price_per_hour=options["price_per_hour"],
    )


def make_model_settings(options: Mapping[str, Any]) -> s.ModelSettings:
    """Return which model to load, and how. Raises SettingsError."""
    return s.ModelSettings(
        options["model"],
        options["revision"],
        options["variant"],
        options["dtype"],
        options["device"],
        s.SchedulerSpec.parse(options["scheduler"]) if options["scheduler"] else None,
        tuple(map(s.LoraSpec.parse, options["loras"])),
        options["long_prompts"],
    )


def make_safety_settings(options: Mapping[str, Any]) -> s.SafetySettings:
    """Return how images are checked, with the service of the environment. Raises SettingsError."""
    mode, service = options["safety"], None
    if mode in ("auto", "azure", "checker,azure"):
        service = s.ServiceSettings.from_environment(os.environ)
        if service is None and mode != "auto":
            raise SettingsError(f"--safety {mode}: CONTENT_SAFETY_ENDPOINT is not set, so the service cannot be called")
        if service is None and (others := [name for name in SERVICE_VARIABLES if os.environ.get(name)]):
            raise SettingsError(
                f"{others[0]} is set but CONTENT_SAFETY_ENDPOINT is not: set it too, or use --safety checker or none"
            )
    return s.SafetySettings(mode, options["on_flagged"], options["require_safety"], service)


def make_compute_settings(options: Mapping[str, Any]) -> s.ComputeSettings:
    """Return where and with which batch size to compute."""
    return s.ComputeSettings(options["slots"], options["threads"], options["compiled"], options.get("num_processes"))


def _parse_columns(options: tuple[str, ...]) -> dict[str, str]:
    """Return the table's column for each field. Raises SettingsError."""
    columns: dict[str, str] = {}
    for option in options:
        field, equals, name = option.partition("=")
        if not equals or field not in s.FIELDS:
            raise SettingsError(f"--column {option}: write FIELD=NAME, where FIELD is one of {', '.join(s.FIELDS)}")
        columns[field] = name
    return columns
