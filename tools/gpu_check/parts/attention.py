"""Measure attention backends at the shapes of Stable Diffusion 1.5 (32 slots) and XL (16 slots)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.gpu_check.measure import rate, shortest_seconds

if TYPE_CHECKING:
    from tools.gpu_check.recorder import Recorder

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Shape(NamedTuple):
    """Batch size, heads, queries, keys, and features per head."""

    batch: int
    heads: int
    queries: int
    keys: int
    features: int


SHAPES = (
    Shape(32, 8, 4096, 4096, 40),
    Shape(32, 8, 1024, 1024, 80),
    Shape(32, 8, 256, 256, 160),
    Shape(32, 8, 64, 64, 160),
    Shape(32, 8, 4096, 77, 40),
    Shape(32, 8, 1024, 77, 80),
    Shape(16, 10, 4096, 4096, 64),
    Shape(16, 20, 1024, 1024, 64),
    Shape(16, 10, 4096, 77, 64),
    Shape(16, 20, 1024, 77, 64),
)


def run(recorder: Recorder) -> None:
    """Measure torch's default choice and each backend in float16."""
    device = torch.device(recorder.device)
    for shape in SHAPES:
        name = f"n{shape.batch} h{shape.heads} q{shape.queries} k{shape.keys} d{shape.features}"
        with recorder.section(name) as results, torch.inference_mode():
            tensors = make_tensors(shape, device)
            results["default"] = measure(shape, tensors)
            for backend_name, backend in BACKENDS.items():
                results[backend_name] = measure_backend(shape, tensors, backend)


def make_tensors(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make queries, keys and values like those of fused projections: views with heads in the third dimension."""
    width = shape.heads * shape.features
    queries = torch.randn(shape.batch, shape.queries, width, device=device, dtype=torch.float16)
    fused = torch.randn(shape.batch, shape.keys, 2 * width, device=device, dtype=torch.float16)
    keys, values = fused.chunk(2, -1)
    q, k, v = (
        tensor.view(*tensor.shape[:2], shape.heads, shape.features).transpose(1, 2)
        for tensor in (queries, keys, values)
    )
    return q, k, v


def measure(shape: Shape, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Time the attention and compare its first batch element with float32."""
    q, k, v = tensors
    flop = 4 * shape.batch * shape.heads * shape.queries * shape.keys * shape.features
    seconds = shortest_seconds(lambda: F.scaled_dot_product_attention(q, k, v), calls=3)
    result = F.scaled_dot_product_attention(q, k, v)[:1].float()
    with sdpa_kernel(SDPBackend.MATH):
        exact = F.scaled_dot_product_attention(q[:1].float(), k[:1].float(), v[:1].float())
    return {**rate(flop, seconds), "relative_error": float((result - exact).norm() / exact.norm())}


def measure_backend(
    shape: Shape, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], backend: SDPBackend
) -> dict[str, Any]:
    """Measure one backend, or record that it does not support the shape."""
    try:
        with sdpa_kernel(backend):
            return measure(shape, tensors)
    except RuntimeError as error:
        return {"unsupported": str(error).splitlines()[0][:160]}
