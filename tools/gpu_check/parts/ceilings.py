"""Measure the ceilings of a device: matrix products, copies, and single layers of Stable Diffusion 1.5."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from tools.gpu_check.measure import rate, shortest_seconds

if TYPE_CHECKING:
    from tools.gpu_check.recorder import Recorder

CONVOLUTIONS = ((32, 320, 320, 64, 3), (32, 640, 640, 32, 3), (32, 1280, 1280, 16, 3), (32, 960, 320, 64, 3))
"""Batch size, input and output channels, side in pixels and kernel size of the UNet's convolutions at 32 slots."""
DECODER_CONVOLUTION = (8, 256, 256, 512, 3)
LINEARS = ((32 * 4096, 320, 2560), (32 * 1024, 640, 5120), (32 * 256, 1280, 10240), (32 * 4096, 320, 960))
"""Rows, input and output features."""


def run(recorder: Recorder) -> None:
    """Measure in half precision on a GPU, and in float32 at tiny sizes on a CPU."""
    device = torch.device(recorder.device)
    with recorder.section("ceilings") as results, torch.inference_mode():
        dtypes = (torch.float32,) if recorder.small else (torch.float16, torch.bfloat16)
        for dtype in dtypes:
            results[f"matmul {str(dtype).removeprefix('torch.')}"] = measure_matmul(device, dtype, recorder)
        results["copy"] = measure_copy(device, recorder)
    if recorder.small:
        return
    with recorder.section("layers") as results, torch.inference_mode():
        for shape in (*CONVOLUTIONS, DECODER_CONVOLUTION):
            results["conv n{} {}>{} {}x{}".format(*shape[:4], shape[3])] = measure_convolution(device, *shape)
        for rows, inputs, outputs in LINEARS:
            results[f"linear {rows}x{inputs}>{outputs}"] = measure_linear(device, rows, inputs, outputs)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            name = f"group norm n32 320 64x64 {str(memory_format).removeprefix('torch.')}"
            results[name] = measure_norm(device, memory_format)


def measure_matmul(device: torch.device, dtype: torch.dtype, recorder: Recorder) -> dict[str, float]:
    """Time a large square matrix product."""
    side, calls = (256, 2) if recorder.small else (8192, 20)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return rate(2 * side**3, shortest_seconds(lambda: left @ right, calls=calls))


def measure_copy(device: torch.device, recorder: Recorder) -> dict[str, float]:
    """Time a copy in memory. Its bytes count twice, as read and written."""
    source = torch.zeros(2**20 if recorder.small else 2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = shortest_seconds(lambda: target.copy_(source), calls=8)
    return {"ms": round(seconds * 1e3, 3), "tb_per_s": round(2 * source.numel() / seconds / 1e12, 3)}


def measure_convolution(
    device: torch.device, batch: int, inputs: int, outputs: int, side: int, kernel: int
) -> dict[str, float]:
    """Time a convolution in float16 with channels last."""
    layer = torch.nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, device=device, dtype=torch.float16)
    layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sample = torch.randn(batch, inputs, side, side, device=device, dtype=torch.float16)
    sample = sample.to(memory_format=torch.channels_last)
    flop = 2 * batch * outputs * side**2 * inputs * kernel**2
    return rate(flop, _seconds(lambda: layer(sample)))


def measure_linear(device: torch.device, rows: int, inputs: int, outputs: int) -> dict[str, float]:
    """Time a linear layer in float16."""
    layer = torch.nn.Linear(inputs, outputs, device=device, dtype=torch.float16)
    sample = torch.randn(rows, inputs, device=device, dtype=torch.float16)
    return rate(2 * rows * inputs * outputs, _seconds(lambda: layer(sample)))


def measure_norm(device: torch.device, memory_format: torch.memory_format) -> dict[str, float]:
    """Time a group norm in float16. TB/s count one read and one write."""
    layer = torch.nn.GroupNorm(32, 320, device=device, dtype=torch.float16)
    sample = torch.randn(32, 320, 64, 64, device=device, dtype=torch.float16).to(memory_format=memory_format)
    seconds = _seconds(lambda: layer(sample))
    return {"ms": round(seconds * 1e3, 3), "tb_per_s": round(4 * sample.numel() / seconds / 1e12, 3)}


def _seconds(work: Callable[[], object]) -> float:
    return shortest_seconds(work, calls=8)
