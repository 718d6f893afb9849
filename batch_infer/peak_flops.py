"""Peak GPU throughput from datasheets, the denominator of model FLOPS utilisation (MFU)."""

from __future__ import annotations

PEAK_TFLOPS = (
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
"""Words in device names, and peak TFLOP/s of float16 and bfloat16 tensor cores without sparsity.

The first match is used. H100, H200 and B200 without a suffix are SXM modules.
"""
HALF_DTYPES = ("float16", "bfloat16")


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """Return a device's peak TFLOP/s for a dtype, or None if unknown.

    `device_name` comes from `torch.cuda.get_device_name`, such as `NVIDIA H100 80GB HBM3`.
    """
    if dtype not in HALF_DTYPES or " MIG " in f" {device_name} ":  # a MIG slice is only part of a GPU
        return None
    words = f" {device_name.replace('-', ' ')} "
    return next((tflops for name, tflops in PEAK_TFLOPS if f" {name} " in words), None)
