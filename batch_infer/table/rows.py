"""A row of a table as requests, or as the invalid result that says what is wrong with it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from batch_infer.errors import RowError, SettingsError
from batch_infer.records import PromptRequest, ResultRow, SamplingParams, SizeRules, Source, digest, utc_now
from batch_infer.settings import FIELDS, RowDefaults
from batch_infer.table.base import clean, encoding_error, is_utf8, make_default_id
from batch_infer.table.fields import MAX_SEED, MAX_TEXT, PARSERS, id_text, read_fields, show_value

REQUEST_STEM = "request"
"""Takes the place of the file's name, also in ids, for rows that are in no file."""

EARLIER_WORDINGS = (
    (re.compile(r"duplicate id (.+)"), r"the id \1 stands twice"),
    (re.compile(r"it is not JSON: "), "it is no JSON: "),
    (re.compile(r"('.+'|\".+\") instead of (.+)"), r"\1 stands where \2 should"),
    (re.compile(r"('.+'|\".+\") after its end"), r"\1 stands after its end"),
)
"""Errors that earlier versions worded otherwise, and how."""

IsFinished: TypeAlias = "Callable[[PromptRequest], bool]"
"""Returns whether a request has its image already."""


@dataclass(frozen=True, slots=True)
class RowRules:
    """The values of empty cells, the sizes that a row may have, and the fingerprint of the run's settings.

    `defaults` has None for negative_prompt only. `fixed` are fields that the model does not take, each with its value
    for all rows.
    """

    defaults: RowDefaults
    sizes: SizeRules
    fingerprint: str
    embedded_guidance: bool = False
    fixed: tuple[tuple[str, Any], ...] = ()

    def check(self) -> None:
        """Raise SettingsError where the defaults break the rules for rows."""
        errors: list[str] = []
        row = RowCells("", Source("", 0), {**asdict(self.defaults), "prompt": "any"}, {})
        values = _parse(row, self, errors)
        if errors := errors or _check_lengths(values):
            raise SettingsError("; ".join(errors))


@dataclass(frozen=True, slots=True)
class RowCells:
    """The cells of a row: those of fields (None where empty) and the carried ones.

    `id` is the row's own or its default one, and unique. `too_large` says which carried cells were left out because
    they are too large together. The last two attributes are those of PromptRequest.
    """

    id: str
    source: Source
    fields: Mapping[str, Any]
    carried: Mapping[str, Any]
    too_large: str | None = None
    id_collides: bool = False
    stem_collides: bool = False


def parse_rows(
    rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], rules: RowRules
) -> Iterator[PromptRequest | ResultRow]:
    """Yield the requests or the invalid result of each row of a request to a server or of a data frame.

    `columns` has the column of each field with another name. A row without an id has its number as id. Ids need not be
    unique: they only decide derived seeds. Columns that are no fields are ignored.
    """
    named = {field: name for field in FIELDS if (name := columns.get(field, field))}
    for number, row in enumerate(rows):
        fields = read_fields(named, row.get)
        value = fields.pop("id", None)
        name = make_default_id(REQUEST_STEM, number) if value is None else id_text(value)
        cells = RowCells(name, Source(REQUEST_STEM, number), fields, {})
        broken = [field for field, cell in fields.items() if isinstance(cell, str) and not is_utf8(cell)]
        if broken:  # a table can be saved as UTF-8, a request cannot
            yield make_invalid(
                cells, f"the {broken[0]} holds a lone surrogate, which is half a character: send whole ones"
            )
        elif isinstance(value, (list, dict)):
            yield make_invalid(cells, f"the id is not text but {type(value).__name__}")
        else:
            yield from make_requests(cells, rules)


def make_requests(
    cells: RowCells, rules: RowRules, is_finished: IsFinished = lambda _: False
) -> Iterator[PromptRequest | ResultRow]:
    """Yield one request for each image of a row, or its one invalid result.

    The limits of texts and carried cells apply to rows that are still to be rendered: earlier versions had no limits,
    so a row with a finished image stays valid.
    """
    errors: list[str] = []
    values = _parse(cells, rules, errors)
    if errors:
        yield make_invalid(cells, "; ".join(errors))
        return
    too_large = [*_check_lengths(values), *([cells.too_large] if cells.too_large else ())]
    if too_large and not any(map(is_finished, _make_requests(cells, rules, dict(values)))):
        yield make_invalid(cells, "; ".join(too_large))
    else:
        yield from _make_requests(cells, rules, values)


def _make_requests(cells: RowCells, rules: RowRules, values: dict[str, Any]) -> Iterator[PromptRequest]:
    count, seed, prompt, negative_prompt = (
        values.pop(name) for name in ("num_images_per_prompt", "seed", "prompt", "negative_prompt")
    )
    params = SamplingParams(**values, embedded_guidance=rules.embedded_guidance)
    for k in range(count):
        yield PromptRequest(
            cells.id,
            k,
            prompt,
            negative_prompt,
            seed + k,
            params,
            cells.source,
            digest([rules.fingerprint, prompt, negative_prompt, seed + k, *values.values()]),
            cells.carried,
            id_collides=cells.id_collides,
            stem_collides=cells.stem_collides,
        )


def make_invalid(cells: RowCells, error: str) -> ResultRow:
    """Return the result of a row that cannot be rendered."""
    prompt = cells.fields.get("prompt")
    fields = {name: value[:MAX_TEXT] if isinstance(value, str) else value for name, value in cells.fields.items()}
    return ResultRow(
        id=cells.id,
        image_index=0,
        prompt=None if prompt is None else clean(str(prompt)[:MAX_TEXT]),
        status="invalid",
        error=clean(error),
        finished_at=utc_now(),
        source_file=cells.source.file,
        source_row=cells.source.row,
        fingerprint=digest(["invalid", _earlier_wording(error), str(fields)]),
        carried={name: clean(value) if isinstance(value, str) else value for name, value in cells.carried.items()},
        line=cells.source.line,
    )


def _earlier_wording(error: str) -> str:
    """Return an error in the words of earlier versions, which committed its digest as the fingerprint of the row."""
    for pattern, earlier in EARLIER_WORDINGS:
        error = pattern.sub(earlier, error)
    return error


def _parse(cells: RowCells, rules: RowRules, errors: list[str]) -> dict[str, Any]:
    """Return a row's values by field, with defaults for empty cells. Add what is wrong to `errors`."""
    for part in (cells.carried, cells.fields):
        for name, value in part.items():
            if value.__class__ is str and not value.isascii() and (error := encoding_error(value)):
                errors.append(f"column {name!r} {error}")
    if cells.fields.get("prompt") is None:
        errors.append("the prompt is empty")
    values: dict[str, Any] = {}
    for field, parse in PARSERS.items():
        value = cells.fields.get(field)
        try:
            values[field] = getattr(rules.defaults, field, None) if value is None else parse(field, value, rules.sizes)
        except RowError as caught:
            errors.append(str(caught))
    for field, value in rules.fixed:
        if field in values and values[field] != value:
            errors.append(f"{field} {show_value(values[field])} is given, and this model takes none")
    if errors:
        return values
    if cells.fields.get("seed") is None:
        values["seed"] = derive_seed(rules.defaults.seed, cells.id)
    if values["seed"] + values["num_images_per_prompt"] - 1 > MAX_SEED:
        errors.append(f"seed {values['seed']} leaves no room for {values['num_images_per_prompt']} images (seed + k)")
    return values


def derive_seed(seed: int, row_id: str) -> int:
    """Return the seed, below 2^32, of a row without its own. It does not depend on other rows."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{row_id}".encode("utf-8", "surrogatepass")).digest()[:4], "big")


def _check_lengths(values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the lengths of a row's texts."""
    return [
        f"the {field} has {len(text)} characters, and {MAX_TEXT} are the most: a model reads some 75 words"
        for field in ("prompt", "negative_prompt")
        if len(text := values[field] or "") > MAX_TEXT
    ]
