"""Define the options of `run` and `plan`, and turn the values of options into settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, get_args

import click

from batch_infer import settings as s
from batch_infer.cli.gallery import gallery_option
from batch_infer.cli.options import (
    NONNEGATIVE,
    POSITIVE,
    FiniteRange,
    SemicolonList,
    c2pa_options,
    model_options,
    on_flagged_option,
    option,
    option_with_aliases,
    parse_out,
    results_options,
    sign_key_option,
    unattended_options,
)
from batch_infer.cli.shells import argument
from batch_infer.errors import SettingsError
from batch_infer.extras import install_command

SERVICE_VARIABLES = (
    *("CONTENT_SAFETY_KEY", "CONTENT_SAFETY_THRESHOLD"),
    *("CONTENT_SAFETY_BLOCKLISTS", "CONTENT_SAFETY_API_VERSION"),
)
"""Variables that have no effect without CONTENT_SAFETY_ENDPOINT."""

job_options = (
    argument("tables", "TABLE...", nargs=-1, required=True),
    option(
        "-o",
        "--out",
        default="batch-infer-out",
        metavar="OUT",
        help="Folder or URL (s3://, ...) for images and results.",
    ),
    option(
        "--column",
        "columns",
        type=SemicolonList(),
        metavar="FIELD=NAME",
        envvar="BATCH_INFER_COLUMN",
        multiple=True,
        help="The table's column for a field: prompt=caption. `height=` ignores the column height. Repeatable; "
        "separate several in BATCH_INFER_COLUMN with semicolons.",
    ),
    option(
        "--id-from",
        type=click.Choice(get_args(s.IdSource)),
        default="row",
        help="Default id of a row. row: file name and row number. content: a digest of its cells, so that renaming, "
        "sorting or splitting the tables changes no id, seed or image.",
    ),
    option("--limit", type=POSITIVE, metavar="N", help="Render only the first N rows."),
    *model_options,
    option(
        "--offload",
        type=click.Choice(get_args(s.Offload)),
        help="For models larger than the GPU: keep the weights in host memory. model: move each network to the GPU "
        "when it runs. sequential: move each layer, which needs the least GPU memory and is slowest. Turns "
        "compilation off, and changes no image otherwise.",
    ),
    option(
        "--num-processes",
        type=NONNEGATIVE,
        metavar="N",
        help="Number of worker processes, one per device. Default: one per visible GPU, else 1; on a Ray cluster, as "
        "many as it has room for. 0: render in the command's own process.",
    ),
    option(
        "--engine",
        type=click.Choice(get_args(s.EngineName)),
        default="local",
        help="local: worker processes on this machine. ray: actors on a Ray cluster, each with one GPU, or with "
        "--threads CPUs (default 1).",
    ),
    option(
        "--ray-address",
        metavar="ADDRESS",
        help="Address of the Ray cluster. Default: RAY_ADDRESS, else the cluster of this machine, else a new one on "
        "this machine.",
    ),
    option_with_aliases(
        "--steps", "--num-inference-steps", type=int, metavar="N", help="Steps of rows without num_inference_steps."
    ),
    option_with_aliases(
        "--guidance-scale",
        "--guidance",
        type=float,
        metavar="X",
        help="Guidance scale of rows without guidance_scale. Values up to 1 disable guidance.",
    ),
    option("--guidance-rescale", type=float, metavar="X", help="Default guidance rescale, 0 to 1."),
    option("--height", type=int, metavar="PX", help="Default height."),
    option("--width", type=int, metavar="PX", help="Default width."),
    option("--negative-prompt", metavar="TEXT", help="Default negative prompt."),
    option_with_aliases(
        "--images-per-prompt",
        "--num-images-per-prompt",
        type=int,
        default=1,
        metavar="N",
        help="Default number of images per row.",
    ),
    option(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="Base seed. Rows without a seed derive theirs from it and their id.",
    ),
    option(
        "--safety",
        type=click.Choice(get_args(s.SafetyMode)),
        default="auto",
        help="auto: the model's own checker if it has one, and Azure AI Content Safety if CONTENT_SAFETY_ENDPOINT is "
        "set; checker: the model must have one; azure: the service; checker,azure: both; none: images are not checked.",
    ),
    on_flagged_option,
    option("--require-safety", is_flag=True, help="Refuse to run if images would not be checked."),
    option("--image-format", type=click.Choice(get_args(s.ImageFormat)), default="png", help="Format of image files."),
    option(
        "--sink",
        type=click.Choice(get_args(s.SinkName)),
        default="folder",
        help="How to store images. folder: one file each, in images/. webdataset: tar files in shards/, with JSON next "
        "to each image. parquet: Parquet files in shards/, as Hugging Face's datasets stores images. Flagged images "
        "are always files.",
    ),
    option(
        "--provenance",
        default="iptc",
        metavar="MARK,...",
        help="Marks that identify an image as AI-generated. iptc: metadata. c2pa: Content Credentials, signed with "
        "--c2pa-cert and --c2pa-key. watermark: an invisible mark in the pixels, for images of at least 256x256 "
        f"pixels. none: no mark. c2pa and watermark need `{install_command('provenance')}`.",
    ),
    *c2pa_options,
    option(
        "--prompt-metadata/--no-prompt-metadata",
        "prompt_metadata",
        envvar="BATCH_INFER_PROMPT_METADATA",
        default=True,
        help="Write the prompts and parameters of an image into its file, as text or Exif. The results and shards "
        "contain the prompts in either case.",
    ),
    *results_options,
    sign_key_option,
    gallery_option,
    option(
        "--max-failed",
        default="0",
        metavar="N|P%",
        help="Maximum number or share of failed and invalid rows in a successful run.",
    ),
    option("--price-per-hour", type=FiniteRange(min=0), metavar="X", help="Machine price, used to report cost."),
    *unattended_options,
    option(
        "--rerender-changed",
        is_flag=True,
        help="Render finished images again if a default, such as --steps, differs from that of the run that made them. "
        "Without this option, a run with a changed default stops before it renders anything.",
    ),
    option(
        "--overwrite",
        is_flag=True,
        help="Start anew: once the model is loaded, remove results.*, metadata.parquet and all files in images/, "
        "quarantine/, shards/ and manifest/.",
    ),
)
"""The options of `run` and `plan`."""


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
