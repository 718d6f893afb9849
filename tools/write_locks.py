"""Write the lock files from the environments that make has set up."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAIN = "Every package that the demo, the tests and the tools use, except torch (see Makefile)."
AZURE = "Packages that {} in addition to requirements.lock, or in another version."
LOCKS = {
    "requirements.lock": (".venv", MAIN),
    "tools/azure-server.lock": (".venv/azure-server", AZURE.format("azureml-inference-server-http needs")),
    "tools/azure-sdk.lock": (".venv/azure-sdk", AZURE.format("azure-ai-ml and mlflow-skinny need")),
}


def freeze(environment: Path) -> list[str]:
    """Return `name==version` of each package installed in an environment, except torch and this project."""
    base = {"base": str(environment), "platbase": str(environment)}
    folder = sysconfig.get_path("purelib", vars=base)
    pip = [str(environment / "bin" / "python"), "-m", "pip"]
    command = [*pip, "freeze", "--exclude-editable", "--path", folder]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if "==" in line and not line.startswith("torch==")]


if __name__ == "__main__":
    for name, (environment, contents) in LOCKS.items():
        header = f"# {contents} Written by `make lock`."
        (ROOT / name).write_text("\n".join([header, *freeze(ROOT / environment), ""]), encoding="utf-8")
