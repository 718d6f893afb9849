"""Runs with torch.compile: failures to compile, and the device figures of the summary."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batch_infer.autotune.cache import Rates
from batch_infer.autotune.probe import Probe
from batch_infer.engines import Task, TaskReport
from batch_infer.engines.inline import InlineEngine
from batch_infer.errors import BatchInferError, CompilationError
from batch_infer.jobs import job
from batch_infer.jobs import run as jobs
from batch_infer.jobs.compute import choose_compute
from batch_infer.jobs.plan import make_plan
from batch_infer.jobs.run import render_tables
from batch_infer.models import read_card
from batch_infer.records import utc_now
from batch_infer.settings import Compute, ComputeSettings, Device, ModelSettings, RunSettings, TableSettings
from tests.runs import results, run_json
from tests.tables import write_csv

FAULT = "torch.compile failed (no backend); --no-compile turns it off"


class Silent:
    """Progress that ignores all events."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


class Uncompilable(InlineEngine):
    """The inline engine, but torch.compile fails after `before` rows are committed."""

    def __init__(self, before: int) -> None:
        super().__init__("cpu")
        self._before = before
        self.compiled: list[bool] = []

    def render(self, task: Task, *args: Any) -> TaskReport:
        self.compiled.append(task.settings.compute.compiled)
        if not task.settings.compute.compiled:
            return super().render(task, *args)
        requests = list(task.requests)[: self._before]
        if requests:
            plain = replace(task.settings, compute=replace(task.settings.compute, compiled=False))
            super().render(Task(requests, len(requests), plain), *args)
        raise CompilationError(FAULT)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSettings:
    """Settings of a run that compiles by default, as on a GPU."""
    choose = vars(job)["choose_compute"]
    monkeypatch.setattr(
        job,
        "choose_compute",
        lambda settings, *args: replace(choose(settings, *args), compiled=settings.compute.compiled is not False),
    )
    table = write_csv(tmp_path / "t.csv", [["prompt", "num_inference_steps"], *(["a ring", "4"] for _ in range(3))])
    compute = ComputeSettings(slots=4, threads=1)
    return RunSettings(TableSettings((str(table),)), str(tmp_path / "out"), compute=compute)


def use(engine: Uncompilable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "make_engine", lambda *_: engine)


def test_a_run_continues_without_compilation_in_all_workers(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(engine := Uncompilable(before=0), monkeypatch)
    summary = render_tables(settings, Silent())
    assert (summary.counts.ok + summary.counts.flagged, engine.compiled) == (3, [True, False])
    assert not run_json(Path(settings.out))["compute"]["compiled"]
    assert f"{FAULT}; no image has been rendered yet, so this run continues without it" in caplog.text


@pytest.mark.parametrize(("before", "requested"), [(1, None), (0, True)])
def test_compiled_and_uncompiled_images_are_not_mixed(
    before: int, requested: bool | None, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(engine := Uncompilable(before), monkeypatch)
    settings = replace(settings, compute=replace(settings.compute, compiled=requested))
    with pytest.raises(BatchInferError, match=re.escape(FAULT)):
        render_tables(settings, Silent())
    assert engine.compiled == [True]
    assert len(results(Path(settings.out))) == before if before else not Path(settings.out, "results.parquet").exists()


def test_a_resumed_run_without_its_compiler_is_refused_with_remedies(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(Uncompilable(before=2), monkeypatch)
    with pytest.raises(BatchInferError):
        render_tables(settings, Silent())
    use(engine := Uncompilable(before=0), monkeypatch)
    with pytest.raises(CompilationError, match="rendered without it would differ: add --overwrite"):
        render_tables(settings, Silent())
    assert engine.compiled == [True]
    assert len(results(Path(settings.out))) == 2


def test_an_invalid_row_does_not_count_as_a_compiled_image(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_csv(Path(settings.table.tables[0]), [["prompt", "num_inference_steps"], ["", "4"], ["a ring", "4"]])
    use(engine := Uncompilable(before=0), monkeypatch)
    counts = render_tables(replace(settings, table=replace(settings.table, tables=(str(table),))), Silent()).counts
    assert (counts.ok + counts.flagged, counts.invalid, engine.compiled) == (1, 1, [True, False])


@pytest.mark.parametrize("requested", [None, True])
def test_a_plan_measures_without_compilation_if_the_run_would(
    requested: bool | None, settings: RunSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled: list[bool] = []

    def rates(probe: object, card: object, compute: Compute, *_: object) -> Rates:
        compiled.append(compute.compiled)
        if compute.compiled:
            raise CompilationError(FAULT)
        return Rates(1.0, 1.0, 1.0, 1.0, utc_now())

    monkeypatch.setattr(Probe, "measure_rates", rates)
    monkeypatch.setattr(Probe, "count_evaluations", lambda _, card, steps: steps)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = replace(settings, compute=replace(settings.compute, compiled=requested))
    if requested:
        with pytest.raises(CompilationError):
            make_plan(settings, lambda row: None)
        assert compiled == [True]
    else:
        assert make_plan(settings, lambda row: None).pending == 3
        assert compiled == [True, False]


def test_the_summary_has_the_model_flops_utilisation(settings: RunSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch_infer.worker.worker.peak_tflops", lambda name, dtype: 1e-3)
    settings = replace(settings, compute=replace(settings.compute, compiled=False, processes=0))
    once = render_tables(settings, Silent()).mfu
    assert once is not None
    monkeypatch.setattr("batch_infer.worker.worker.peak_tflops", lambda name, dtype: None)
    assert render_tables(replace(settings, overwrite=True), Silent()).mfu is None
    assert once > 0


@pytest.mark.parametrize(
    ("family", "earlier_dtype", "dtype"),
    [("stable_diffusion", None, "float16"), ("stable_diffusion_3", None, "bfloat16"),
     ("stable_diffusion_3", "float16", "float16"), ("any_pipeline", None, "bfloat16")],
)  # fmt: skip
def test_the_default_dtype_on_a_gpu_depends_on_the_family(
    family: str, earlier_dtype: str | None, dtype: str, tmp_path: Path
) -> None:
    """Diffusion transformers overflow in float16, but a run that an earlier version started in float16 continues so."""
    card = replace(read_card(ModelSettings()), family=family)
    earlier = None if earlier_dtype is None else {"compute": {"dtype": earlier_dtype}}
    settings = RunSettings(TableSettings(()), str(tmp_path), compute=ComputeSettings(compiled=False))
    assert choose_compute(settings, Device("cuda", "NVIDIA H200"), earlier, card).dtype == dtype
