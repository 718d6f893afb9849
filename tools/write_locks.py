"""Write requirements.lock with uv, and the locks of the Azure packages from the environments that make has set up."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAIN = "requirements.lock"
HEADER = """\
# Every package that the demo, the tests, the documentation and the tools use, for each supported version of Python.
# Written by `make lock`. The GPU packages that a build of torch needs are not in here: pip installs them with it.
"""
GPU_PACKAGE = re.compile(r"(nvidia-(?!ml-py)|cuda-|triton\b)")
"""Packages that only the CUDA builds of torch need."""
AZURE = "Packages that {} in addition to requirements.lock, or in another version."
AZURE_LOCKS = {
    "tools/azure-server.lock": (".venv/azure-server", AZURE.format("azureml-inference-server-http needs")),
    "tools/azure-sdk.lock": (".venv/azure-sdk", AZURE.format("azure-ai-ml and mlflow-skinny need")),
}


def write_main_lock(options: list[str]) -> None:
    """Resolve pyproject.toml, and keep the versions of the present lock unless `options` of uv say otherwise."""
    uv = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra", "dev"]
    universal = ["--universal", "--python-version", "3.10"]
    output = ["--annotation-style", "line", "--no-header", "--quiet", "--output-file", MAIN]
    subprocess.run([*uv, *universal, *output, *options], cwd=ROOT, check=True)
    lines = (ROOT / MAIN).read_text("utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not GPU_PACKAGE.match(line)]
    (ROOT / MAIN).write_text(HEADER + "".join(kept), encoding="utf-8")


def freeze(environment: Path) -> list[str]:
    """Return `name==version` of each package installed in an environment, except torch and this project."""
    base = {"base": str(environment), "platbase": str(environment)}
    folder = sysconfig.get_path("purelib", vars=base)
    pip = [str(environment / "bin" / "python"), "-m", "pip"]
    command = [*pip, "freeze", "--exclude-editable", "--path", folder]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if "==" in line and not line.startswith("torch==")]


if __name__ == "__main__":
    write_main_lock(sys.argv[1:])
    for name, (environment, contents) in AZURE_LOCKS.items():
        header = f"# {contents} Written by `make lock`."
        (ROOT / name).write_text("\n".join([header, *freeze(ROOT / environment), ""]), encoding="utf-8")
