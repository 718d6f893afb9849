"""Append the prompts in a folder's files to a growing table: `append.py prompts.jsonl inbox`.

Each file NAME.txt in the folder has one prompt per line, and is moved to FOLDER/taken/ once its prompts are in the
table. Write it under another name and rename it when it is complete. A row's id is NAME and the line number, so that a
row keeps its id and image while the table grows. A file with an error stays where it is and is named on stderr; the
others are appended.

The table is replaced atomically. A crash before the files are moved does no harm, because a row whose id is in the
table is not appended again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(table: Path, inbox: Path) -> None:
    before = table.read_bytes() if table.exists() else b""
    known = {row["id"]: row["prompt"] for row in map(json.loads, before.splitlines())}
    new: list[dict[str, str]] = []
    read = []
    for file in sorted(inbox.glob("*.txt")):
        try:
            new += rows_of(file, known)
        except (OSError, ValueError) as error:
            print(f"{file} is not appended: {error}", file=sys.stderr)
        else:
            read.append(file)
    if new:
        replace(table, before + "".join(json.dumps(row) + "\n" for row in new).encode())
    taken = inbox / "taken"
    taken.mkdir(parents=True, exist_ok=True)
    for file in read:
        file.replace(taken / file.name)
    if not before and not new:
        sys.exit(f"{table} does not exist yet, and {inbox} has no prompts for it")


def rows_of(file: Path, known: dict[str, str]) -> list[dict[str, str]]:
    """Return the rows of a file that the table does not have. Raises ValueError if an id has another prompt there."""
    lines = enumerate(file.read_text("utf-8-sig").splitlines())
    rows = [{"id": f"{file.stem}-{number:06}", "prompt": line.strip()} for number, line in lines if line.strip()]
    if any(known.get(row["id"], row["prompt"]) != row["prompt"] for row in rows):
        raise ValueError("a file of this name with other prompts was appended before; give it a new name")
    return [row for row in rows if row["id"] not in known]


def replace(table: Path, content: bytes) -> None:
    """Replace a file atomically, so that a crash leaves the old or the new one."""
    temporary = table.with_name(f".{table.name}.new")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(table)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
