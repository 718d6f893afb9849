"""What the datasheets of GPUs promise: the ceiling that a run is held against."""

from __future__ import annotations

DENSE_TFLOPS = (
    ("B200", 2250.0),
    ("H200 NVL", 835.0),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A100", 312.0),
    ("A10", 125.0),
)
"""Part of the name that torch tells, and TFLOP/s of float16 and bfloat16 tensor cores without sparsity.

The more special name stands first. H100, H200 and B200 by themselves are the SXM modules.
"""
HALVES = ("float16", "bfloat16")


def dense_tflops(device_name: str, dtype: str) -> float | None:
    """What the datasheet of this device says for this dtype; None where that is not known here.

    `device_name` as `torch.cuda.get_device_name` tells it: `NVIDIA H100 80GB HBM3`.
    """
    if dtype not in HALVES or " MIG " in f" {device_name} ":  # a slice has only a part of what its card has
        return None
    words = f" {device_name.replace('-', ' ')} "
    return next((tflops for name, tflops in DENSE_TFLOPS if f" {name} " in words), None)
