"""GPU housekeeping that torch leaves to its users: a memory limit, non-blocking copies, and kinds of errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from batch_infer.errors import first_line

MEMORY_FRACTION = 0.92
"""Share of a GPU's memory that torch's allocator may take.

cuDNN and cuBLAS allocate some of their memory outside of it. Without this limit they are the first to run out, and
torch then picks another algorithm without a word, which changes the bytes of an image.
"""
COMFORTABLE_FRACTION = 0.85
"""Share of a GPU's memory that a measured batch size may peak at: the rest is room for fragmentation."""
OUT_OF_MEMORY = (
    "out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",
)
"""Texts of the RuntimeErrors that CUDA, cuDNN, cuBLAS and Triton raise when device memory is exhausted.

cuDNN finds no engine when no algorithm's workspace fits: the last text is that case.
"""
DEVICE_FAULTS = ("CUDA error", "CUDA driver error", "CUDNN_STATUS", "cuDNN error", "CUBLAS_STATUS", "Triton Error")


def limit_memory(device: torch.device) -> None:
    """Cap what this process takes of a GPU, so that running out of memory is always torch.OutOfMemoryError."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(MEMORY_FRACTION)


def is_comfortable(device: torch.device) -> bool:
    """Whether the peak since `torch.cuda.reset_peak_memory_stats` leaves room; always true on a CPU."""
    if device.type != "cuda":
        return True
    _, total = torch.cuda.mem_get_info()
    return torch.cuda.max_memory_allocated() <= COMFORTABLE_FRACTION * total


def set_float32_precision(dtype: torch.dtype) -> None:
    """Compute float32 convolutions in float32 when the model is float32, and not in TF32, torch's default for cuDNN.

    In half precision TF32 stays on: Stable Diffusion XL decodes in float32, with activations that are no more exact.
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
    """Whether a RuntimeError says that device memory is exhausted."""
    return any(text in str(error) for text in OUT_OF_MEMORY)


def is_device_fault(error: BaseException) -> bool:
    """Whether an error comes from the device or its libraries, and not from what was computed."""
    accelerator_error = getattr(torch, "AcceleratorError", ())  # since torch 2.8
    return isinstance(error, accelerator_error) or any(text in str(error) for text in DEVICE_FAULTS)
