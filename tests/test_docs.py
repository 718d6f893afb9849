"""Test that the README, the documentation and --help agree with the code, and that the documentation builds."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import click
import pytest
import yaml

from batch_infer.cli import commands
from batch_infer.cli.config import ENDPOINT_VARIABLES, LAUNCH_VARIABLES, variables_of
from batch_infer.cli.run import run
from batch_infer.manifest import SCHEMA
from batch_infer.settings import FIELDS
from batch_infer.table.formats import FORMATS
from tests.doc_pages import LANGUAGES, PAGES, ROOT, Block, outside_code, read_blocks
from tests.pyproject import project
from tests.runs import command
from tests.runs import results as read_results
from tools.docs_site.commands import command_reference
from tools.docs_site.hooks import COMMANDS_PAGE
from tools.docs_site.hooks import PAGES as REPOSITORY_PAGES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

README = (ROOT / "README.md").read_text("utf-8")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
MAX_README = 9_000
"""Characters of the README: a newcomer reads it in a few minutes."""
FILES = [
    "job.toml",
    "nightly.toml",
    "style.safetensors",
    "toy.safetensors",
    "key.pem",
    "pub.pem",
    "chain.pem",
    "ratings.csv",
    "marked.csv",
]
"""Files that options in shell blocks name."""
OTHER_OPTIONS = {"--build-arg", "--user", "--filename", "--time", "--signal"}
"""Options of Docker, kubectl and Slurm in the text."""
TEXT = "\n".join(page.read_text("utf-8") for page in PAGES)
BLOCKS = [block for page in PAGES for block in read_blocks(page)]
SHELL = [pytest.param(block, id=block.name) for block in BLOCKS if block.language == "sh"]
DATA = [pytest.param(block, id=block.name) for block in BLOCKS if block.language in ("json", "toml", "yaml", "csv")]


def test_the_readme_is_short_and_begins_with_a_command_and_a_picture() -> None:
    assert len(README) <= MAX_README
    first_screen = "\n".join(README.splitlines()[:15])
    assert "batch-infer run examples/tour.csv -o out" in first_screen
    assert "![" in first_screen
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).stat().st_size < 200_000


def test_the_readme_names_the_models() -> None:
    for model in ("Stable Diffusion", "SDXL", "SD 3", "FLUX", "DeciDiffusion"):
        assert model in README


def test_output_in_the_readme_is_that_of_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    done = command("run", "examples/tour.csv", "-o", "out", "--num-processes", "0", "--threads", "1", "--device", "cpu")
    (printed,) = (block.text for block in BLOCKS if block.page.name == "README.md" and block.language == "text")
    assert done.code == 3
    times = re.compile(r"^speed .*$", re.MULTILINE)
    assert times.sub("", done.stdout).strip() == times.sub("", printed)
    (shown,) = (block.text for block in BLOCKS if block.page.name == "README.md" and block.language == "json")
    row = read_results(tmp_path / "out")[3]
    assert {name: row[name] for name in json.loads(shown)} == json.loads(shown)


def test_every_block_has_a_language_and_every_comment_a_block() -> None:
    assert {block.language for block in BLOCKS} <= set(LANGUAGES)
    for page in PAGES:
        text = outside_code(page)
        assert "```" not in text, page
        assert "<!-- parsed only" not in text, page
        assert "<!-- run by" not in text, page
        assert not re.search(r"^\n {4}(batch-infer|pip|make|python) ", text, re.MULTILINE), f"{page}: use a fence"


@pytest.mark.parametrize("block", SHELL)
def test_shell_blocks_are_valid(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        Path(name).touch()
    Path("loras").mkdir()
    for name, *arguments in filter(None, block.commands()):
        if name[0].isalpha() and not {"-h", "--help"} & {*arguments}:
            with commands.commands[name].make_context(name, arguments):
                pass
    extras = set(project()["optional-dependencies"])
    for names in re.findall(r"pip install '(?:[\w-]+|\.)\[([\w,-]+)\]", block.text):
        assert set(names.split(",")) <= extras


@pytest.mark.parametrize("block", DATA)
def test_data_blocks_can_be_parsed(block: Block) -> None:
    parsers = {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}
    if block.language == "csv":
        assert len({len(row) for row in csv.reader(block.text.splitlines())}) == 1
    else:
        assert parsers[block.language](block.text)


@pytest.mark.parametrize("name", commands.commands)
def test_every_command_and_option_is_documented(name: str) -> None:
    assert any([name] == arguments[:1] for block in BLOCKS if block.language == "sh" for arguments in block.commands())
    (section,) = re.findall(rf"^## {name}$(.*?)(?=^## |\Z)", command_reference(), re.MULTILINE | re.DOTALL)
    for parameter in commands.commands[name].params:
        if isinstance(parameter, click.Option):
            assert re.search(rf"`[^`\n]*{re.escape(max(parameter.opts, key=len))}\b", section), parameter.name


@pytest.mark.parametrize("command", commands.commands.values(), ids=list(commands.commands))
def test_every_option_has_a_help_text(command: click.Command) -> None:
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help or isinstance(parameter.type, click.Choice), parameter.name


def test_every_environment_variable_is_documented() -> None:
    reference = command_reference()
    for variable in variables_of(commands):
        assert f"`{variable}`" in reference
    for variable in (*ENDPOINT_VARIABLES, *LAUNCH_VARIABLES):
        assert variable in TEXT
    known = {*variables_of(commands), *ENDPOINT_VARIABLES, *LAUNCH_VARIABLES}
    assert set(re.findall(r"BATCH_INFER_[A-Z0-9_]*[A-Z0-9]", TEXT)) <= known


def test_options_in_the_text_exist() -> None:
    parameters = [parameter for command in commands.commands.values() for parameter in command.params]
    options = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    text = "\n".join(map(outside_code, PAGES))
    other = re.compile(r"(?<![\w-])(--[a-z][a-z0-9_-]+)")
    foreign = set(re.findall(r"`(--[a-z_]+)`", (ROOT / "docs" / "formats.md").read_text("utf-8")))
    assert {name.rstrip("-") for name in other.findall(text)} - options - foreign - OTHER_OPTIONS - {"--help"} == set()


def test_every_table_format_is_documented() -> None:
    tables = (ROOT / "docs" / "tables.md").read_text("utf-8")
    for ending in FORMATS:
        assert f"`{ending}`" in tables
        assert re.search(rf"{re.escape(ending)}\b", run.help or "")


def test_every_column_is_documented() -> None:
    tables, results = ((ROOT / "docs" / name).read_text("utf-8") for name in ("tables.md", "results.md"))
    for column in FIELDS:
        assert f"`{column}`" in tables, column
    rows = [line for line in results.splitlines() if line.startswith("| `")]
    for column in SCHEMA.names:
        assert any(f"`{column}`" in line.split("|")[1] for line in rows), column


def test_exit_codes_are_documented() -> None:
    results = (ROOT / "docs" / "results.md").read_text("utf-8")
    for code in ("0", "2", "3", "75", "1"):
        assert f"| {code} |" in results
        assert re.search(rf"\b{code}\b", run.help or "")


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXT, re.MULTILINE)) <= targets
    assert {"demo", "test", "promises", "soak", "lint", "bench", "gpu-check"} <= targets
    assert {"demo", "test"} <= set(re.findall(r"`make ([a-z-]+)`", README))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_exist(page: Path) -> None:
    generated = {COMMANDS_PAGE, *REPOSITORY_PAGES.values()}
    for path in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", outside_code(page)):
        assert path in generated or (page.parent / path).exists(), path


def test_links_to_headings_of_the_readme_exist() -> None:
    for path, anchor in re.findall(r"\]\((docs/[^)#]+)#([^)]+)\)", README):
        assert anchor in headings(ROOT / path), anchor


@cache
def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", outside_code(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """mkdocs checks all links and anchors. The site must not load anything from other hosts."""
    line = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        html = page.read_text("utf-8")
        assert not re.search(r'<(?:script|img|link)\b[^>]*(?:src|href)="https?:(?!//[^"]*" rel="canonical)', html), page
    assert "BATCH_INFER_STEPS" in (tmp_path / "site" / "commands.html").read_text("utf-8")
