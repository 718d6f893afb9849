"""Define the functions of `import batch_infer`, which do in Python what the commands of the same name do."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from batch_infer import cli
from batch_infer import settings as s
from batch_infer.api.calls import (
    OLD_PAGE,
    RESUME,
    UNCHANGED,
    PathLike,
    Table,
    make_settings,
    name_arguments,
    name_tables,
    named_arguments,
    parse_out,
    parse_time_limit,
    stoppable,
)
from batch_infer.errors import SettingsError, StoppedError, TooManyFailedError
from batch_infer.jobs import (
    MAX_RESULTS,
    THUMBNAIL_SIZE,
    Gallery,
    GalleryOptions,
    Plan,
    RunStatus,
    Summary,
    Verification,
    VerifyOptions,
    make_gallery,
    make_plan,
    make_recipe,
    read_frame,
    read_status,
    render_tables,
    verify_run,
)
from batch_infer.records import Status
from batch_infer.stopping import TIME_LIMIT
from batch_infer.table import in_memory_tables

if TYPE_CHECKING:
    import pandas as pd

P = ParamSpec("P")
T = TypeVar("T")
GALLERY_COMMAND = cli.commands.commands["gallery"]


def run(
    table: Table,
    *,
    out: PathLike = "batch-infer-out",
    column: Mapping[str, str] | Sequence[str] = (),
    id_from: s.IdSource = "row",
    limit: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_rescale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str | None = None,
    images_per_prompt: int = 1,
    seed: int = 0,
    model: PathLike | None = None,
    revision: str | None = None,
    variant: str | None = None,
    lora: PathLike | Sequence[PathLike] = (),
    lora_folder: PathLike | None = None,
    embedding: PathLike | Sequence[PathLike] = (),
    long_prompts: bool = False,
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
    quantize: s.Quantization | None = None,
    scheduler: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    slots: int | Literal["auto"] | None = None,
    threads: int | None = None,
    compile: bool | None = None,
    offload: s.Offload | None = None,
    num_processes: int | None = None,
    engine: s.EngineName = "local",
    ray_address: str | None = None,
    safety: s.SafetyMode = "auto",
    on_flagged: s.OnFlagged | None = None,
    require_safety: bool = False,
    image_format: s.ImageFormat = "png",
    sink: s.SinkName = "folder",
    provenance: str | Sequence[str] = "iptc",
    c2pa_cert: PathLike | None = None,
    c2pa_key: PathLike | None = None,
    prompt_metadata: bool = True,
    results: s.ResultsFormat | Sequence[s.ResultsFormat] = (),
    base64: bool = False,
    sign_key: PathLike | None = None,
    gallery: bool = False,
    max_failed: int | str = 0,
    price_per_hour: float | None = None,
    time_limit: float | str | None = None,
    metrics_file: PathLike | None = None,
    rerender_changed: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Summary:
    """Render the prompts of a table into OUT, and return when every row has a result.

    Arguments are the options of `batch-infer run` (`batch-infer run --help` describes them), and `progress` shows a
    progress bar. Call the function again to continue: finished rows are skipped.

    Raises UsageError for what must be changed first (SettingsError, TableError, ModelError, ...), RetryableError for
    what may pass (LockedError, StorageError, ServiceError, StoppedError at the time limit), and TooManyFailedError at
    the end if more rows failed or were invalid than `max_failed` allows. On Ctrl-C, finished images are committed and
    results.* written before KeyboardInterrupt is raised. A second Ctrl-C raises it immediately.
    """
    with make_settings(table, locals()) as (settings, values):
        metrics = cli.Metrics(values["metrics_file"], settings.out, settings.model.name or "demo")
        listeners = [cli.ProgressBar(cli.find_bar_type())] if progress else []
        with stoppable(values["time_limit"], metrics) as stop:
            summary = render_tables(settings, cli.ProgressGroup(*listeners, metrics), stop)
            has_too_many = not settings.max_failed.allows(summary.counts.bad_rows, summary.counts.rows)
            code = StoppedError.exit_code if summary.unfinished else TooManyFailedError.exit_code * has_too_many
            metrics.conclude(summary, code)
        if gallery:
            cli.update_gallery(settings.out, stop)
    if summary.unfinished:
        reason = f"{TIME_LIMIT} was reached" if stop.reason == TIME_LIMIT else "stopped early"
        left = cli.format_count(summary.unfinished, "image")
        raise StoppedError(f"{reason} with {left} left; {RESUME}")
    if has_too_many:
        raise _too_many_failed(summary, settings.out)
    return summary


def _too_many_failed(summary: Summary, out: str) -> TooManyFailedError:
    counts = summary.counts
    error = TooManyFailedError(
        f"{counts.bad_rows:,} of {counts.rows:,} rows failed or are invalid, which is more than max_failed allows. The "
        f"first error is {counts.bad_results[0]}. batch_infer.results({out!r}) has all of them"
    )
    error.summary = summary
    return error


def _takes_arguments_of(other: Callable[P, object]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Return a decorator that gives a function the arguments of another one, also for type checkers and help()."""
    signature = inspect.signature(other)

    def decorate(function: Callable[..., T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(*bound.args, **bound.kwargs)

        returned = inspect.signature(function).return_annotation
        call.__signature__ = signature.replace(return_annotation=returned)  # type: ignore[attr-defined]
        return call

    return decorate


@_takes_arguments_of(run)
def plan(table: Table, **options: Any) -> Plan:
    """Return what `run` with the same arguments would do, without rendering.

    `time_limit`, `metrics_file`, `gallery` and `progress` have no effect. If `run` would refuse changed defaults,
    `refusal` is its message. Raises the other errors that `run` raises before it renders.
    """
    with make_settings(table, options) as (settings, _):
        plan = make_plan(settings)
    plan.refusal = plan.refusal and name_arguments(plan.refusal, cli.options_by_keyword())
    return plan


def status(out: PathLike) -> RunStatus:
    """Return the state and the progress of the run in OUT, which may be active. Raises UsageError, StorageError."""
    return read_status(parse_out(out))


def gallery(
    out: PathLike,
    to: PathLike | None = None,
    *,
    max_results: int = MAX_RESULTS,
    only_status: Status | Sequence[Status] = (),
    thumbnail_size: int = THUMBNAIL_SIZE,
    thumbnail_threads: int | None = None,
    time_limit: float | str | None = None,
    progress: bool = False,
) -> Gallery:
    """Make or update a page for looking through the images of OUT, and return its path and what it shows.

    Arguments are the options of `batch-infer gallery`. Raises UsageError, and RetryableError, for example at the time
    limit.
    """
    values = cli.convert_keywords(GALLERY_COMMAND, locals())
    sizes = values["thumbnail_size"], values["thumbnail_threads"]
    target = None if to is None else parse_out(to)
    options = GalleryOptions(target, values["max_results"], values["statuses"], *sizes)
    bar_type = cli.find_bar_type() if progress else None
    with (
        named_arguments(cli.options_by_keyword(GALLERY_COMMAND)),
        stoppable(values["time_limit"], hint=OLD_PAGE) as stop,
        closing(cli.CheckProgress("image", "added", shown=progress, bar_type=bar_type)) as check_progress,
    ):

        def report(done: int, total: int) -> None:
            check_progress(done, total)
            if stop():
                raise stop.error()

        return make_gallery(parse_out(out), options, report)


def results(out: PathLike) -> pd.DataFrame:
    """Return the results of OUT in table order, one row per image, as a DataFrame with Arrow types.

    `generated_image` is an absolute path or a URL, or null without an image. Raises UsageError, StorageError.
    """
    return read_frame(parse_out(out))


def verify(
    out: PathLike,
    table: Table | None = None,
    *,
    quick: bool = False,
    public_key: PathLike | None = None,
    fix: bool = False,
    sample: int | None = None,
    seed: int | None = None,
    time_limit: float | str | None = None,
    progress: bool = False,
) -> Verification:
    """Check that every row of OUT is accounted for and that every file is intact, and return the problems.

    Arguments are the options of `batch-infer verify`; `table` replaces the tables of the run, if they were moved or in
    memory. Raises UsageError, and RetryableError, for example at the time limit or if another command is using OUT.
    """
    if sample is not None and (not isinstance(sample, int) or sample < 1):
        raise SettingsError(f"sample={sample!r}: pass the number of images to render again")
    if seed is not None and (sample is None or not isinstance(seed, int) or seed < 0):
        raise SettingsError(f"seed={seed!r}: pass a whole number from 0, together with sample")
    tables, in_memory = ((), {}) if table is None else name_tables(table)
    options = VerifyOptions(
        tables=tables,
        is_quick=quick,
        public_key=None if public_key is None else os.fspath(public_key),
        marks_failed=fix,
        sample_size=sample or 0,
        sample_seed=seed or 0,
    )
    bar_type = cli.find_bar_type() if progress else None
    group = cli.ProgressGroup(*([cli.ProgressBar(bar_type)] if bar_type else []))
    with (
        in_memory_tables(in_memory),
        stoppable(parse_time_limit(time_limit), hint=UNCHANGED) as stop,
        closing(cli.CheckProgress("image", "checked", shown=progress, bar_type=bar_type)) as check_progress,
    ):

        def report(done: int, total: int) -> None:
            check_progress(done, total)
            if stop():
                raise stop.error()

        return verify_run(parse_out(out), options, report, group, stop)


def recipe(out: PathLike, id: str, image_index: int = 0) -> str:
    """Return a script that makes an image of OUT again with plain diffusers.

    `image_index` selects one of the row's images. Raises UsageError, for example if OUT has no such image or plain
    diffusers cannot make it, and StorageError.
    """
    return make_recipe(parse_out(out), id, image_index)
