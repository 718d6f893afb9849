"""Hooks of mkdocs: pages that are made from code or from files outside docs/, and links to such files.

Pages link to files of the repository by their relative path, such as `../examples/nightly/crontab`, so that links work
when the repository is browsed. In the site, a Markdown file in PAGES is a page, and any other linked file is copied.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # mkdocs loads this file by its path

from tools.docs_site.commands import command_reference  # noqa: E402

COMMANDS_PAGE = "commands.md"
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/azureml/README.md": "example-azureml.md",
    "examples/nightly/README.md": "example-nightly.md",
    "examples/demo_model/README.md": "example-demo-model.md",
    "tools/gpu_check/README.md": "gpu-check.md",
}
"""Pages of the site by the file of the repository that they show."""
COPIES = "repository"
"""Folder of the site for copies of other linked files."""
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
_CODE = re.compile(r"^(`{3,}).*?^\1|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_SOURCES = {page: source for source, page in PAGES.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and copies of the files to which pages link."""
    files.append(File.generated(config, COMMANDS_PAGE, content=command_reference()))
    for source, page in PAGES.items():
        if (ROOT / source).is_file():
            files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for page_file in files.documentation_pages():
        for path in linked_files(page_file.src_uri, page_file.content_string):
            if path.suffix != ".md" and files.get_file_from_path(f"{COPIES}/{path.as_posix()}") is None:
                copied = File.generated(config, f"{COPIES}/{path.as_posix()}", abs_src_path=str(ROOT / path))
                files.append(copied)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to files of the repository by links within the site."""
    page_uri = page.file.src_uri

    def replace(match: re.Match[str]) -> str:
        path = _resolve(page_uri, match[1])
        target = None if path is None else _in_site(path)
        return match[0] if target is None else f"{target}{match[2] or ''}"

    return _substitute(markdown, replace)


def linked_files(page: str, markdown: str) -> list[Path]:
    """Return the files outside docs/ to which a page links, relative to the repository."""
    paths: list[Path] = []

    def collect(match: re.Match[str]) -> str:
        path = _resolve(page, match[1])
        if path is not None and path.parts[0] != "docs" and (ROOT / path).is_file():
            paths.append(path)
        return match[0]

    _substitute(markdown, collect)
    return paths


def _resolve(page: str, link: str) -> Path | None:
    """Return the path of a link's target relative to the repository, with the README of a folder."""
    source = Path(_SOURCES.get(page, f"docs/{page}"))
    path = Path(os.path.normpath(source.parent / link))
    if (ROOT / path).is_dir():
        path /= "README.md"
    return None if path.parts[0] == ".." else path


def _in_site(path: Path) -> str | None:
    """Return the link to a file of the repository from a page, which is at the top of the site."""
    if path.parts[0] == "docs":
        return path.relative_to("docs").as_posix()
    return PAGES.get(path.as_posix()) or (f"{COPIES}/{path.as_posix()}" if path.suffix != ".md" else None)


def _substitute(markdown: str, replace: Callable[[re.Match[str]], str]) -> str:
    """Substitute the links of a page, except in code."""
    parts, position = [], 0
    for code in _CODE.finditer(markdown):
        parts += [_LINK.sub(replace, markdown[position : code.start()]), code[0]]
        position = code.end()
    return "".join([*parts, _LINK.sub(replace, markdown[position:])])
