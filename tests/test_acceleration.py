"""Compilation, memory format and fused projections of networks, and GPU pacing of the host."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError, InvalidCxxCompiler, LoweringException

from batch_infer.chain import pacing
from batch_infer.errors import CompilationError
from batch_infer.models import acceleration
from batch_infer.models.acceleration import Compiled, is_compiled, optimize_networks
from batch_infer.stages import Stages
from tests.rendering import CPU, load_family, make_request, max_difference, render

ROWS = [make_request(str(k), f"{k} rings", steps=2 + k, guidance=1 + 3 * k, seed=k) for k in range(3)]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace only the compiler behind torch.compile, which takes minutes. Captured graphs run uncompiled."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda forward, **kwargs: compile_(forward, **{**kwargs, "options": None, "backend": "eager"})
    )


@pytest.mark.promises
@pytest.mark.usefixtures("traced")
def test_networks_are_one_graph_and_change_no_image(sd1_folder: Path) -> None:
    """There is one graph per shape, because a graph break is an error."""
    plain = render(load_family(sd1_folder), ROWS)
    model = load_family(sd1_folder)
    optimize_networks(model.networks, CPU, compiled=True)
    compiled = render(model, ROWS)
    assert is_compiled(model.networks)
    assert all(max_difference(compiled[row.id].pixels, plain[row.id].pixels) <= 1 for row in ROWS)


def test_a_compilation_error_names_the_option_that_avoids_it() -> None:
    """There is no fallback to uncompiled code, because its bytes differ and other workers would not fall back."""

    class GraphBreaker(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x + 1

    network = GraphBreaker()
    optimize_networks([network], CPU, compiled=True)
    assert is_compiled([network])
    for _ in range(2):
        with pytest.raises(CompilationError, match=r"torch.compile failed \(.*; --no-compile turns it off"):
            network(torch.zeros(1))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The path of a new folder for the compiler's cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(acceleration, "_cache", new_cache := acceleration.CompilerCache())
    yield tmp_path / "cache"
    new_cache.close()


def test_a_failed_compilation_is_repeated_with_an_empty_cache(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    class FileFault(BackendCompilerFailed):
        def __init__(self) -> None:
            RuntimeError.__init__(self, "OSError: a.so: file too short")

    folders = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        if len(folders) != 2:
            raise FileFault
        return x

    network = Compiled(lambda x: x)
    network._compiled = forward
    network(torch.zeros(1))
    assert folders[0] == str(cache) != folders[1]
    assert (
        f"file too short); compiling again with an empty cache, because files in {cache} may be damaged" in caplog.text
    )
    with pytest.raises(CompilationError, match="file too short.*--no-compile"):
        network(torch.zeros(1))
    assert folders[1:] == [folders[1]] * 2


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InvalidCxxCompiler(), "No working C.. compiler found"),
        (LoweringException(NotImplementedError("no kernel"), "aten.op", [], {}), "NotImplementedError: no kernel"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
    ],
)
def test_errors_that_damaged_files_do_not_cause_keep_the_cache(
    error: Exception, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        raise InductorError(error, None)

    network = Compiled(lambda x: x)
    network._compiled = forward
    with pytest.raises(CompilationError, match=message):
        network(torch.zeros(1))
    assert "empty cache" not in caplog.text


@pytest.mark.promises
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("suffix", ["so", "py"])
def test_truncated_cache_files_cause_no_error(suffix: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while it writes a file leaves it truncated."""
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.SiLU()).eval()
    outputs = []
    for name in ("whole", "truncated"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache / name))
        torch._dynamo.reset()
        torch._inductor.utils.clear_inductor_caches()
        with torch.inference_mode():
            outputs.append(Compiled(network.forward)(torch.ones(1, 4, 8, 8)))
        if name == "whole":
            shutil.copytree(cache / "whole", cache / "truncated")  # loaded files must not change
            files = list((cache / "truncated").rglob(f"*.{suffix}"))
            assert files
            for file in files:
                os.truncate(file, 100)
    assert torch.equal(*outputs)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] != str(cache / "truncated")


def test_out_of_memory_in_a_compiled_network_is_reported_as_such() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    network = Compiled(lambda x: x)
    network._compiled = forward
    with pytest.raises(torch.OutOfMemoryError):
        network(torch.zeros(1))


def test_networks_are_unchanged_on_a_cpu(sd1_folder: Path) -> None:
    model: Any = load_family(sd1_folder)
    before = [network.forward for network in model.networks]
    optimize_networks(model.networks, CPU, compiled=False)
    assert [network.forward for network in model.networks] == before
    assert not is_compiled(model.networks)


@pytest.mark.parametrize("name", ["sd1", "decidiffusion"])
def test_a_gpu_gets_channels_last_and_fused_projections(name: str, request: pytest.FixtureRequest) -> None:
    """No value of an image changes by more than 1 of 255. The test uses the CPU, which supports both."""
    folder = request.getfixturevalue(f"{name}_folder")
    plain = render(load_family(folder), ROWS)
    model: Any = load_family(folder)
    optimize_networks(model.networks, torch.device("cuda"), compiled=False)
    unet, decoder = model.networks
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    fused = [module.processor for module in unet.modules() if hasattr(module, "to_q")]
    assert {type(processor).__name__ for processor in fused} == {"FusedAttnProcessor2_0"}
    outputs = render(model, ROWS)
    assert all(max_difference(outputs[row.id].pixels, plain[row.id].pixels) <= 1 for row in ROWS)


def test_joint_attention_keeps_its_norms_on_a_gpu() -> None:
    """diffusers' fused joint attention omits the norms of Stable Diffusion 3.5."""
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8, qk_norm="rms_norm",
    ).eval()  # fmt: skip
    inputs = (torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16), torch.randn(2, 16), torch.tensor([3.0, 900.0]))
    with torch.inference_mode():
        plain = network(*inputs, return_dict=False)[0]
        optimize_networks([network], torch.device("cuda"), compiled=False)
        assert torch.allclose(network(*inputs, return_dict=False)[0], plain, atol=1e-5)


@pytest.mark.promises
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_the_real_compiler_gives_the_same_images_each_time(demo_folder: Path) -> None:
    plain = render(load_family(demo_folder), ROWS)
    outputs = []
    for _ in range(2):
        torch._dynamo.reset()
        model = load_family(demo_folder)
        optimize_networks(model.networks, CPU, compiled=True)
        outputs.append(render(model, ROWS))
        assert is_compiled(model.networks)
    for row in ROWS:
        assert max_difference(outputs[0][row.id].pixels, plain[row.id].pixels) <= 1
        assert np.array_equal(outputs[0][row.id].pixels, outputs[1][row.id].pixels)


class FakeEvent:
    """A CUDA event or stream. One second passes between any two events."""

    waits: list[FakeEvent] = []

    def __init__(self, **_: Any) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None:
        FakeEvent.waits.append(self)

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end in FakeEvent.waits, "reading the time of an event before it has happened makes the host wait"
        return 1000.0


def test_the_host_is_only_a_few_calls_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEvent.waits = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeEvent)
    stages = Stages()
    pacer = pacing.make_pacer(torch.device("cuda"), stages)
    for tick in range(1, 11):
        pacer.start()
        pacer.end()
        assert stages.denoise == max(0, tick - pacing.CALLS_AHEAD)
    pacer.finish()
    assert stages.denoise == 10
    assert stages.ended_at > stages.started_at
