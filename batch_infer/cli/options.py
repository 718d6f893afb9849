"""Options that several commands share, and the decorator that makes a function a command."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from batch_infer import settings as s
from batch_infer.cli.config import config_option
from batch_infer.cli.logs import FORMATS, set_log_format, set_up_logging
from batch_infer.cli.names import PREFIX, variable_of
from batch_infer.cli.option_types import DurationType, MetricsPath, SemicolonList, SlotsType

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Function], Function]


def _group(*decorators: Decorator[Any]) -> Decorator[Any]:
    """Return one decorator that adds several options, in this order."""

    def decorate(function: Any) -> Any:
        return functools.reduce(lambda decorated, decorator: decorator(decorated), reversed(decorators), function)

    return decorate


def command(*options: Decorator[Any], name: str | None = None) -> Callable[[Callable[..., int]], click.Command]:
    """Return a decorator that makes a function a command with these options and --config, -q, -v and --log-format.

    Every option can also be set by a BATCH_INFER_ variable. Logging is set up before the function is called.
    """

    def decorate(function: Callable[..., int]) -> click.Command:
        @functools.wraps(function)
        def run(*, quiet: bool, verbose: bool, **values: Any) -> int:
            set_up_logging(quiet=quiet, verbose=verbose)
            return function(quiet=quiet, **values)

        settings = {"auto_envvar_prefix": PREFIX.rstrip("_")}
        return click.command(name, context_settings=settings)(_group(config_option, *options, *logging_options)(run))

    return decorate


def option(*names: str, **attributes: Any) -> Decorator[Any]:
    """Return an option whose help shows its default."""
    return click.option(*names, show_default="default" in attributes, **attributes)


def option_with_aliases(*names: str, **attributes: Any) -> Decorator[Any]:
    """Return an option whose other long names are options, environment variables and --config keys too."""
    return option(*names, envvar=[variable_of(name) for name in names], **attributes)


table_options = _group(
    click.argument("tables", metavar="TABLE...", nargs=-1, required=True),
    option("-o", "--out", default="batch-infer-out", help="Folder for images and results."),
    option(
        "--column",
        "columns",
        type=SemicolonList(),
        metavar="FIELD=NAME",
        envvar="BATCH_INFER_COLUMN",
        multiple=True,
        help="The table's column for a field: prompt=caption. `height=` ignores that column. Repeatable; "
        "in BATCH_INFER_COLUMN, separate several with semicolons.",
    ),
    option(
        "--id-from",
        type=click.Choice(get_args(s.IdSource)),
        default="row",
        help="Default id of a row. row: file name and row number. content: a digest of its cells, so that renaming, "
        "sorting or splitting the tables changes no id, seed or image.",
    ),
    option("--limit", type=click.IntRange(min=1), metavar="N", help="Render only the first N rows."),
)

model_options = _group(
    option(
        "--model",
        metavar="ID|DIR|FILE",
        help="Hugging Face id, diffusers folder or single .safetensors file; default: the demo model.",
    ),
    option("--revision", metavar="REV", help="Revision of a Hugging Face model."),
    option("--variant", metavar="NAME", help="Variant of the weight files, such as fp16."),
    option(
        "--lora",
        "loras",
        type=SemicolonList(),
        metavar="FILE[:WEIGHT]",
        envvar="BATCH_INFER_LORA",
        multiple=True,
        help="A LoRA to add to the model's weights: style.safetensors:0.8. Repeatable; in "
        "BATCH_INFER_LORA, separate several with semicolons.",
    ),
    option(
        "--long-prompts",
        is_flag=True,
        help="Read 225 tokens of a prompt instead of 75, and weights of words such as (dark red)1.3 or blue++, with "
        "compel. Changes every image slightly.",
    ),
    option(
        "--dtype",
        type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
        default="auto",
        help="auto: float16 on a GPU (bfloat16 for Stable Diffusion 3 and models that run in their diffusers "
        "pipeline), float32 on a CPU.",
    ),
    option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto"),
    option(
        "--scheduler",
        metavar="NAME[:KEY=VALUE,...]",
        help="A diffusers scheduler class, such as UniPCMultistepScheduler:solver_order=3, or a short name: euler, "
        "euler a, dpm++ 2m karras, ddim, unipc. Other settings are those of the model's own scheduler.",
    ),
    option_with_aliases(
        "--slots",
        "--batch-size",
        type=SlotsType(),
        metavar="N|auto",
        help="UNet batch size, in batch elements; a row with guidance takes two. auto measures, once for each device, "
        "model and size, the batch size beyond which throughput stops rising. Default: 16 on a CPU, 32 on a GPU. "
        "Halved on out-of-memory.",
    ),
    option(
        "--threads",
        type=click.IntRange(min=1),
        metavar="N",
        help="torch threads of each process on a CPU. Default: the number of cores divided by that of processes.",
    ),
    option(
        "--compile/--no-compile",
        "compiled",
        envvar="BATCH_INFER_COMPILE",
        default=None,
        help="Compile the networks with torch.compile, which takes a minute or more for each size. Default: yes on a "
        "GPU if Triton and a C compiler are installed.",
    ),
)

processes_option = option(
    "--num-processes",
    type=click.IntRange(min=0),
    metavar="N",
    help="Worker processes, one per device. Default: one for each visible GPU, else 1. 0: render in the command's "
    "own process.",
)

row_options = _group(
    option_with_aliases(
        "--steps",
        "--num-inference-steps",
        type=int,
        metavar="N",
        help="Default steps for rows without num_inference_steps.",
    ),
    option_with_aliases(
        "--guidance-scale",
        "--guidance",
        type=float,
        metavar="X",
        help="Default guidance scale. Values up to 1 disable guidance.",
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
    option("--seed", type=int, default=0, metavar="N", help="Base seed for rows without their own."),
)

results_options = _group(
    option(
        "--results",
        type=click.Choice(get_args(s.ResultsFormat)),
        multiple=True,
        help="Additional formats of the results; results.parquet is always written. Repeatable.",
    ),
    option("--base64", is_flag=True, help="In results.csv and .jsonl, embed images in base64 as generated_image."),
)

on_flagged_option = option(
    "--on-flagged",
    type=click.Choice(get_args(s.OnFlagged)),
    help="How to store a flagged image: as a black placeholder, as it is, blurred, under quarantine/, or not at all. "
    "Default: that of the run in OUT, else blank.",
)

safety_options = _group(
    option(
        "--safety",
        type=click.Choice(get_args(s.SafetyMode)),
        default="auto",
        help="auto: the model's own checker if it has one, and Azure AI Content Safety if CONTENT_SAFETY_ENDPOINT is "
        "set; checker: the model must have one; azure: the service; none: images are not checked.",
    ),
    on_flagged_option,
    option("--require-safety", is_flag=True, help="Refuse to run if images would not be checked."),
)

output_options = _group(
    safety_options,
    option("--image-format", type=click.Choice(get_args(s.ImageFormat)), default="png"),
    results_options,
    option(
        "--max-failed",
        default="0",
        metavar="N|P%",
        help="Number or share of rows that may fail or be invalid in a successful run.",
    ),
    option(
        "--price-per-hour",
        type=click.FloatRange(min=0),
        metavar="X",
        help="Machine price per hour, used to report cost.",
    ),
)


unattended_options = _group(
    option(
        "--time-limit",
        type=DurationType(),
        metavar="DURATION",
        help="Stop after this long, as on SIGTERM: 90s, 30m, 2h, 1h30m, 1d, or seconds. Finished images are kept, the "
        "exit code is 75 if images are left, and the same command resumes.",
    ),
    option(
        "--metrics-file",
        type=MetricsPath(dir_okay=False),
        metavar="FILE",
        help="Write Prometheus metrics to this file, for node_exporter's textfile collector, which reads *.prom.",
    ),
)
"""For commands that run unattended."""

job_options = _group(
    table_options,
    model_options,
    processes_option,
    row_options,
    output_options,
    unattended_options,
    option(
        "--rerender-changed",
        is_flag=True,
        help="Render finished images again if a default, such as --steps, differs from that of the run that made them. "
        "Without this option such a run stops before it renders anything.",
    ),
    option(
        "--overwrite",
        is_flag=True,
        help="Start from scratch: remove what earlier runs made in OUT, once the model is loaded.",
    ),
)
"""The options of `run` and `plan`."""

out_argument = click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
"""The folder of an existing run."""

json_option = option("--json", "as_json", envvar="BATCH_INFER_JSON", is_flag=True, help="Print the result as JSON.")
progress_option = option("--no-progress", is_flag=True, help="No progress bar or lines.")
logging_options = (
    option("-q", "--quiet", is_flag=True, help="Print nothing on success, for cron."),
    option("-v", "--verbose", is_flag=True, help="Log more."),
    option(
        "--log-format",
        type=click.Choice(FORMATS),
        default="text",
        is_eager=True,
        expose_value=False,
        callback=lambda context, param, name: set_log_format(name),
        help="json: write one JSON object per line to stderr.",
    ),
)
