"""The environment of the parts' processes, and a description of the machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "batch-infer"
LIBRARIES = ("torch", "triton", "diffusers", "transformers", "accelerate", "numpy")


def make_environment(scratch: Path) -> dict[str, str]:
    """Return the environment for subprocesses: this checkout first on the path, no network, caches in `scratch`."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if not is_installed(DISTRIBUTION):
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


def is_installed(distribution: str) -> bool:
    """Whether importlib.metadata knows a distribution."""
    return version_of(distribution) is not None


def version_of(distribution: str) -> str | None:
    """Return a distribution's version, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def write_metadata(folder: Path) -> Path:
    """Write the metadata of a distribution that is not installed: the package asks for its own version."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    version = match[1] if match else "0"
    target = folder / f"batch_infer-{version}.dist-info"
    target.mkdir(parents=True)
    lines = f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {version}\n"
    (target / "METADATA").write_text(lines, encoding="utf-8")
    return folder


def has_cuda() -> bool:
    """Whether torch can use a CUDA device."""
    import torch

    return torch.cuda.is_available()


def describe_machine(device: str) -> dict[str, str | None]:
    """Return the GPU's name, driver, memory and clocks as nvidia-smi reports them, and the versions of libraries."""
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
