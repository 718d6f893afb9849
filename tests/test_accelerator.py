"""GPU behaviour, as far as it can be tested on a CPU: memory limits, errors, streams and shapes of calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from batch_infer import accelerator, peak_flops
from batch_infer.accelerator import out_of_memory_errors
from batch_infer.autotune import plateau
from batch_infer.bench.contenders import denoiser_rate
from batch_infer.bench.probe import make_probe
from batch_infer.chain import BatchSizes, RenderedImage, StepLevelChain, pacing
from batch_infer.chain.postprocessing import Postprocessing
from batch_infer.errors import CompilationError, RowError
from batch_infer.models.acceleration import Compiled, optimize_networks
from batch_infer.settings import Compute
from batch_infer.stages import Stages
from batch_infer.worker.loading import prepare_torch
from batch_infer.worker.worker import count_storing_threads
from tests.rendering import CPU, load_family, make_request

GPU = torch.device("cuda")
ON_CUDA = Compute("cuda", "float16", slots=32, decode_batch=8, threads=16, device_name="NVIDIA H200")
OUT_OF_MEMORY = (
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "GET was unable to find an engine to execute this computation",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
)


@pytest.fixture(autouse=True)
def restored_precision() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_every_report_of_exhausted_memory_is_one_error(text: str) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=text[:12]), out_of_memory_errors():
        raise RuntimeError(f"{text}\nand a stack of C++ frames")


def test_other_errors_are_not_changed() -> None:
    for error in (RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory"), KeyError("x")):
        with pytest.raises(type(error)) as exc_info, out_of_memory_errors():
            raise error
        assert exc_info.value is error


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_the_chain_halves_its_slots_after_every_such_error(text: str, sd1_folder: Path) -> None:
    model: Any = load_family(sd1_folder)
    denoise = model.denoise

    def limited(sample: torch.Tensor, *args: Any) -> torch.Tensor:
        if len(sample) > 4:
            raise RuntimeError(text)
        return denoise(sample, *args)  # type: ignore[no-any-return]

    model.denoise = limited
    chain = StepLevelChain(model, BatchSizes(16, 2), None)
    outcomes = list(chain.render([make_request(str(k), seed=k) for k in range(5)]))
    assert all(isinstance(outcome, RenderedImage) for outcome in outcomes)
    assert (len(outcomes), chain.batch_sizes.for_size((64, 64))[0]) == (5, 4)


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", False), ("float16", True), ("bfloat16", True)])
def test_a_worker_limits_its_memory_and_computes_float32_in_float32(
    dtype: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    assert prepare_torch(replace(ON_CUDA, dtype=dtype)) == (GPU, getattr(torch, dtype))
    assert limits == [accelerator.MEMORY_FRACTION]
    assert torch.backends.cudnn.allow_tf32 == allowed
    prepare_torch(replace(ON_CUDA, device="cpu"))
    assert len(limits) == 1


def test_batch_sizes_that_nearly_fill_the_memory_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here every doubling is faster, and 32 slots are the first whose peak exceeds the limit."""
    tried: list[int] = []

    def make(number: int) -> Callable[[], object]:
        tried.append(number)
        return lambda: None

    monkeypatch.setattr(plateau, "_measure_seconds", lambda *_: 1.0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1000))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 27 * tried[-1])
    assert plateau._search(plateau.SLOTS, make, GPU)[0] == 16
    assert tried == [2, 4, 8, 16, 32]
    assert plateau._search(plateau.SLOTS, make, CPU)[0] == 256


@pytest.mark.promises
def test_the_bare_unet_uses_the_compilation_of_the_chain(sd1_folder: Path) -> None:
    """A call with other strides, or with tensors created in another mode, would be compiled again."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model: Any = load_family(sd1_folder)
    model.denoiser.forward = torch.compile(model.denoiser.forward, backend=counter, dynamic=False, fullgraph=True)
    rows = [make_request(str(k), steps=2 + k, guidance=1 + 3 * k) for k in range(3)]
    assert len(list(StepLevelChain(model, BatchSizes(4, 2), None).render(rows))) == 3
    assert counter.frame_count == 1
    denoiser_rate(make_probe(model), rows[0], (64, 64), 4)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_stages_do_not_include_compilation(sd1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size is compiled once, by a call that advances no row."""
    calls: list[tuple[int, ...]] = []

    class Recording(Compiled):
        def __init__(self, forward: Callable[..., Any], threads: int | None = None) -> None:
            self._compiled = forward
            self._errors = ()  # type: ignore[assignment]

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(tuple(args[0].shape))
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr("batch_infer.models.acceleration.Compiled", Recording)
    model = load_family(sd1_folder)
    optimize_networks(model.networks[:1], CPU, compiled=True)
    monkeypatch.setattr("batch_infer.chain.step_level.is_compiled", lambda networks: True)
    chain = StepLevelChain(model, BatchSizes(4, 2), None)
    rows = [make_request("a", steps=3), make_request("b", steps=3, size=(72, 64)), make_request("c", steps=3)]
    started = time.perf_counter()
    assert all(isinstance(outcome, RenderedImage) for outcome in chain.render(rows))
    elapsed = time.perf_counter() - started
    assert chain.stages.ticks >= 9
    assert len(calls) == chain.stages.ticks + 2
    assert chain.stages.compilation > 0
    assert chain.stages.seconds + chain.stages.compilation <= elapsed


def test_a_size_is_not_compiled_while_it_renders_nothing(sd1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose step count the scheduler rejects uses no slot, so no network is called."""
    model = load_family(sd1_folder)
    table = model.solver.table

    def reject_two(steps: int) -> Any:
        if steps == 2:
            raise RowError("not two")
        return table(steps)

    monkeypatch.setattr(model.solver, "table", reject_two)
    monkeypatch.setattr("batch_infer.chain.step_level.is_compiled", lambda networks: True)
    chain = StepLevelChain(model, BatchSizes(4, 2), None)
    (rejected,) = chain.render([make_request("a", steps=2)])
    assert not isinstance(rejected, RenderedImage)
    assert chain.stages.compilation == 0
    (rendered,) = chain.render([make_request("b", steps=4)])
    assert isinstance(rendered, RenderedImage)
    assert chain.stages.compilation > 0


def test_no_more_processes_compile_than_a_worker_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    monkeypatch.setattr(inductor, "compile_threads", 32)
    Compiled(lambda x: x, threads=4)
    assert inductor.compile_threads == 4
    monkeypatch.setattr(inductor, "compile_threads", 32)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "32")
    Compiled(lambda x: x, threads=4)
    assert inductor.compile_threads == 32


@pytest.mark.parametrize(("shape", "ahead"), [((2, 1), 4), ((8, 8), 2), ((32, 8), 8), ((256, 16), 32)])
def test_all_rows_of_one_tick_fit_into_the_decoder_queue(shape: tuple[int, int], ahead: int) -> None:
    model: Any = type("Model", (), {"device": CPU})()
    assert Postprocessing(model, None, shape, Stages(), in_background=False).micro_batches_ahead == ahead


def test_streams_that_run_concurrently_with_the_unet_have_high_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: streams.append((device.type, priority)))
    pacing.stream_for.__wrapped__(GPU, "encode")
    assert streams == [("cuda", -1)]
    assert pacing.stream_for.__wrapped__(CPU, "encode") is None


def test_a_worker_on_a_gpu_stores_images_with_all_its_cores() -> None:
    assert count_storing_threads(ON_CUDA) == 16
    assert count_storing_threads(replace(ON_CUDA, threads=2)) == 4
    assert count_storing_threads(replace(ON_CUDA, threads=128)) == 32
    assert count_storing_threads(replace(ON_CUDA, device="cpu", threads=64)) == 4


def test_a_mig_slice_has_no_known_peak() -> None:
    assert peak_flops.peak_tflops("NVIDIA H100 80GB HBM3", "float16") == 989.4
    assert peak_flops.peak_tflops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "float16") is None


def test_an_error_of_the_compiler_is_a_settings_error() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    with pytest.raises(CompilationError, match="--no-compile turns it off"):
        Compiled(broken)(torch.zeros(1))
