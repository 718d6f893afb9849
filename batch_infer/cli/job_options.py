"""Define the options of `run` and `plan`."""

from __future__ import annotations

from typing import get_args

import click

from batch_infer import settings as s
from batch_infer.cli.gallery import gallery_option
from batch_infer.cli.options import (
    c2pa_options,
    compute_options,
    model_options,
    on_flagged_option,
    option,
    option_with_aliases,
    results_options,
    sign_key_option,
    unattended_options,
)
from batch_infer.cli.sections import Section
from batch_infer.cli.shells import argument
from batch_infer.cli.values import NONNEGATIVE, POSITIVE, FiniteRange, SemicolonList
from batch_infer.extras import install_command

table_options = (
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
)

default_options = (
    option_with_aliases(
        "--steps",
        "--num-inference-steps",
        type=int,
        metavar="N",
        help="Number of denoising steps. Default: the model's own.",
    ),
    option_with_aliases(
        "--guidance-scale",
        "--guidance",
        type=float,
        metavar="X",
        help="Guidance scale. Values up to 1 disable guidance. Default: the model's own.",
    ),
    option(
        "--guidance-rescale",
        type=float,
        metavar="X",
        help="Guidance rescale, 0 to 1. Default: the model's own.",
    ),
    option("--height", type=int, metavar="PX", help="Height in pixels. Default: the model's own."),
    option("--width", type=int, metavar="PX", help="Width in pixels. Default: the model's own."),
    option("--negative-prompt", metavar="TEXT", help="Negative prompt."),
    option_with_aliases(
        "--images-per-prompt",
        "--num-images-per-prompt",
        type=int,
        default=1,
        metavar="N",
        help="Number of images per row. Each image's seed is one higher than that of the previous image.",
    ),
    option(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="Base seed. Rows without a seed derive theirs from it and their id, so each row has a different one.",
    ),
)

device_options = (
    *compute_options,
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
)

safety_options = (
    option(
        "--safety",
        type=click.Choice(get_args(s.SafetyMode)),
        default="auto",
        help="auto: the model's own checker if it has one, and Azure AI Content Safety if CONTENT_SAFETY_ENDPOINT is "
        "set; checker: the model must have one; azure: the service; checker,azure: both; none: images are not checked.",
    ),
    on_flagged_option,
    option("--require-safety", is_flag=True, help="Refuse to run if images would not be checked."),
)

output_options = (
    option(
        "--image-format",
        type=click.Choice(get_args(s.ImageFormat)),
        default="png",
        help="Format of image files.",
    ),
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
)

run_options = (
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

job_options = (
    argument("tables", "TABLE...", nargs=-1, required=True),
    Section("Tables and OUT", table_options),
    Section("Defaults for rows", default_options),
    Section("Model", model_options),
    Section("Devices and speed", device_options),
    Section("Safety", safety_options),
    Section("Images and results", output_options),
    Section("Run", run_options),
)
"""The options of `run` and `plan`."""
