"""Read the code blocks of the README and the pages in docs/."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
LANGUAGES = ("sh", "python", "json", "toml", "yaml", "csv", "dockerfile", "text")
"""Languages of code blocks. `text` is for output and for formats without a parser."""
_BLOCK = re.compile(
    r"^(?P<marker><!-- (?P<kind>parsed only|run by make promises): (?P<reason>.+?) -->\n)?"
    r"(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)\n *```$",
    re.MULTILINE | re.DOTALL,
)
_ENDS_OF_COMMANDS = {"|", "||", "&&", ";", ">", ">>", "2>", ")"}


@dataclass(frozen=True)
class Block:
    """A fenced code block. `kind` is that of the comment before it, which also gives the reason."""

    page: Path
    line: int
    language: str
    text: str
    kind: str | None
    reason: str | None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_parsed_only(self) -> bool:
        return self.kind == "parsed only"

    @property
    def is_slow(self) -> bool:
        return self.kind == "run by make promises"

    def commands(self) -> Iterator[list[str]]:
        """Yield the arguments of each `batch-infer` in a shell block."""
        # A here-document is data. A comment may contain an apostrophe, which shlex would not accept.
        text = re.sub(r"<<'EOF'\n.*?\nEOF$", "", self.text, flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")
        for line in text.split("\n"):
            if "batch-infer" not in line and "batch_infer" not in line:
                continue
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;>")
            lexer.whitespace_split, lexer.commenters = True, "#"
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word in _ENDS_OF_COMMANDS:
                    if words:
                        yield words[1:]
                    words = []
                elif words or word in ("batch-infer", "batch_infer"):
                    words.append(word)


def read_blocks(page: Path) -> list[Block]:
    """Return the blocks of a page, in order."""
    text = page.read_text("utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, match.start("language")) + 1,
            match["language"],
            textwrap.dedent(match["text"]),
            match["kind"],
            match["reason"],
        )
        for match in _BLOCK.finditer(text)
    ]


def outside_code(page: Path) -> str:
    """Return the text of a page without its code blocks."""
    return _BLOCK.sub("", page.read_text("utf-8"))
