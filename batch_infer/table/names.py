"""Column names that stand twice in one file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from batch_infer.errors import TableError

SHOWN = 5
"""Columns in one message."""


def distinct_names(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the names with `tag_2` for the second `tag`, and the old name of each that has another now."""
    taken, count = set(names), Counter[str]()
    distinct, renamed = [], {}
    for name in names:
        count[name] += 1
        if count[name] == 1:
            distinct.append(name)
            continue
        while (new := f"{name}_{count[name]}") in taken:
            count[name] += 1
        taken.add(new)
        renamed[new] = name
        distinct.append(new)
    return distinct, renamed


def refuse_doubled(file: str, fields: Collection[str], renamed: Mapping[str, str]) -> None:
    """Raise TableError where two columns have the name of one field: it is not known which one counts."""
    if twice := sorted(set(fields) & set(renamed.values())):
        raise TableError(f"{file} has two columns named {twice[0]!r}; rename one")


def doubled_sentence(file: str, renamed: Mapping[str, str]) -> str:
    """Say under which names the other columns of a name are carried."""
    pairs = [f"another {old!r} as {new!r}" for new, old in list(renamed.items())[:SHOWN]]
    more = f" and {len(renamed) - SHOWN:,} more" if len(renamed) > SHOWN else ""
    return f"{file} has columns of one name: carried are {', '.join(pairs)}{more}"
