"""GPU housekeeping that torch leaves to its users: a memory limit, non-blocking copies, and kinds of errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from batch_infer.errors import first_line

MEMORY_FRACTION = 0.92
"""Share of a GPU's memory that torch's allocator may use.

cuDNN and cuBLAS allocate some memory outside of it. Without this limit they run out first, and torch then silently
chooses another algorithm, which changes the bytes of an image.
"""
COMFORTABLE_FRACTION = 0.85
"""Share of a GPU's memory at which a measured batch size may peak. The rest is for fragmentation."""
OUT_OF_MEMORY = (
    "out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",
)
"""Texts of the RuntimeErrors that CUDA, cuDNN, cuBLAS and Triton raise when device memory is exhausted.

The last text: cuDNN finds no engine when no algorithm's workspace fits.
"""
DEVICE_FAULTS = ("CUDA error", "CUDA driver error", "CUDNN_STATUS", "cuDNN error", "CUBLAS_STATUS", "Triton Error")


def limit_memory(device: torch.device) -> None:
    """Limit the GPU memory of this process, so that running out of it always raises torch.OutOfMemoryError."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(MEMORY_FRACTION)


def is_comfortable(device: torch.device) -> bool:
    """Return whether the peak since `torch.cuda.reset_peak_memory_stats` leaves enough memory; True on a CPU."""
    if device.type != "cuda":
        return True
    _, total = torch.cuda.mem_get_info()
    return torch.cuda.max_memory_allocated() <= COMFORTABLE_FRACTION * total


def set_float32_precision(dtype: torch.dtype) -> None:
    """Turn off TF32, torch's default for float32 convolutions in cuDNN, when the model is float32.

    In half precision it stays on: Stable Diffusion XL decodes in float32, from activations that are no more precise.
    """
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32


def copy_to(device: torch.device, values: torch.Tensor) -> torch.Tensor:
    """Copy a CPU tensor to a device without blocking the host: to a GPU through pinned memory."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


@contextmanager
def out_of_memory_errors() -> Iterator[None]:
    """Re-raise every report of exhausted device memory as torch.OutOfMemoryError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(first_line(error)) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error reports that device memory is exhausted."""
    return any(text in str(error) for text in OUT_OF_MEMORY)


def is_device_fault(error: BaseException) -> bool:
    """Return whether an error comes from the device or its libraries, not from the computation."""
    accelerator_error = getattr(torch, "AcceleratorError", ())  # since torch 2.8
    return isinstance(error, accelerator_error) or any(text in str(error) for text in DEVICE_FAULTS)
