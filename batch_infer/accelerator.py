"""Set torch's memory limit and float32 precision, copy tensors to devices, and recognise device errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from batch_infer.errors import first_line

MEMORY_FRACTION = 0.92
"""Maximum share of a GPU's memory for torch's allocator.

cuDNN and cuBLAS allocate memory outside this allocator. Without the limit, they may run out of memory first. torch then
silently chooses another algorithm, which changes image bytes.
"""
PEAK_FRACTION = 0.85
"""Maximum share of a GPU's memory that a measured batch size may use. The rest allows for fragmentation."""
OUT_OF_MEMORY = (
    "out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",
)
"""Texts in the RuntimeErrors of CUDA, cuDNN, cuBLAS and Triton when device memory is exhausted.

The last one means that the workspace of every cuDNN algorithm is too large.
"""
DEVICE_FAULTS = ("CUDA error", "CUDA driver error", "CUDNN_STATUS", "cuDNN error", "CUBLAS_STATUS", "Triton Error")


def limit_memory(device: torch.device) -> None:
    """Limit the share of the GPU's memory that torch may allocate in this process to MEMORY_FRACTION."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(MEMORY_FRACTION)


def has_memory_headroom(device: torch.device) -> bool:
    """Return whether peak memory since `reset_peak_memory_stats` is within PEAK_FRACTION. Always True on a CPU."""
    if device.type != "cuda":
        return True
    _, total = torch.cuda.mem_get_info()
    return torch.cuda.max_memory_allocated() <= PEAK_FRACTION * total


def set_float32_precision(dtype: torch.dtype) -> None:
    """Disable TF32, torch's default for float32 convolutions in cuDNN, if the model is float32.

    TF32 is enabled for half-precision models. Stable Diffusion XL then still decodes in float32, but from the output of
    a half-precision denoiser, which is no more precise than TF32.
    """
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32


def synchronize(device: torch.device) -> None:
    """Wait for all work on a GPU. For a CPU, do nothing: a CUDA call would allocate memory on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_to(device: torch.device, values: torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor on a device. A copy to a GPU uses pinned memory, and the host does not wait for it."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


@contextmanager
def out_of_memory_errors() -> Iterator[None]:
    """Re-raise a RuntimeError that contains one of the texts in OUT_OF_MEMORY as torch.OutOfMemoryError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        raise torch.OutOfMemoryError(first_line(error)) from error


def is_device_error(error: BaseException) -> bool:
    """Return whether the device, its memory or its libraries caused an error, rather than the computation itself."""
    if isinstance(error, (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))):
        return True  # torch before 2.8 has no AcceleratorError
    return any(text in str(error) for text in (*OUT_OF_MEMORY, *DEVICE_FAULTS))
