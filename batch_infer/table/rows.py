"""A row of a table as requests, or as the invalid result that says what is wrong with it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any, TypeAlias

from batch_infer.errors import RowError, SettingsError
from batch_infer.records import PromptRequest, ResultRow, SamplingParams, SizeRules, Source, digest, utc_now
from batch_infer.settings import FIELDS, RowDefaults
from batch_infer.table.base import clean, encoding_error, is_utf8, make_default_id

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_IMAGES = 1000
MAX_TEXT = 10_000
"""Characters of a prompt, negative prompt or id.

A text encoder reads some 75 words, and tokenizing a megabyte delays all other rows by seconds.
"""
NUMBERS = frozenset(FIELDS) - {"prompt", "id", "negative_prompt"}
MISSING = frozenset({"", "nan", "na", "n/a", "#n/a", "<na>", "null", "none", r"\n"})
"""What databases, spreadsheets and pandas write for a missing number."""
REQUEST_STEM = "request"
"""Takes the place of the file's name, also in ids, for rows that are in no file."""

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


def id_text(value: Any) -> str:
    """Return the id in a cell."""
    if isinstance(value, float) and value.is_integer():  # a column of integers is float where a cell was empty
        value = int(value)
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def read_fields(columns: Mapping[str, str], get: Callable[[str], Any]) -> dict[str, Any]:
    """Return a row's cells by field, None where they are empty. `columns` has the column of each field."""
    fields = {}
    for field, column in columns.items():
        value = get(column)
        if value is None or _is_empty(value) or (value.__class__ is str and field in NUMBERS and _is_missing(value)):
            value = None
        fields[field] = value
    return fields


def _is_empty(value: Any) -> bool:
    """Return whether a cell is null, NaN, or an empty string of characters or bytes."""
    return value is None or value in ("", b"") or (isinstance(value, float) and math.isnan(value))


def _is_missing(text: str) -> bool:
    return not text[0].isdigit() and text.strip().lower() in MISSING


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
        fingerprint=digest(["invalid", error, str(fields)]),
        carried={name: clean(value) if isinstance(value, str) else value for name, value in cells.carried.items()},
        line=cells.source.line,
    )


def _parse(cells: RowCells, rules: RowRules, errors: list[str]) -> dict[str, Any]:
    """Return a row's values by field, with defaults for empty cells. Add what is wrong to `errors`."""
    for part in (cells.carried, cells.fields):
        for name, value in part.items():
            if value.__class__ is str and not value.isascii() and (error := encoding_error(value)):
                errors.append(f"column {name!r} {error}")
    if cells.fields.get("prompt") is None:
        errors.append("the prompt is empty")
    values: dict[str, Any] = {}
    for field, parse in _PARSERS.items():
        value = cells.fields.get(field)
        try:
            values[field] = getattr(rules.defaults, field, None) if value is None else parse(field, value, rules)
        except RowError as caught:
            errors.append(str(caught))
    for field, value in rules.fixed:
        if field in values and values[field] != value:
            errors.append(f"{field} {_show(values[field])} is given, and this model takes none")
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


def _parse_prompt(field: str, value: Any, rules: RowRules) -> str:
    text = _parse_text(field, value, rules)
    if not text.strip():
        raise RowError("the prompt is empty")
    return text


def _parse_text(field: str, value: Any, rules: RowRules) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError(f"{field} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not isinstance(value, str):
        raise RowError(f"{field} {_show(value)} is not text but {type(value).__name__}")
    if "\0" in value:
        raise RowError(f"{field} holds a NUL byte")
    return value


def _check_lengths(values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the lengths of a row's texts."""
    return [
        f"the {field} has {len(text)} characters, and {MAX_TEXT} are the most: a model reads some 75 words"
        for field in ("prompt", "negative_prompt")
        if len(text := values[field] or "") > MAX_TEXT
    ]


def _parse_whole(field: str, value: Any, least: int, most: int) -> int:
    if value.__class__ is str and value.isdecimal() and value.isascii() and len(value) < 20:
        number = int(value)  # as almost all cells are: ten times as fast
        if least <= number <= most:
            return number
    decimal = _to_decimal(value)
    # A short cell with an exponent of millions is a huge integer: compare before converting.
    if decimal is None or (-(10**30) < decimal < 10**30 and decimal != decimal.to_integral_value()):
        raise RowError(f"{field} {_show(value)} is not a whole number")
    if not least <= decimal <= most:
        raise RowError(f"{field} {_show(value)} is not within {least} to {most}")
    return int(decimal)


def _parse_side(field: str, value: Any, rules: RowRules) -> int:
    sizes = rules.sizes
    side = _parse_whole(field, value, sizes.smallest, sizes.largest)
    if side % sizes.factor:
        nearest = max(sizes.smallest, round(side / sizes.factor) * sizes.factor)
        raise RowError(f"{field} {side} is not a multiple of {sizes.factor}; the nearest is {nearest}")
    return side


def _parse_real(field: str, value: Any, most: float) -> float:
    number = _to_decimal(value)
    if number is None:
        raise RowError(f"{field} {_show(value)} is not a number")
    if not 0 <= number <= Decimal(most):
        raise RowError(f"{field} {_show(value)} is not within 0 to {most:g}")
    return float(number)


def _to_decimal(value: Any) -> Decimal | None:
    """Return a cell as a finite number, or None. A boolean is no number."""
    if isinstance(value, str):
        return _cached_decimal(value) if len(value) < 20 else _finite_decimal(value.strip())
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return None
    return _finite_decimal(value)


@lru_cache(maxsize=4096)
def _cached_decimal(text: str) -> Decimal | None:
    """Return a short text's number. The cache helps because a table has few different numbers."""
    return _finite_decimal(text.strip())


def _finite_decimal(value: str | int | float | Decimal) -> Decimal | None:
    try:
        number = Decimal(value)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _show(value: Any) -> str:
    text = clean(str(value))
    return repr(text if len(text) <= 40 else text[:37] + "...")


_PARSERS: Mapping[str, Callable[[str, Any, RowRules], Any]] = {
    "prompt": _parse_prompt,
    "negative_prompt": _parse_text,
    "seed": lambda field, value, rules: _parse_whole(field, value, 0, MAX_SEED),
    "num_images_per_prompt": lambda field, value, rules: _parse_whole(field, value, 1, MAX_IMAGES),
    "height": _parse_side,
    "width": _parse_side,
    "num_inference_steps": lambda field, value, rules: _parse_whole(field, value, 1, MAX_STEPS),
    "guidance_scale": lambda field, value, rules: _parse_real(field, value, MAX_GUIDANCE),
    "guidance_rescale": lambda field, value, rules: _parse_real(field, value, 1.0),
}
"""The parser of each field. The order is that of messages and of fingerprints, so it must not change."""
