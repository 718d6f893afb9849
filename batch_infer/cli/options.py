"""Define options that several commands share, and the decorator that turns a function into a command."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from batch_infer import settings as s
from batch_infer.cli.config import PREFIX, config_option, variable_of
from batch_infer.cli.logs import FORMATS, set_log_format, set_up_logging
from batch_infer.cli.sections import Section, SectionedCommand, flatten
from batch_infer.cli.shells import argument, complete_path, is_path
from batch_infer.cli.values import POSITIVE, MetricsPath, SemicolonList, parse_duration, parse_out, parse_slots
from batch_infer.extras import install_command


def command(
    *params: click.Parameter | Section, name: str | None = None
) -> Callable[[Callable[..., int]], click.Command]:
    """Return a decorator that turns a function into a command with these parameters and --config, -q, -v, --log-format.

    The help prints sections under their titles. Every option also has a BATCH_INFER_ variable. Logging is set up before
    the function is called.
    """

    def decorate(function: Callable[..., int]) -> click.Command:
        @functools.wraps(function)
        def run(*, quiet: bool, verbose: bool, **values: Any) -> int:
            set_up_logging(quiet=quiet, verbose=verbose)
            return function(quiet=quiet, **values)

        environment = {"auto_envvar_prefix": PREFIX.rstrip("_")}
        decorator = click.command(
            name,
            SectionedCommand,
            params=[config_option, *flatten(params), *logging_options],
            sections=[param for param in params if isinstance(param, Section)],
            context_settings=environment,
        )
        return decorator(run)

    return decorate


def option(*names: str, **attributes: Any) -> click.Option:
    """Return an option whose help shows its default, if one is given. The shell completes paths."""
    complete = complete_path if is_path(attributes.get("metavar")) else None
    return click.Option(names, show_default="default" in attributes, shell_complete=complete, **attributes)


def option_with_aliases(*names: str, **attributes: Any) -> click.Option:
    """Return an option with an environment variable and a --config key for each of its names."""
    return option(*names, envvar=[variable_of(name) for name in names], **attributes)


model_options = (
    option(
        "--model",
        metavar="ID|DIR|FILE",
        help="Hugging Face id, diffusers folder or single .safetensors file. Default: the demo model.",
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
        help="LoRA to add to the model's weights: style.safetensors:0.8. Repeatable; separate several in "
        f"BATCH_INFER_LORA with semicolons. Needs `{install_command('lora')}`.",
    ),
    option(
        "--lora-folder",
        metavar="DIR",
        help="Folder of LoRAs for single rows. The column lora names one of its .safetensors files without the suffix, "
        "with a weight if needed: style or style:0.8. Rows with an empty cell get only those of --lora. Needs "
        f"`{install_command('lora')}`. Not for bench and export-mlflow.",
    ),
    option(
        "--embedding",
        "embeddings",
        type=SemicolonList(),
        metavar="FILE[:TOKEN]",
        envvar="BATCH_INFER_EMBEDDING",
        multiple=True,
        help="Textual inversion embedding: toy.safetensors. Prompts refer to it by its token: TOKEN, else the one in "
        "the file, else the file's name without suffix. Repeatable; separate several in BATCH_INFER_EMBEDDING with "
        "semicolons.",
    ),
    option(
        "--long-prompts",
        is_flag=True,
        help="Read 225 tokens of a prompt instead of 75, and word weights such as (dark red)1.3 or blue++, with "
        f"compel. Changes every image slightly. Needs `{install_command('long-prompts')}`.",
    ),
    option(
        "--dtype",
        type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
        default="auto",
        help="Data type of the networks. auto: float16 on a GPU (bfloat16 for Stable Diffusion 3 and for pipelines "
        "outside the model families, see docs/models.md), float32 on a CPU.",
    ),
    option(
        "--quantize",
        type=click.Choice(get_args(s.Quantization)),
        help="Store the weights of the denoiser's and the text encoders' linear layers in 8 bits, or in 4 (nf4), which "
        f"changes every image. Needs `{install_command('quantize')}`.",
    ),
    option(
        "--scheduler",
        metavar="NAME[:KEY=VALUE,...]",
        help="diffusers scheduler class, such as UniPCMultistepScheduler:solver_order=3, or a short name: euler, "
        "euler a, dpm++ 2m karras, ddim, unipc. Other settings are those of the model's own scheduler.",
    ),
)

compute_options = (
    option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="auto: a GPU if there is one."),
    option_with_aliases(
        "--slots",
        "--batch-size",
        type=parse_slots,
        metavar="N|auto",
        help="Batch size of the denoiser; a row with guidance usually counts twice. auto measures, once for each "
        "device, model and size, the batch size beyond which throughput stops rising. Default: 16 on a CPU, 32 on a "
        "GPU. Halved if the device runs out of memory.",
    ),
    option(
        "--threads",
        type=POSITIVE,
        metavar="N",
        help="torch threads of each process on a CPU, whatever OMP_NUM_THREADS says. Default: the number of cores "
        "divided by the number of processes. Use fewer if other programs keep the cores busy.",
    ),
    option(
        "--compile/--no-compile",
        "compiled",
        envvar="BATCH_INFER_COMPILE",
        default=None,
        help="Compile the networks with torch.compile, which takes a minute or more for each size. Default: yes on a "
        "GPU if Triton and a C compiler are installed, but no for pipelines outside the model families (see "
        "docs/models.md).",
    ),
)

results_options = (
    option(
        "--results",
        type=click.Choice(get_args(s.ResultsFormat)),
        multiple=True,
        help="Additional formats of the results; results.parquet is always written. openai writes output.jsonl and "
        "error.jsonl, the files of OpenAI's Batch API. Repeatable.",
    ),
    option(
        "--base64",
        is_flag=True,
        help="Embed images in base64: in results.csv and .jsonl as generated_image, in output.jsonl as b64_json.",
    ),
)

sign_key_option = option(
    "--sign-key",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Sign OUT/manifest/SHA256SUMS with this Ed25519 private key (`openssl genpkey -algorithm ed25519`), for "
    f"`verify --public-key`. Needs `{install_command('sign')}`.",
)

c2pa_options = (
    option(
        "--c2pa-cert",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        help="Certificate of --provenance c2pa and those that certify it, in one PEM file, the signer's first.",
    ),
    option(
        "--c2pa-key",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        help="Private key of --c2pa-cert: a PEM file without a passphrase. run.json records neither file, so `retry` "
        "and `rescore` need both options again.",
    ),
)

on_flagged_option = option(
    "--on-flagged",
    type=click.Choice(get_args(s.OnFlagged)),
    help="How to store a flagged image: as a black placeholder, unchanged, blurred, in quarantine/, or not at all. "
    "Default: the setting of the run in OUT, else blank.",
)


def _make_time_limit_option(consequence: str) -> click.Option:
    return option(
        "--time-limit",
        type=parse_duration,
        metavar="DURATION",
        help=f"Stop after this long, as on SIGTERM: 90s, 30m, 2h, 1h30m, 1d, or seconds. {consequence}",
    )


check_time_limit_option = _make_time_limit_option("The exit code is then 75, and no result is printed.")
unattended_options = (
    _make_time_limit_option(
        "Finished images are kept, the exit code is 75 if images are left, and the same command resumes."
    ),
    option(
        "--metrics-file",
        type=MetricsPath(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Write Prometheus metrics to this file, for node_exporter's textfile collector, which reads *.prom.",
    ),
)

out_argument = argument("out", "OUT", callback=lambda _context, _parameter, value: parse_out(value))
"""The folder of an existing run."""
moved_tables_argument = argument("tables", "[TABLE...]", nargs=-1)
"""The tables of an existing run, if they were moved."""

json_option = option("--json", "as_json", envvar="BATCH_INFER_JSON", is_flag=True, help="Print the result as JSON.")
progress_option = option("--no-progress", is_flag=True, help="Show no progress bar and log no progress lines.")
logging_options = (
    option("-q", "--quiet", is_flag=True, help="Print nothing on success, for cron."),
    option("-v", "--verbose", is_flag=True, help="Log debug messages too."),
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
