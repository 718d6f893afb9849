"""Test that all contenders of the benchmark render the same rows, and that figures follow from counts and times."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from batch_infer import peak_flops
from batch_infer.bench import (
    BenchSettings,
    WorkloadSettings,
    contenders,
    family_probe,
    parse_against,
    parse_steps,
    parse_sweep,
)
from batch_infer.bench.comparison import _choose_baselines, _estimate_seconds, measure_sweep
from batch_infer.bench.contenders import matmul_tflops
from batch_infer.bench.renderers import BatchInfer, PlainDiffusers
from batch_infer.bench.report import Sweep
from batch_infer.bench.settings import PIPELINE_ARCHITECTURES
from batch_infer.bench.subject import load_subject
from batch_infer.bench.workload import make_rows, make_workload, size_of
from batch_infer.chain import BatchSizes, StepLevelChain
from batch_infer.cli.bench import format_ratio
from batch_infer.energy import EnergyReading
from batch_infer.errors import SettingsError
from batch_infer.models import LatentDiffusion, architectures
from batch_infer.models.acceleration import decode_flops, denoise_flops
from batch_infer.planning import BatchingEstimator, order_requests
from batch_infer.records import PromptRequest, RowCost, SamplingParams, SizeRules
from batch_infer.settings import Compute, ComputeSettings, ModelSettings
from tests.fakes import Painter
from tests.pipelines import save_flux, save_sd3
from tests.rendering import load_family, make_request, max_difference, render
from tests.runs import CommandResult, command

ROWS = ("--rows", "9", "--steps", "1-3", "--slots", "4", "--threads", "1", "--device", "cpu")
SAMPLED = 4
RULES = SizeRules(native_height=512, native_width=512, side_multiple=8, min_side=64)
MIXED = WorkloadSettings()
DEFAULTS = SamplingParams(512, 512, 50, 7.5, 0.0)


@pytest.fixture(scope="module")
def quick() -> Any:
    """Shorten the measurements, because no test needs exact figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders, "TARGET_SECONDS", 0.01)
        patch.setattr(contenders, "MATMUL_SIDE", {"cpu": 256})
        patch.setattr("batch_infer.bench.comparison.SAMPLE_ROWS", SAMPLED)
        yield


@pytest.fixture(scope="module")
def plot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plot") / "slots.png"


@pytest.fixture(scope="module")
def report(quick: None, plot: Path) -> dict[str, Any]:
    """Return the report for a few rows of the built-in model."""
    done = command("bench", *ROWS, "--rounds", "2", "--sweep", "2,4", "--plot", plot, "--json")
    assert done.code == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.promises
def test_all_contenders_render_the_same_rows(report: dict[str, Any]) -> None:
    table, ours = report["table"], report["contenders"]["batch-infer"]
    assert list(report["contenders"]) == ["batch-infer", "grouped", "one-by-one", "bare"]
    assert table["rows"] == sum(size["images"] for size in table["sizes"]) == 9
    assert table["row_forwards"] == sum(size["row_forwards"] for size in table["sizes"]) == ours["row_forwards"]
    assert report["model"] == "built-in demo model"
    assert report["compute"]["threads"] == 1
    assert {"torch", "diffusers", "batch-infer"} <= report["versions"].keys()


@pytest.mark.promises
def test_occupancy_is_the_share_of_used_slots(report: dict[str, Any]) -> None:
    ours = report["contenders"]["batch-infer"]
    assert ours["occupancy"] == pytest.approx(ours["row_forwards"] / ours["slot_ticks"], abs=1e-4)
    assert ours["slot_ticks"] == 4 * ours["ticks"]
    assert sum(ours["stage_shares"].values()) == pytest.approx(1, abs=1e-3)
    assert ours["stage_shares"]["check"] == 0  # no image is checked, as with plain diffusers


@pytest.mark.promises
def test_rates_ratios_and_mfu_follow_from_seconds(report: dict[str, Any]) -> None:
    ours, table, peak = report["contenders"]["batch-infer"], report["table"], report["peak"]
    for name, figures in report["contenders"].items():
        seconds = statistics.median(figures["seconds"])
        assert len(figures["seconds"]) == report["rounds"] == 2
        assert figures["images_per_second"] * seconds == pytest.approx(table["rows"], rel=0.01)
        tflop = table["denoiser_tflop" if name == "bare" else "tflop"]
        assert figures["mfu"] == pytest.approx(tflop / seconds / peak["tflops"], rel=0.02)
        if name != "batch-infer":
            ratios = [theirs / own for theirs, own in zip(figures["seconds"], ours["seconds"], strict=True)]
            assert figures["ratio"] == pytest.approx(statistics.median(ratios), rel=0.01)
    assert ours["ratio"] is None
    assert peak["source"] == "measured matmul"


@pytest.mark.promises
def test_tflop_counts_the_denoiser_and_the_decoder(report: dict[str, Any]) -> None:
    sizes = report["table"]["sizes"]
    denoiser = sum(size["row_forwards"] * size["row_forward_tflop"] for size in sizes)
    decoder = sum(size["images"] * size["decode_tflop"] for size in sizes)
    assert report["table"]["denoiser_tflop"] == pytest.approx(denoiser)
    assert report["table"]["tflop"] == pytest.approx(denoiser + decoder)


@pytest.mark.promises
def test_one_by_one_is_timed_on_a_sample(report: dict[str, Any]) -> None:
    assert report["contenders"]["one-by-one"]["sampled_rows"] == SAMPLED
    assert report["contenders"]["grouped"]["sampled_rows"] is None


@pytest.mark.promises
def test_time_of_a_sample_is_extrapolated_by_denoiser_evaluations(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "seconds_of", lambda work, device: (work(), 2.0)[1])
    done = command("bench", *ROWS, "--sizes", "native", "--rounds", "1", "--against", "one-by-one", "--json")
    figures = json.loads(done.stdout)["contenders"]
    rows = make_rows(WorkloadSettings(9, (1, 3), "native"), [(64, 64)], DEFAULTS)
    evaluations = [row.params.slots * row.params.num_inference_steps for row in rows]
    assert figures["batch-infer"]["seconds"] == [2.0]
    (seconds,) = figures["one-by-one"]["seconds"]
    assert seconds == pytest.approx(2.0 * sum(evaluations) / sum(evaluations[k] for k in (0, 2, 4, 6)), abs=1e-4)


def test_energy_is_measured_and_extrapolated_like_the_time(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each contender that renders takes 1.8 Wh for the rows that it renders."""
    reading = SimpleNamespace(read=lambda: EnergyReading("GPU-a", 0, 6_480_000))
    monkeypatch.setattr(contenders, "EnergyMeter", lambda device: reading)
    lines = ("bench", *ROWS, "--sizes", "native", "--unguided", "0", "--rounds", "1", "--against", "one-by-one,bare")
    done = command(*lines, "--steps", "2", "--json")
    figures = json.loads(done.stdout)["contenders"]
    assert figures["batch-infer"]["energy_wh"] == 1.8
    assert figures["one-by-one"]["energy_wh"] == pytest.approx(1.8 * 9 / SAMPLED)
    assert "energy_wh" not in figures["bare"]
    printed = command(*lines, "--steps", "2").stdout
    assert "energy   per image: batch-infer 0.2 Wh, one-by-one 0.45 Wh\n" in printed


@pytest.mark.promises
def test_time_of_the_bare_denoiser_follows_from_its_rates(report: dict[str, Any]) -> None:
    figures = report["contenders"]["bare"]
    rates = figures["row_forwards_per_second"]
    seconds = sum(
        size["row_forwards"] / rates[f"{size['width']}x{size['height']}"] for size in report["table"]["sizes"]
    )
    assert figures["seconds"][-1] == pytest.approx(seconds, rel=0.01)


@pytest.mark.promises
def test_images_equal_those_of_plain_diffusers(report: dict[str, Any]) -> None:
    assert report["parity"] == {"rows": SAMPLED, "largest_difference": report["parity"]["largest_difference"],
                              "against": "grouped"}  # fmt: skip
    assert report["parity"]["largest_difference"] <= 1


@pytest.mark.promises
def test_different_images_are_reported(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison would be meaningless if a baseline rendered other images."""
    monkeypatch.setattr(family_probe, "make_generator", lambda row: torch.Generator().manual_seed(row.seed + 1))
    done = command("bench", *ROWS, "--rounds", "1", "--against", "grouped", "--json")
    assert json.loads(done.stdout)["parity"]["largest_difference"] > 20


@pytest.mark.promises
def test_sweep_has_a_point_for_each_number_of_slots(report: dict[str, Any]) -> None:
    points = report["sweep"]["points"]
    assert [point["slots"] for point in points] == [2, 4]
    assert report["sweep"]["out_of_memory_at"] is None
    for point in points:
        assert point["images_per_second"] > 0
        rates = point["row_forwards_per_second"]
        seconds = sum(
            size["row_forwards"] / rates[f"{size['width']}x{size['height']}"] for size in report["table"]["sizes"]
        )
        assert point["ceiling_images_per_second"] == pytest.approx(9 / seconds)


@pytest.mark.promises
def test_plot_is_an_image(report: dict[str, Any], plot: Path) -> None:
    with Image.open(plot) as image:
        assert image.format == "PNG"
        assert 1000 < image.width < 3000
        assert 600 < image.height < 2000
        assert np.asarray(image.convert("L")).std() > 5


@pytest.mark.promises
def test_report_as_text(quick: None) -> None:
    done = command("bench", *ROWS, "--rounds", "1", "--against", "bare", "--sizes", "native", "--unguided", "0", "-q")
    assert (done.code, done.stdout) == (0, "")
    done = command("bench", *ROWS, "--rounds", "1", "--against", "bare", "--sizes", "native", "--peak-tflops", "2")
    assert done.code == 0, done.stderr
    for words in (
        "built-in demo model",
        "9 rows of 1 to 3 steps",
        "64x64",
        "4 slots",
        "batch-infer is",
        "of 2 TFLOP/s (given",
    ):
        assert words in done.stdout
    assert "warming up" in done.stderr


@pytest.mark.promises
def test_stopped_benchmark_prints_the_figures_measured_so_far() -> None:
    line = [sys.executable, "-m", "batch_infer", "bench", *ROWS, "--rounds", "1000", "--against", "grouped,bare"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        second_round = next(text for text in lines if "round 2 of 1000" in text)
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert re.search(r"round 2 of 1000: batch-infer [0-9.]+ s; about [0-9:]+ left$", second_round.strip())
    assert process.returncode == 75
    assert re.search(r"^batch-infer +[0-9.]+ .*%$", stdout, re.MULTILINE)
    assert re.search(r"^grouped +[0-9.]+ .*(as fast|slower)", stdout, re.MULTILINE)
    assert stdout.endswith("stopped early: these are the figures measured so far\n")


def test_remaining_seconds_are_estimated_from_past_rounds() -> None:
    assert _estimate_seconds(["a", "b", "a"], {"a": 4.0}) == 12
    assert _estimate_seconds(["a", "b"], {"a": 4.0, "b": 1.0}) == 5
    assert _estimate_seconds([], {"a": 4.0}) == 0


@pytest.mark.parametrize(("ratio", "words"), [(2.426, "2.43x as fast"), (0.997, "1.00x as fast"), (0.86, "14% slower")])
def test_ratio_is_formatted_as_a_phrase(ratio: float, words: str) -> None:
    assert format_ratio(ratio) == words


REFUSED = {
    "an unknown architecture": (("--architecture", "sd9"), "sd9"),
    "an unknown baseline": (("--against", "grouped,tensorrt"), "--against tensorrt: the baselines are grouped"),
    "an architecture and a model": (("--architecture", "sd15", "--model", "x/y"), "exclude each other"),
    "a compiled baseline without compilation": (("--against", "grouped-compiled", "--no-compile"), "add --compile"),
    "an architecture with options of a checkpoint": (
        ("--architecture", "sd15", "--lora", "x.safetensors", "--revision", "main"),
        "--architecture has no checkpoint: leave out --revision and --lora",
    ),
    "a folder of LoRAs": (
        ("--lora-folder", "."),
        "--lora-folder serves rows that name a LoRA; those of bench name none: leave it out",
    ),
    "steps that are not a range": (("--steps", "9-3"), "--steps 9-3"),
    "a sweep of one slot": (("--sweep", "1,4"), "--sweep 1,4"),
    "a size that is not a multiple": (("--sizes", "64x60"), "60 is not a multiple of 8"),
    "a size too large": (("--sizes", "64x1024"), "1024 is not a multiple of 8 from 16 to 512"),
    "a size that is a word": (("--sizes", "large"), "--sizes large"),
    "steps that the scheduler refuses": (
        ("--scheduler", "PNDMScheduler:skip_prk_steps=false", "--steps", "2"),
        "choose other --steps",
    ),
    "a plot with another ending": (("--plot", "plot.jpg"), "--plot plot.jpg: the file must end"),
    "a plot without a folder": (("--plot", "nowhere/plot.png"), "there is no folder"),
}


@pytest.mark.parametrize(("options", "sentence"), REFUSED.values(), ids=list(REFUSED))
def test_invalid_options_are_refused_before_anything_is_rendered(options: tuple[str, ...], sentence: str) -> None:
    done = run_refused(*options)
    assert sentence in done.stderr
    assert "warming up" not in done.stderr


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "batch_infer.bench.plotting.find_spec", lambda name: None if name == "matplotlib" else real(name)
    )
    done = run_refused("--plot", str(tmp_path / "plot.png"))
    assert "pip install matplotlib" in done.stderr
    assert not list(tmp_path.iterdir())


def run_refused(*options: str) -> CommandResult:
    """Run the command, and check that it refuses its options."""
    done = command("bench", *ROWS, *options)
    assert (done.code, done.stdout) == (2, "")
    return done


@pytest.mark.parametrize(("text", "steps"), [("50", (50, 50)), ("20-50", (20, 50)), (" 1-1000 ", (1, 1000))])
def test_steps_are_a_number_or_a_range(text: str, steps: tuple[int, int]) -> None:
    assert parse_steps(text) == steps


def test_lists_are_sorted_and_without_duplicates() -> None:
    assert parse_sweep("16,4,8") == (4, 8, 16)
    assert parse_against("bare, grouped,bare") == ("bare", "grouped")
    for text in ("", "4,,8", "4;8", "4,x"):
        with pytest.raises(SettingsError):
            parse_sweep(text)


# Workload


def test_mixed_workload_is_mixed_and_always_the_same() -> None:
    sizes = MIXED.sizes_of(RULES)
    table = make_rows(MIXED, sizes, DEFAULTS)
    assert table == make_rows(MIXED, sizes, DEFAULTS)
    assert {row.params.num_inference_steps for row in make_rows(WorkloadSettings(2000), sizes, DEFAULTS)} == set(
        range(20, 51)
    )
    assert set(Counter(map(size_of, table))) == set(sizes)
    assert sum(not row.params.uses_guidance for row in table) == pytest.approx(len(table) / 5, rel=0.3)
    assert len({row.seed for row in table}) == len({row.id for row in table}) == len(table) == 200
    assert len({row.prompt for row in table}) > 60


def test_uniform_workload_has_one_kind_of_row() -> None:
    shape = WorkloadSettings(rows=20, steps=(50, 50), sizes="native", unguided=0)
    rows = make_rows(shape, shape.sizes_of(RULES), DEFAULTS)
    params = [row.params for row in rows]
    kinds = {(each.height, each.width, each.num_inference_steps, each.uses_guidance) for each in params}
    assert kinds == {(512, 512, 50, True)}


@pytest.mark.parametrize(
    ("rules", "sizes"),
    [
        (RULES, ((512, 512), (448, 640), (640, 448))),
        (SizeRules(1024, 1024, 8, 32), ((1024, 1024), (832, 1248), (1248, 832))),
        (SizeRules(64, 64, 8, 16), ((64, 64), (48, 80), (80, 48))),
    ],
)
def test_mixed_sizes_have_about_the_same_area(rules: SizeRules, sizes: tuple[tuple[int, int], ...]) -> None:
    assert MIXED.sizes_of(rules) == sizes
    assert WorkloadSettings(sizes="native").sizes_of(rules) == sizes[:1]


def test_sizes_are_written_width_first() -> None:
    assert WorkloadSettings(sizes="640x448, 512x512").sizes_of(RULES) == ((448, 640), (512, 512))


@pytest.mark.parametrize(("rows", "min_occupancy"), [(200, 0.90), (1_000, 0.95), (10_000, 0.98)])
def test_estimated_occupancy_of_mixed_workloads(rows: int, min_occupancy: float) -> None:
    """The occupancy is an estimate, which a test of the chain checks to within a row."""
    estimator = BatchingEstimator(slots_of)
    for request in mixed_requests(rows):
        estimator.add(request, RowCost(request.params.num_inference_steps, request.params.slots))
    estimator.close()
    evaluations = sum(cost.row_forwards for cost in estimator.costs.values())
    assert evaluations / sum(32 * cost.ticks for cost in estimator.costs.values()) > min_occupancy


def test_occupancy_of_a_mixed_workload_in_the_chain() -> None:
    chain, requests = StepLevelChain(Painter(), BatchSizes(32, 8), None), mixed_requests(200)
    assert sum(1 for _ in chain.render(replace(request, prompt="0.5") for request in requests)) == len(requests)
    assert chain.stages.occupancy > 0.90


def mixed_requests(rows: int) -> list[PromptRequest]:
    """Return the rows of the benchmark in the order of a run."""
    sizes = MIXED.sizes_of(SizeRules(64, 64, 8, 16))
    return list(order_requests(make_rows(WorkloadSettings(rows), sizes, DEFAULTS), slots_of))


def slots_of(size: tuple[int, int]) -> int:
    return 32


# Baselines


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3") / "sd3", with_t5=False)


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_subject(BenchSettings(compute=ComputeSettings(slots=4, threads=1), model=ModelSettings(device="cpu")))


def test_grouped_batches_rows_with_equal_parameters(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[PromptRequest]] = []
    baseline = PlainDiffusers(demo.model, demo.compute, grouped=True)

    def render(batch: list[PromptRequest]) -> np.ndarray:
        calls.append(batch)
        return np.zeros((len(batch), 1))

    monkeypatch.setattr(baseline, "_render", render)
    rows = [make_request(f"{k}", steps=2 + k % 2, guidance=[7.5, 1.0][k // 5], seed=k) for k in range(10)]
    assert sorted(row.id for row, _ in baseline.render(rows)) == [row.id for row in rows]
    assert sorted(map(len, calls)) == [1, 2, 2, 2, 3]  # 3 and 2 rows with guidance, at most 2 per call; 2 and 3 without
    for call in calls:
        assert len({(row.params, size_of(row)) for row in call}) == 1
        assert len(call) * call[0].params.slots <= 4


@pytest.mark.parametrize(
    "folder", ["sd1_folder", "sd2_folder", "decidiffusion_folder", "sdxl_folder", "lcm_folder", "sd3_folder"]
)
def test_baselines_of_every_family_make_the_same_images(folder: str, request: pytest.FixtureRequest) -> None:
    """The pipeline of DeciDiffusion gets our UNet, because diffusers has none."""
    model = load_family(request.getfixturevalue(folder))
    rescale = 0.0 if folder == "sd3_folder" else 0.7  # Stable Diffusion 3 does not support it
    rows = [make_request(f"{k}", steps=3, guidance=[7.5, 1.0][k % 2], rescale=rescale, seed=k) for k in range(4)]
    if folder == "lcm_folder":
        rows = [replace(row, params=replace(row.params, embedded_guidance=True)) for row in rows]
    ours = render(model, rows, slots=4)
    baseline = PlainDiffusers(model, Compute("cpu", "float32", 4, 2, 1), grouped=True)
    images = {row.id: pixels for row, pixels in baseline.render(rows)}
    assert images.keys() == ours.keys()
    for name, pixels in images.items():
        assert max_difference(pixels, ours[name].pixels) <= 1


def test_baselines_call_uncompiled_networks(demo: Any) -> None:
    """Uncompiled baselines do not call a replaced forward method, and restore it afterwards."""
    unet = demo.model.networks[0]
    calls: list[int] = []
    original = unet.forward

    def compiled_forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    unet.forward = compiled_forward
    try:
        for compiled, call_count in ((False, 0), (True, 2)):
            baseline = PlainDiffusers(demo.model, demo.compute, grouped=True, compiled=compiled)
            assert len(list(baseline.render([make_request(steps=2)]))) == 1
            assert len(calls) == call_count
            assert unet.forward is compiled_forward
    finally:
        del unet.forward


def test_compiled_baselines_pad_batches_to_one_size(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    baseline = PlainDiffusers(demo.model, demo.compute, grouped=True, compiled=True)

    def render(batch: list[PromptRequest]) -> np.ndarray:
        sizes.append(len(batch))
        return np.zeros((len(batch), 1))

    monkeypatch.setattr(baseline, "_render", render)
    rows = [make_request(f"{k}", steps=2 + k // 3) for k in range(5)]
    assert len(list(baseline.render(rows))) == 5
    assert sizes == [2, 2, 2]


def test_baselines_decode_singly_on_out_of_memory(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = PlainDiffusers(demo.model, demo.compute, grouped=True)
    vae, rows = demo.model.pipeline.vae, [make_request(f"{k}", steps=2, seed=k) for k in range(2)]
    batched = [pixels for _, pixels in baseline.render(rows)]
    original = vae._decode

    def decode_single(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(latents) > 1:
            raise torch.OutOfMemoryError("full")
        return original(latents, *args, **kwargs)

    monkeypatch.setattr(vae, "_decode", decode_single)
    sliced = [pixels for _, pixels in baseline.render(rows)]
    assert baseline.details() == {"vae_slicing": True}
    assert not vae.use_slicing  # the setting is restored
    assert all(max_difference(one, other) <= 1 for one, other in zip(batched, sliced, strict=True))


def test_sweep_ends_at_out_of_memory(demo: Any, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(model: Any, example: Any, size: Any, slots: int) -> float:
        if slots > 4:
            raise torch.OutOfMemoryError("full")
        return 100.0

    monkeypatch.setattr("batch_infer.bench.comparison.denoiser_rate", rate)
    sweep = Sweep()
    measure_sweep(sweep, [2, 8, 16], demo, make_workload(WorkloadSettings(2, (1, 1), "native"), demo))
    assert [point.slots for point in sweep.points] == [2]
    assert sweep.out_of_memory_at == 8


# Pipelines without a family

QUICK = ("--rows", "5", "--slots", "4", "--threads", "1", "--device", "cpu", "--sizes", "64x64", "--rounds", "1")
STEPS = {"flux-schnell": 4, "flux2-klein": 4, "qwen-image": 50, "z-image": 9, "sana": 20}


@pytest.fixture(scope="module")
def small_architectures() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        build = partial(architectures.build_architecture, small=True)
        patch.setattr("batch_infer.bench.subject.build_architecture", build)
        yield


@pytest.fixture(scope="module")
def sana(small_architectures: None) -> Any:
    settings = BenchSettings(
        architecture="sana",
        compute=ComputeSettings(slots=4, threads=1, compiled=False),
        model=ModelSettings(device="cpu"),
    )
    return load_subject(settings)


@pytest.mark.promises
@pytest.mark.parametrize("name", PIPELINE_ARCHITECTURES)
def test_pipelines_are_compared_with_their_own_calls(name: str, quick: None, small_architectures: None) -> None:
    steps = () if STEPS[name] < 10 else ("--steps", "2-3")
    done = command("bench", "--architecture", name, *QUICK, *steps, "--json")
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    table, ours = report["table"], report["contenders"]["batch-infer"]
    assert list(report["contenders"]) == ["batch-infer", "grouped", "one-by-one", "bare"]
    assert report["model"] == f"{name}, random weights"
    assert table["steps"] == ([2, 3] if steps else [STEPS[name]] * 2)
    assert table["row_forwards"] == ours["row_forwards"]
    assert ours["slot_ticks"] == 4 * ours["ticks"]  # all rows share calls of one shape
    assert table["denoiser_tflop"] > 0
    assert table["tflop"] > table["denoiser_tflop"]
    assert report["denoiser_parameters"] > 10_000
    assert report["parity"]["largest_difference"] <= 1


@pytest.mark.promises
def test_a_checkpoint_without_a_family_is_compared(quick: None, tmp_path: Path) -> None:
    folder = save_flux(tmp_path / "flux")
    done = command("bench", "--model", folder, *QUICK, "--steps", "2-3", "--sweep", "2,4", "--plot", tmp_path / "p.png")
    assert done.code == 0, done.stderr
    assert re.search(r"at most [01]/255 from those of diffusers \(grouped\)", done.stdout)
    assert "   2 slots: " in done.stdout
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.promises
def test_architectures_of_pipelines_and_their_default_steps(small_architectures: None) -> None:
    assert set(PIPELINE_ARCHITECTURES) == architectures.PIPELINES.keys()
    for name in ("flux2-klein", "z-image"):
        model, rules = architectures.build_architecture(name, torch.device("cpu"), torch.float32, small=True)
        assert model.uses_pipeline_call
        assert (rules.num_inference_steps, rules.guidance_scale) == (STEPS[name], 1.0 if name == "flux2-klein" else 0.0)


def test_few_step_models_take_their_default_steps() -> None:
    assert WorkloadSettings().steps_for(4) == (4, 4)
    assert WorkloadSettings().steps_for(50) == (20, 50)
    assert WorkloadSettings(steps=(1, 8)).steps_for(4) == (1, 8)
    rows = make_rows(WorkloadSettings(20), [(64, 64)], replace(DEFAULTS, num_inference_steps=9, guidance_scale=0.0))
    assert {(row.params.num_inference_steps, row.params.guidance_scale) for row in rows} == {(9, 0.0)}


def test_guidance_doubles_the_evaluations_of_a_pipeline_but_not_their_flop(sana: Any) -> None:
    guided, unguided = (make_request(steps=3, guidance=scale) for scale in (4.5, 1.0))
    assert sana.probe.count_evaluations(guided) == 2 * sana.probe.count_evaluations(unguided) == 6
    assert sana.probe.count_flops(guided) == sana.probe.count_flops(unguided)


def test_grouped_pipeline_calls_make_the_images_of_single_calls(sana: Any) -> None:
    rows = [make_request(f"{k}", prompt=text, steps=2, seed=k) for k, text in enumerate(("a cat", "two red stars"))]
    together = sana.probe.call_pipeline(rows)
    alone = [sana.probe.call_pipeline([row])[0] for row in rows]
    assert max_difference(together[0], together[1]) > 20
    assert all(max_difference(one, other) <= 1 for one, other in zip(together, alone, strict=True))


def test_a_full_batch_of_a_pipeline_fills_all_slots(sana: Any) -> None:
    for guidance, slots, elements in ((4.5, 5, 4), (1.0, 5, 5)):
        batch = sana.probe.fill_batch(make_request(steps=2, guidance=guidance), slots)
        shapes: list[tuple[int, ...]] = []
        hook = sana.probe.denoiser.patch_embed.register_forward_pre_hook(
            lambda _, inputs, shapes=shapes: shapes.append(tuple(inputs[0].shape))
        )
        with hook:
            batch.call()
        assert batch.elements == elements
        assert [shape[0] for shape in shapes] == [slots]


def test_prompts_are_encoded_again_in_every_round(sana: Any) -> None:
    """Otherwise, later rounds would be faster than a run."""
    calls: list[int] = []
    encoder = sana.model.pipeline.text_encoder
    hook = encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    ours, rows = BatchInfer(sana.model, sana.compute), [make_request(steps=2, guidance=1.0)]
    with hook:
        for _ in range(2):
            assert len(list(ours.render(rows))) == 1
    assert len(calls) == 2


def test_baselines_that_are_impossible_are_left_out(demo: Any) -> None:
    class Single:
        can_group = False

    settings = BenchSettings(against=("grouped", "bare", "grouped-compiled"))
    assert _choose_baselines(settings, SimpleNamespace(probe=Single())) == ["bare"]  # type: ignore[arg-type]
    assert _choose_baselines(settings, demo) == settings.against


# FLOPs and peak rates


@pytest.mark.promises
@pytest.mark.parametrize(
    ("name", "parameters", "latent", "row_forward", "decode"),
    [
        ("sd15", 859.5e6, (4, 64, 64), 0.803, 2.51),
        ("decidiffusion", 814.7e6, (4, 64, 64), 0.614, 2.51),
        ("sdxl", 2567.5e6, (4, 128, 128), 6.76, 10.47),
    ],
)
def test_architectures_have_the_size_of_released_models(
    name: str, parameters: float, latent: tuple[int, int, int], row_forward: float, decode: float
) -> None:
    """Compare parameters and TFLOP with published figures, without running a network."""
    model, rules = architectures.build_architecture(name, torch.device("meta"), torch.float16)
    unet = model.networks[0]
    assert sum(weight.numel() for weight in unet.parameters()) == pytest.approx(parameters, rel=1e-4)
    assert {weight.dtype for weight in unet.parameters()} == {torch.float16}
    assert isinstance(model, LatentDiffusion)
    assert model.latent_shape(rules.sizes.native_height, rules.sizes.native_width) == latent
    assert denoise_flops(model, latent) / 1e12 == pytest.approx(row_forward, rel=0.01)
    assert decode_flops(model, latent) / 1e12 == pytest.approx(decode, rel=0.01)
    assert torch.get_default_dtype() == torch.float32


def test_flops_equal_those_of_a_call(demo: Any) -> None:
    """Compare with torch's counter during a call, with attention as plain matrix products."""
    model = demo.model
    (conditioning,) = model.condition([make_request()])
    context = {name: part[None] for name, part in conditioning.context[0].items()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.denoise(torch.zeros(1, 4, 8, 12), torch.zeros(1), context)
    assert denoise_flops(model, (4, 8, 12)) == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "float16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA B200", "float16", 2250),
        ("NVIDIA A100-SXM4-80GB", "float16", 312),
        ("NVIDIA A10", "float16", 125),
        ("NVIDIA L4", "float16", 121),
        ("NVIDIA L40S", "float16", 362),
        ("NVIDIA L40S", "float32", None),
        ("NVIDIA A10G", "float16", None),
        ("NVIDIA GeForce RTX 4090", "float16", None),
    ],
)
def test_peak_flops_of_gpus_by_their_names_in_torch(name: str, dtype: str, tflops: float | None) -> None:
    assert peak_flops.peak_tflops(name, dtype) == tflops


def test_rate_of_a_matrix_product_is_measured() -> None:
    assert matmul_tflops(torch.device("cpu"), torch.float32) > 0.001
