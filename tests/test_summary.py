"""The summary that `run`, `retry` and `status` print: which lines, in which order, and which of them a run needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from batch_infer.cli.summary import SHOWS_STAGES, Place, format_energy, progress_lines, summary_lines
from batch_infer.energy import EnergyReading
from batch_infer.engines import TaskReport
from batch_infer.jobs.out import GALLERY
from batch_infer.jobs.run_json import add_counts
from batch_infer.jobs.summary import Counts, Reason, Summary
from batch_infer.manifest import to_table
from batch_infer.records import ResultRow, utc_now
from batch_infer.settings import OutputSettings, SafetySettings
from batch_infer.stages import Stages
from batch_infer.worker import WorkerReport
from tests.runs import command, run, run_json
from tests.tables import write_csv

STAGES = {"encode": 0.021, "denoise": 0.8, "decode": 0.176, "check": 0.003}


def summarize(summary: Summary, **place: Any) -> list[str]:
    return list(summary_lines(summary, Place("o", **place)))


# Lines


def test_a_small_run_has_four_lines() -> None:
    summary = Summary(Counts(rows=2, images=2, ok=2), 2, 9.0, rendering_seconds=4.0, occupancy=0.3, stage_shares=STAGES)
    assert summarize(summary) == [
        "2 rows · 2 ok · 0 flagged",
        "speed    0.50 images/s (2 images in 4.0 s, 9.0 s in all)",
        "images   o/images",
        "results  o/results.parquet",
    ]


def test_a_large_run_says_where_the_time_the_energy_and_the_money_went() -> None:
    counts = Counts(rows=12_000, images=12_000, ok=11_900, flagged=100, folders={"images": 11_900, "quarantine": 100})
    summary = Summary(counts, 12_000, 3700.0, 7.4, 3600.0, occupancy=0.956, mfu=0.412, stage_shares=STAGES,
                      energy_wh=1234.5, processes=4)  # fmt: skip
    assert summarize(summary, gallery="/x/o/gallery/index.html") == [
        "12,000 rows · 11,900 ok · 100 flagged",
        "flagged  -> stored as black images; to see them, render into another --out with --on-flagged keep",
        "speed    3.33 images/s (12,000 images in 1 h 00 min, 1 h 01 min in all)",
        "time     denoise 80% · decode 18% · encode 2%, slot occupancy 96%, MFU 41.2%",
        "energy   1.23 kWh on the GPUs, 0.103 Wh per image",
        "cost     7.40 (0.62 per 1,000 images)",
        "images   o/images (11,900), o/quarantine (100)",
        "results  o/results.parquet",
        "gallery  /x/o/gallery/index.html",
    ]


def test_the_time_by_stage_is_shown_from_many_images_or_a_long_time() -> None:
    images, seconds = SHOWS_STAGES
    for rendered, rendering_seconds, is_shown in ((images, 1.0, True), (images - 1, 1.0, False), (1, seconds, True)):
        summary = Summary(rendered=rendered, rendering_seconds=rendering_seconds, stage_shares=STAGES)
        assert any(line.startswith("time ") for line in summarize(summary)) == is_shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "25.00 images/s (1 image in 0.0 s, 0.0 s in all)"),
        (9.9, "0.10 images/s (1 image in 9.9 s, 9.9 s in all)"),
        (12.34, "12.3 s per image (1 image in 12.3 s, 12.3 s in all)"),
        (59.9, "1 min 00 s per image (1 image in 1 min 00 s, 1 min 00 s in all)"),
        (7260, "2 h 01 min per image (1 image in 2 h 01 min, 2 h 01 min in all)"),
    ],
)
def test_the_speed_is_readable_whether_high_or_low(seconds: float, text: str) -> None:
    summary = Summary(Counts(rows=1, images=1, ok=1), rendered=1, seconds=seconds, rendering_seconds=seconds)
    assert f"speed    {text}" in summarize(summary)


@pytest.mark.parametrize(
    ("watt_hours", "text"),
    [(0.00123, "1.23 mWh"), (0.0999, "99.9 mWh"), (0.1034, "0.103 Wh"), (1.0, "1 Wh"),
     (45.678, "45.7 Wh"), (999.4, "999 Wh"), (1000, "1 kWh"), (1234567, "1,235 kWh")],
)  # fmt: skip
def test_energy_is_formatted_in_a_unit_of_its_size(watt_hours: float, text: str) -> None:
    assert format_energy(watt_hours) == text


def test_a_stopped_run_says_first_what_is_left_and_last_how_to_continue() -> None:
    counts = Counts(rows=12_345, images=12_000, ok=12_000, invalid=3, failed=2, remaining=340)
    assert summarize(Summary(counts, unfinished=340), output=OutputSettings(results=("csv", "parquet"))) == [
        "12,345 rows · 12,000 ok · 0 flagged · 3 invalid · 2 failed · 340 left",
        "failed   -> `batch-infer retry o --status failed` renders them again",
        "invalid  -> correct the table, then run the same command again",
        "images   o/images",
        "results  o/results.parquet, o/results.csv",
        "stopped early: 340 left; run the same command again to continue",
    ]


def test_a_run_without_images_names_no_folder_of_images() -> None:
    assert summarize(Summary(Counts(rows=1, invalid=1)))[-2:] == ["nothing to render", "results  o/results.parquet"]
    assert summarize(Summary())[1:] == ["nothing to render: no rows", "results  o/results.parquet"]


def test_images_in_shards_of_an_earlier_version_are_found_by_the_sink() -> None:
    """Its run.json has no numbers of images by folder."""
    lines = summarize(Summary(Counts(rows=1, images=1, ok=1)), output=OutputSettings(sink="webdataset"))
    assert "images   o/shards" in lines


def test_bad_results_are_listed_by_reason_with_the_next_command() -> None:
    reasons = [
        Reason("failed", 1, "t.csv, line 9 (x, image 1)", "out of memory"),
        Reason("invalid", 31, "t.csv, line 3 (b)", "the prompt is empty"),
        *(Reason("invalid", 2, f"t.csv, line {line} (x)", f"a reason {line}") for line in range(6)),
    ]
    counts = Counts(
        rows=99, ok=50, invalid=44, failed=5, truncated=2, reasons=reasons, first_truncated="t.csv, line 4 (c)"
    )
    assert list(summary_lines(Summary(counts, rendering_seconds=1.0), Place("my out")))[:-1] == [
        "99 rows · 50 ok · 0 flagged · 44 invalid · 5 failed · 2 prompts truncated",
        "failed   t.csv, line 9 (x, image 1): out of memory",
        "         and 4 more, in the results",
        "         -> `batch-infer retry 'my out' --status failed` renders them again",
        "invalid  t.csv, line 3 (b): the prompt is empty (30 more like it)",
        *(f"         t.csv, line {line} (x): a reason {line} (1 more like it)" for line in range(4)),
        "         and 5 more, in the results",
        "         -> correct the table, then run the same command again",
        "prompts  2 are too long for the model, which ignores their ends: first t.csv, line 4 (c)",
        "         -> shorten them, or render into another --out with --long-prompts",
    ]


def test_one_truncated_prompt_is_located() -> None:
    counts = Counts(rows=1, ok=1, truncated=1, first_truncated="t.csv, line 4 (c)")
    expected = "prompts  1 is too long for the model, which ignores its end: t.csv, line 4 (c)"
    assert expected in summarize(Summary(counts))


@pytest.mark.parametrize(("flagged", "share"), [(4, "all"), (3, "most"), (2, None), (0, None)])
def test_a_run_warns_if_most_images_are_flagged(flagged: int, share: str | None) -> None:
    lines = summarize(Summary(Counts(rows=4, images=4, ok=4 - flagged, flagged=flagged)))
    assert (f"flagged  {share} images are flagged: check the prompts" in lines) == (share is not None)
    advice = "render into another --out with --on-flagged keep"
    label = "flagged  " if share is None else "         "
    assert (f"{label}-> stored as black images; to see them, {advice}" in lines) == (flagged > 0)


def test_flagged_images_that_were_kept_can_be_looked_at() -> None:
    lines = summarize(Summary(Counts(rows=1, images=1, flagged=1)), safety=SafetySettings(on_flagged="quarantine"))
    assert "flagged  -> look at it in o/quarantine" in lines


def test_counts_add_up_to_the_number_of_results() -> None:
    counts = Counts(rows=4, images=9, ok=8, flagged=1, blocked=1, invalid=1, failed=1)
    assert summarize(Summary(counts))[0] == "4 rows, 12 results · 8 ok · 1 flagged · 1 blocked · 1 invalid · 1 failed"


def test_what_the_safety_checks_found_is_located() -> None:
    reasons = [
        Reason("flagged", 2, "t.csv, line 3 (b)", "the safety check flagged the image (concept_0 +0.131)"),
        Reason("blocked", 1, "t.csv, line 4 (c)", "the prompt was blocked"),
    ]
    lines = summarize(Summary(Counts(rows=6, images=5, ok=3, flagged=2, blocked=1, reasons=reasons)))
    assert lines[1:5] == [
        "blocked  t.csv, line 4 (c): the prompt was blocked",
        "         -> change the blocked prompts, then run the same command again",
        "flagged  t.csv, line 3 (b): the safety check flagged the image (concept_0 +0.131) (1 more)",
        "         -> stored as black images; to see them, render into another --out with --on-flagged keep",
    ]


def test_deaths_of_workers_are_reported_with_their_logs() -> None:
    line = "workers  2 workers died, and others took over the unfinished rows (see o/logs)"
    assert line in summarize(Summary(Counts(rows=1, ok=1), deaths=2))
    assert line in progress_lines(Summary(deaths=2), Place("o"))


def test_an_active_run_is_not_told_to_retry() -> None:
    """The command would be refused, since the run has locked OUT."""
    reasons = [Reason(status, 2, "t.csv, line 2 (a)", "an error") for status in ("failed", "invalid", "blocked")]
    counts = Counts(failed=2, invalid=2, blocked=2, reasons=reasons)
    assert list(progress_lines(Summary(counts), Place("o"))) == [
        "failed   t.csv, line 2 (a): an error (1 more like it)",
        "invalid  t.csv, line 2 (a): an error (1 more like it)",
        "blocked  t.csv, line 2 (a): an error (1 more)",
    ]


def test_the_gallery_is_suggested_for_a_run_with_many_images() -> None:
    hint = "gallery  `batch-infer gallery o` makes a page of the images and their rows"
    assert hint in summarize(Summary(Counts(rows=10, images=10, ok=10)))
    assert hint not in summarize(Summary(Counts(rows=9, images=9, ok=9)))
    assert hint not in summarize(Summary(Counts(rows=10, images=10, ok=10, remaining=1)))


def test_a_gallery_from_before_the_run_is_outdated() -> None:
    lines = summarize(Summary(), gallery="o/gallery/index.html", has_new_images=True)
    outdated = "(without the new images; update it with `batch-infer gallery o`)"
    assert f"gallery  o/gallery/index.html {outdated}" in lines


# Counts


def bad_row(index: int, status: Any, error: str, **values: Any) -> ResultRow:
    return ResultRow(id=f"r{index}", image_index=0, prompt="x", status=status, error=error, finished_at=utc_now(),
                     source_file="t.csv", source_row=index, fingerprint="f", **values)  # fmt: skip


def count(rows: Sequence[ResultRow]) -> Counts:
    counts = Counts()
    counts.add(to_table(rows, pa.schema([])))
    return counts


def test_errors_that_differ_only_in_numbers_and_quoted_texts_have_one_reason() -> None:
    rows = [
        bad_row(0, "invalid", "height 63 is not a multiple of 8; the nearest is 64"),
        bad_row(1, "invalid", "height 100.5 is not a multiple of 8; the nearest is 104"),
        bad_row(2, "invalid", "duplicate id 'e'"),
        bad_row(3, "invalid", 'duplicate id "it\'s"'),
        bad_row(4, "failed", "height 63 is not a multiple of 8; the nearest is 64"),
        bad_row(5, "flagged", "the safety check flagged the image (concept_0 +0.131)"),
        bad_row(6, "flagged", "the safety check flagged the image (special_care_0 +0.02)"),
        bad_row(7, "blocked", "the prompt was blocked (Violence 6)"),
    ]
    for counts in (count(rows), by_row := Counts()):
        if counts is by_row:
            for row in rows:
                by_row.add_row(row)
        assert [(reason.status, reason.results, reason.first, reason.error) for reason in counts.reasons] == [
            ("invalid", 2, "t.csv, row 0 (r0)", rows[0].error),
            ("invalid", 2, "t.csv, row 2 (r2)", rows[2].error),
            ("failed", 1, "t.csv, row 4 (r4)", rows[4].error),
            ("flagged", 2, "t.csv, row 5 (r5)", rows[5].error),
            ("blocked", 1, "t.csv, row 7 (r7)", rows[7].error),
        ]


def test_the_number_of_reasons_is_limited() -> None:
    """The texts of errors come from tables and libraries, and summaries are kept in memory and in run.json."""
    rows = [bad_row(index, "failed", f"reason {'x' * index}") for index in range(200)]
    flagged, blocked = bad_row(200, "flagged", "flagged"), bad_row(201, "blocked", "blocked")
    for counts in (count([*rows, flagged, blocked]), count([flagged, blocked, *rows])):
        statuses = [reason.status for reason in counts.reasons]
        assert (statuses.count("failed"), statuses.count("flagged"), statuses.count("blocked")) == (20, 1, 1)
        assert len(counts.bad_results) == 20
        assert counts.failed == 200


def test_images_are_counted_by_folder_and_the_first_truncated_prompt_is_located() -> None:
    rows = [
        bad_row(0, "ok", "", generated_image="images/t-00000/r0-0.png"),
        bad_row(1, "ok", "", generated_image="shards/a.tar#r1.png", prompt_truncated=True),
        bad_row(2, "flagged", "", generated_image="quarantine/t-00000/r2-0.png", prompt_truncated=True),
        bad_row(3, "flagged", ""),
    ]
    counts = count(rows)
    assert (counts.images, counts.folders) == (3, {"images": 1, "shards": 1, "quarantine": 1})
    assert (counts.truncated, counts.first_truncated) == (2, "t.csv, row 1 (r1)")


def test_keys_of_what_is_unknown_are_left_out() -> None:
    figures = Summary(Counts(rows=1, ok=1)).as_dict()
    assert not {"reasons", "first_truncated", "folders", "energy_wh", "energy_wh_per_image", "gallery"} & figures.keys()
    assert (figures["bad_results"], figures["cost"], figures["mfu"]) == ([], None, None)


def test_counts_after_a_rescore_replace_all_earlier_ones() -> None:
    earlier = {"summary": Summary(count([bad_row(0, "failed", "out of memory")]), rendered=7).as_dict()}
    summary = add_counts(earlier, Counts(rows=1, ok=1))["summary"]
    assert (summary["rendered"], summary["ok"], summary["failed"], summary["bad_results"]) == (7, 1, 0, [])
    assert "reasons" not in summary


def test_a_summary_can_be_read_from_run_json() -> None:
    counts = count([bad_row(0, "failed", "out of memory", prompt_truncated=True)])
    summary = Summary(counts, 5, 12.5, 1.5, 8.0, occupancy=0.5, unfinished=3, energy_wh=0.25, stage_shares=STAGES)
    assert Summary.from_dict(json.loads(json.dumps(summary.as_dict()))).as_dict() == summary.as_dict()


# Energy


def report(energy: EnergyReading | None, ticks: int = 1) -> WorkerReport:
    stages = Stages(denoise=1.0, seconds=1.0, ticks=ticks, slot_ticks=ticks, started_at=0.0, ended_at=1.0)
    compute: Any = SimpleNamespace()
    return WorkerReport({(64, 64): stages}, compute, None, {}, energy)


def test_energy_is_the_sum_over_all_devices() -> None:
    readings = [
        EnergyReading("a", 0, 3_600_000),
        EnergyReading("b", 0, 1_800_000),
        EnergyReading("b", 900_000, 1_800_000),
    ]
    summary = Summary(rendered=3)
    summary.add(TaskReport([*map(report, readings), report(None, ticks=0)], 1.0))
    assert (summary.energy_wh, summary.energy_wh_per_image) == (1.5, 0.5)
    assert summary.as_dict()["energy_wh_per_image"] == 0.5
    summary.add(TaskReport([*map(report, readings), report(None)], 1.0))
    assert summary.energy_wh is None, "that of one worker is unknown"


def test_a_run_reports_the_energy_of_its_worker(
    tmp_path: Path, table: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = SimpleNamespace(read=lambda: EnergyReading("GPU-a", 1_000_000, 8_200_000))
    monkeypatch.setattr("batch_infer.worker.worker.EnergyMeter", lambda device: meter)
    done = run(table, out, "--metrics-file", tmp_path / "run.prom", "--max-failed", "9")
    assert "energy   2 Wh on the GPU, 2 Wh per image" in done.stdout.splitlines()
    assert run_json(out)["summary"]["energy_wh"] == run_json(out)["summary"]["energy_wh_per_image"] == 2.0
    assert json.loads(command("status", out, "--json").stdout)["energy_wh"] == 2.0
    assert f'batch_infer_energy_watt_hours{{out="{out}"}} 2.0' in (tmp_path / "run.prom").read_text()


# Commands


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "t.csv", [["prompt", "seed"], ["a red circle", ""], ["", "1"], [" ", ""], ["x", "one"]])


def test_a_run_and_its_status_say_the_same(table: Path, out: Path) -> None:
    printed = run(table, out, "--price-per-hour", "3600").stdout.splitlines()
    assert printed[0].startswith("4 rows · ")
    assert f"invalid  {table}, line 3 (t-00000001): the prompt is empty (1 more like it)" in printed
    shown = command("status", out).stdout.splitlines()
    assert shown[0].startswith(f"{out}: finished, started 20")
    assert [line for line in shown[1:] if not line.startswith("speed")] == [
        line for line in printed if not line.startswith("speed")
    ]


def test_status_names_the_figures_of_the_run(table: Path, out: Path) -> None:
    run(table, out)
    status, summary = json.loads(command("status", out, "--json").stdout), run_json(out)["summary"]
    for name in ("truncated", "bad_rows", "reasons", "rendered", "seconds", "occupancy", "stage_shares", "deaths"):
        assert status[name] == summary[name]
    assert not {"rows", "ok", "bad_results", "cost", "gallery", "settings", "figures"} & status.keys()


def test_the_gallery_is_named_where_it_exists(table: Path, out: Path) -> None:
    run(table, out)
    (out / GALLERY).parent.mkdir()
    (out / GALLERY).touch()
    again = run(table, out, "--json")
    assert json.loads(again.stdout)["gallery"] == f"{out}/{GALLERY}"
    assert f"gallery  {out}/{GALLERY}" in run(table, out).stdout.splitlines()
    assert f"gallery  {out}/{GALLERY}" in command("status", out).stdout.splitlines()
    assert json.loads(command("status", out, "--json").stdout)["gallery"] == f"{out}/{GALLERY}"
    assert "gallery" not in run_json(out)["summary"]
    changed = run(table, out, "--steps", "3", "--rerender-changed").stdout
    assert f"gallery  {out}/{GALLERY} (without the new images; update it with `batch-infer gallery {out}`)" in changed


def test_status_shows_counts_if_somebody_edited_a_figure(table: Path, out: Path) -> None:
    run(table, out)
    record = run_json(out)
    record["summary"]["occupancy"] = "high"
    (out / "run.json").write_text(json.dumps(record))
    assert "3 invalid" in command("status", out).stdout
