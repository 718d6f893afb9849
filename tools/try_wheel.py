"""Check the content of the built packages, and run the commands of the installed wheel. `make wheel` calls this."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import batch_infer

ROOT = Path(__file__).parent.parent
VERSION = batch_infer.__version__
SDIST_FILES = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}


def list_sources() -> set[str]:
    """Return the path of each file of the package that git tracks."""
    git = ["git", "ls-files", "batch_infer"]
    return set(subprocess.run(git, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines())


def find_missing(dist: Path) -> list[str]:
    """Return the files that are missing in the wheel or the source distribution of this version."""
    info = f"batch_infer-{VERSION}.dist-info"
    with zipfile.ZipFile(dist / f"batch_infer-{VERSION}-py3-none-any.whl") as wheel:
        in_wheel = set(wheel.namelist())
    with tarfile.open(dist / f"batch_infer-{VERSION}.tar.gz") as sdist:
        in_sdist = {name.partition("/")[2] for name in sdist.getnames()}
    expected = list_sources() | {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"}
    missing = [f"wheel: {name}" for name in sorted(expected - in_wheel)]
    missing += [
        f"wheel should not contain {name}" for name in sorted(in_wheel) if name.startswith(("tests/", "tools/"))
    ]
    return missing + [f"sdist: {name}" for name in sorted((list_sources() | SDIST_FILES) - in_sdist)]


def try_commands(folder: Path, environment: Path) -> None:
    """Render a table with the commands of an environment, in a folder outside of the checkout."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(program: str, *arguments: str) -> str:
        command = [str(environment / "bin" / program), *arguments]
        print("+", program, *arguments, flush=True)
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=folder, env=variables).stdout

    location = Path(call("python", "-c", "import batch_infer; print(batch_infer.__file__)").strip())
    if not location.is_relative_to(environment):
        raise SystemExit(f"the environment imports batch_infer from {location}, not from the wheel")
    if call("batch-infer", "--version").split()[-1] != VERSION:
        raise SystemExit(f"batch-infer --version does not print {VERSION}")
    (folder / "prompts.csv").write_text("prompt,seed\na red square,1\na blue circle,2\n", encoding="utf-8")
    call("batch-infer", "run", "prompts.csv", "--steps", "2", "--out", "out", "--no-progress")
    call("batch-infer", "verify", "out")
    call("batch-infer", "completion", "bash")
    call("batch-infer", "gallery", "out")
    expected = ["results.parquet", "run.json", "gallery/index.html"]
    missing = [name for name in expected if not (folder / "out" / name).is_file()]
    if missing:
        raise SystemExit(f"out/ lacks {', '.join(missing)}")


if __name__ == "__main__":
    if problems := find_missing(Path(sys.argv[1])):
        raise SystemExit("\n".join(problems))
    with tempfile.TemporaryDirectory() as temporary:
        try_commands(Path(temporary), Path(sys.argv[2]).absolute())
    print(f"the wheel of batch-infer {VERSION} works")
