"""Write the lock files with uv, for each supported version of Python."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAIN = """\
# Every package that the demo, the tests, the documentation and the tools use, for each supported version of Python.
# Written by `make lock`. The GPU packages that a build of torch needs are not in here: pip installs them with it.
"""
AZURE = """\
# What {} needs in addition to requirements.lock, or in another version.
# Written by `make lock`.
"""
AZURE_PACKAGES = {"server": ("azureml-inference-server-http>=1.5",), "sdk": ("azure-ai-ml>=1.30", "mlflow-skinny>=3.0")}
"""Packages that need other versions than the rest, by the environment that they are for."""
GPU_PACKAGE = re.compile(r"(nvidia-(?!ml-py)|cuda-|triton\b)")
"""Packages that only the CUDA builds of torch need."""


def resolve(requirements: list[str], preferred: list[str], options: list[str]) -> list[str]:
    """Return a line for each package that the requirements need. Versions in `preferred` stay if they can."""
    output = ROOT / "build" / "resolved.lock"
    output.parent.mkdir(exist_ok=True)
    output.write_text("".join(preferred), encoding="utf-8")
    uv = [sys.executable, "-m", "uv", "pip", "compile", *requirements, "--universal", "--python-version", "3.10"]
    formats = ["--annotation-style", "line", "--no-header", "--quiet", "--output-file", str(output)]
    subprocess.run([*uv, *formats, *options], cwd=ROOT, check=True)
    lines = output.read_text("utf-8").splitlines(keepends=True)
    return [line for line in lines if not GPU_PACKAGE.match(line)]


def read(lock: Path) -> list[str]:
    """Return the lines of a lock file without its header."""
    return [line for line in lock.read_text("utf-8").splitlines(keepends=True) if not line.startswith("#")]


def pin_of(line: str) -> str:
    """Return `name==version` of a line, without its marker and comment."""
    return re.split("[;#]", line)[0].strip()


def main(options: list[str]) -> None:
    """Write requirements.lock, and what the Azure packages need besides it. `options` are those of `uv pip compile`."""
    lock = ROOT / "requirements.lock"
    lines = resolve(["pyproject.toml", "--extra", "dev"], read(lock), options)
    lock.write_text(MAIN + "".join(lines), encoding="utf-8")
    for name, packages in AZURE_PACKAGES.items():
        azure_lock, requirements = ROOT / "tools" / f"azure-{name}.lock", ROOT / "build" / f"azure-{name}.in"
        requirements.write_text("\n".join(packages), encoding="utf-8")
        needed = resolve([str(requirements)], [*lines, *read(azure_lock)], options)
        others = [line.partition("#")[0].rstrip() for line in needed if pin_of(line) not in set(map(pin_of, lines))]
        azure_lock.write_text(AZURE.format(" and ".join(packages)) + "\n".join([*others, ""]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
