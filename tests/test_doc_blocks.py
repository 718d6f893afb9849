"""Run the code blocks of the README and the documentation, in a folder with small tables and tiny models.

The blocks of a page run in order, in one folder. A comment before a block says why it is only parsed, or that only
`make promises` runs it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import batch_infer
from tests import fork_server
from tests.doc_pages import PAGES, ROOT, Block, read_blocks
from tests.object_servers import serve_objects
from tests.runs import command

OBJECT_STORES = ROOT / "docs" / "object-stores.md"
BLOCKS = [block for page in PAGES for block in read_blocks(page)]
RUNNABLE = [block for block in BLOCKS if block.language in ("sh", "python")]
PARSED_ONLY = 21
"""Number of shell and Python blocks that are only parsed. Run a new block instead of increasing it, if you can."""
SUBSTITUTIONS = (
    (r"stable-diffusion-v1-5/stable-diffusion-v1-5", "./my-checkpoint"),
    (r"--steps \d+", "--steps 2"),
    (r"--num-processes \d+", "--num-processes 0"),
    (r"--height 512 --width 512", "--height 256 --width 256"),
    # One of its rows is invalid.
    (r"^(batch-infer run examples/tour\.csv [^#\n]*[^#\s])", r"\1 || test $? -eq 3"),
)
"""Regular expressions, and what replaces their matches before a shell block is run."""
ENVIRONMENT = {
    "BATCH_INFER_STEPS": "2",
    "BATCH_INFER_SLOTS": "8",
    "BATCH_INFER_THREADS": "1",
    "BATCH_INFER_DEVICE": "cpu",
    "BATCH_INFER_NUM_PROCESSES": "0",
}
"""Options of the commands in blocks, which options in the blocks override."""
PREAMBLE = """set -e -o pipefail
pip() { :; }
make() { :; }
"""
"""Nothing is installed. `test_docs.py` checks the names of extras and targets."""
PROMPTS = ["a large red circle", "a small blue star", "a large yellow heart", "a large red cross"]


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    with fork_server.start() as folder:
        yield folder


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Path:
    """A folder with everything that blocks read, and a finished run in `out`."""
    folder = tmp_path_factory.mktemp("template")
    frame = pd.DataFrame({"prompt": PROMPTS})
    frame.to_csv(folder / "prompts.csv", index=False)
    frame.to_parquet(folder / "prompts.parquet")
    frame.rename(columns={"prompt": "caption"}).assign(avoid="blurred").to_csv(folder / "captions.csv", index=False)
    frame.assign(height=["tall", "", "", ""]).to_csv(folder / "prompts-with-errors.csv", index=False)
    for name in ("shards", "prompts", "more-prompts"):
        (folder / name).mkdir()
    frame.to_parquet(folder / "shards" / "0.parquet")
    frame.to_csv(folder / "prompts" / "a.csv", index=False)
    (folder / "more-prompts" / "b.txt").write_text("a large green ring\n")
    body = {"custom_id": "img-1", "body": {"prompt": "a red circle", "n": 2, "size": "64x64"}}
    (folder / "batch.jsonl").write_text(json.dumps(body))
    (folder / "job.toml").write_text("steps = 2\n")
    (folder / "ratings.csv").write_text("id,image_index,rating\nprompts-00000001,0,5\n")
    (folder / "marked.csv").write_text(
        "id,image_index,rating,mark,status,seed,height,width,num_inference_steps,guidance_scale,guidance_rescale,prompt\n"
        "prompts-00000001,0,5,1,ok,7,64,64,3,5,0,a red circle\n"
        "prompts-00000001,1,4,1,ok,8,64,64,3,5,0,a red circle\n"
    )
    for name in ("my-checkpoint", "sdxl"):
        (folder / name).symlink_to(demo_folder)
    (folder / "examples").symlink_to(ROOT / "examples")
    options = ("--steps", "2", "--slots", "8", "--threads", "1", "--device", "cpu", "--num-processes", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command("run", "prompts.csv", "-o", "out", *options).code == 0
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template, which is the working folder."""
    path = shutil.copytree(template, tmp_path / "page", symlinks=True)
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def quick_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the functions of Python render in this process, and keep its logging as it is."""
    original = batch_infer.run
    monkeypatch.setattr(
        batch_infer, "run", lambda *tables, **options: original(*tables, **{"num_processes": 0, **options, "steps": 2})
    )
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)


def run_page(page: Path, environment: Mapping[str, str]) -> None:
    """Run the blocks of a page in order, in the working folder."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in read_blocks(page):
        if block.language == "toml" and (match := re.match(r"# ([\w.-]+)\n", block.text)):
            Path(match[1]).write_text(block.text)
        elif block.is_parsed_only or (block.is_slow and "SLOW_BLOCKS" not in environment):
            continue
        elif block.language == "python":
            exec(compile(_substitute(block.text, environment), block.name, "exec"), namespace)
        elif block.language == "sh":
            run_shell(block, environment)


def _substitute(text: str, environment: Mapping[str, str]) -> str:
    for pattern, replacement in SUBSTITUTIONS:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text.replace("s3://my-bucket", environment.get("BUCKET", "s3://my-bucket"))


def run_shell(block: Block, environment: Mapping[str, str]) -> None:
    text = _substitute(block.text, environment)
    done = subprocess.run(["bash", "-c", PREAMBLE + text], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.name} exits with {done.returncode}\n{text}\n{done.stdout}{done.stderr}"


def make_environment(programs: Path) -> dict[str, str]:
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, **ENVIRONMENT, "PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(Path.cwd())}


def pages_with(condition: Callable[[Block], bool]) -> list[Any]:
    """Return parameters for the pages of which a block fulfils a condition."""
    pages = dict.fromkeys(block.page for block in RUNNABLE if not block.is_parsed_only and condition(block))
    return [pytest.param(page, id=page.stem) for page in pages]


@pytest.mark.usefixtures("folder", "quick_functions")
@pytest.mark.parametrize("page", pages_with(lambda block: block.page != OBJECT_STORES))
def test_blocks_run(page: Path, programs: Path) -> None:
    run_page(page, make_environment(programs))


@pytest.mark.promises
@pytest.mark.usefixtures("folder", "quick_functions")
@pytest.mark.parametrize("page", pages_with(lambda block: block.is_slow))
def test_slow_blocks_run(page: Path, programs: Path) -> None:
    run_page(page, {**make_environment(programs), "SLOW_BLOCKS": "1"})


@pytest.mark.usefixtures("quick_functions")
def test_blocks_with_an_object_store_run(folder: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_objects("s3", folder) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)  # for Python blocks
        run_page(OBJECT_STORES, {**make_environment(programs), "BUCKET": server.make_bucket().url})


def test_number_of_blocks_that_are_only_parsed() -> None:
    parsed = [f"{block.name}: {block.reason}" for block in RUNNABLE if block.is_parsed_only]
    print(f"{len(RUNNABLE) - len(parsed)} blocks are run, {len(parsed)} are only parsed:", *parsed, sep="\n")
    assert len(parsed) == PARSED_ONLY, "\n".join(parsed)
