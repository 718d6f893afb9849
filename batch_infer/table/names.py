"""Names of columns, and of fields of structs, that stand twice in one file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import pyarrow as pa

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


def distinct_fields(kind: pa.DataType, name: str, renamed: dict[str, str]) -> pa.DataType:
    """Return a type whose structs have fields of distinct names; renamed fields are added to `renamed`.

    `name` is that of the column. Python, pandas and SQL engines cannot read a struct with two fields of one name.
    """
    if pa.types.is_struct(kind):
        names, others = distinct_names([field.name for field in kind])
        renamed.update({f"{name}.{new}": f"{name}.{old}" for new, old in others.items()})
        types = [distinct_fields(field.type, f"{name}.{new}", renamed) for field, new in zip(kind, names, strict=True)]
        fields = zip(kind, names, types, strict=True)
        return pa.struct([field.with_name(new).with_type(inner) for field, new, inner in fields])
    if pa.types.is_map(kind):
        keys, items = (f.with_type(distinct_fields(f.type, name, renamed)) for f in (kind.key_field, kind.item_field))
        return pa.map_(keys, items, kind.keys_sorted)
    if not isinstance(kind, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
        return kind
    field = kind.value_field.with_type(distinct_fields(kind.value_type, name, renamed))
    if isinstance(kind, pa.FixedSizeListType):
        return pa.list_(field, kind.list_size)
    return pa.list_(field) if isinstance(kind, pa.ListType) else pa.large_list(field)


def refuse_doubled(file: str, fields: Collection[str], renamed: Mapping[str, str]) -> None:
    """Raise TableError where two columns have the name of one field: it is not known which one counts."""
    if twice := sorted(set(fields) & set(renamed.values())):
        raise TableError(f"{file} has two columns named {twice[0]!r}; rename one")


def doubled_sentence(file: str, renamed: Mapping[str, str]) -> str:
    """Say under which names the other columns of a name are carried."""
    pairs = [f"another {old!r} as {new!r}" for new, old in list(renamed.items())[:SHOWN]]
    more = f" and {len(renamed) - SHOWN:,} more" if len(renamed) > SHOWN else ""
    return f"{file} has columns of one name: carried are {', '.join(pairs)}{more}"
