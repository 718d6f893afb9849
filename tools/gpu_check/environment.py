"""Make the environment variables of the parts' processes, and describe the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from batch_infer import __version__

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "batch-infer"
LIBRARIES = ("torch", "triton", "diffusers", "transformers", "accelerate", "numpy")


def make_environment(scratch: Path) -> dict[str, str]:
    """Return environment variables for subprocesses: this checkout first, no network, caches in `scratch`."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if version_of(DISTRIBUTION) is None:
        paths.append(str(write_metadata(scratch / "metadata")))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "XDG_CACHE_HOME": str(scratch / "cache"),
    }


def version_of(distribution: str) -> str | None:
    """Return a distribution's version, or None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def write_metadata(folder: Path) -> Path:
    """Write the metadata of batch-infer, which reads its own version from there. Return the folder."""
    target = folder / f"batch_infer-{__version__}.dist-info"
    target.mkdir(parents=True)
    lines = f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {__version__}\n"
    (target / "METADATA").write_text(lines, encoding="utf-8")
    return folder


def has_cuda() -> bool:
    """Return whether torch can use a CUDA device."""
    import torch

    return torch.cuda.is_available()


def describe_machine(device: str) -> dict[str, str | None]:
    """Return the versions of libraries, and the GPU's name, driver, memory and clocks from nvidia-smi."""
    machine: dict[str, str | None] = {"python": platform.python_version(), "cpu_cores": str(os.cpu_count())}
    machine |= {name: version_of(name) for name in LIBRARIES}
    if device == "cuda":
        machine["gpu"] = _query_gpu()
    return machine


def _query_gpu() -> str:
    fields = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return done.stdout.strip() or f"unknown: {done.stderr.strip()[:200]}"
