"""A row of a table as requests, or as the invalid result that says what is wrong with it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any, TypeAlias

from batch_infer.errors import RowError, SettingsError
from batch_infer.records import PromptRequest, ResultRow, SamplingParams, SizeRules, Source, digest, utc_now
from batch_infer.settings import FIELDS, RowDefaults
from batch_infer.table.text import clean, encoding_fault

LARGEST_SEED = 2**63 - 1
MOST_STEPS = 1000
MOST_GUIDANCE = 100.0
MOST_IMAGES = 1000
LONGEST_TEXT = 10_000
"""Characters of a prompt, negative prompt or id.

A text encoder reads some 75 words, and splitting a megabyte into tokens holds up all other rows for seconds.
"""
NUMBERS = frozenset(FIELDS) - {"prompt", "id", "negative_prompt"}
MISSING = frozenset({"", "nan", "na", "n/a", "#n/a", "<na>", "null", "none", r"\n"})


@dataclass(frozen=True, slots=True)
class RowRules:
    """What a row's empty cells become, what its sizes may be, and the fingerprint of all that the run decides.

    `defaults` has no None left but in negative_prompt. `fixed` are fields that the model does not take, each with the
    value that it has for all rows.
    """

    defaults: RowDefaults
    sizes: SizeRules
    fingerprint: str
    embedded_guidance: bool = False
    fixed: tuple[tuple[str, Any], ...] = ()

    def check(self) -> None:
        """Hold the defaults to the rules that rows are held to. Raises SettingsError."""
        faults: list[str] = []
        parsed = _parse(Cells("", Source("", 0), {**asdict(self.defaults), "prompt": "any"}, {}), self, faults)
        if faults := faults or _too_long(parsed):
            raise SettingsError("; ".join(faults))


@dataclass(frozen=True, slots=True)
class Cells:
    """A row's own cells by field (None where empty), its carried ones, and where it stands.

    `id` is the row's own or the default one, and is the row's alone. `too_large` says which carried cells were left
    out because a row has no room for them. The last two are those of PromptRequest.
    """

    id: str
    source: Source
    fields: Mapping[str, Any]
    carried: Mapping[str, Any]
    too_large: str | None = None
    id_collides: bool = False
    stem_collides: bool = False


IsFinished: TypeAlias = "Callable[[PromptRequest], bool]"
"""Returns whether a request has its image already."""


def requests(
    cells: Cells, rules: RowRules, is_finished: IsFinished = lambda _: False
) -> Iterator[PromptRequest | ResultRow]:
    """One request for each image of a row, or its one invalid result.

    The limits of texts and carried cells are for rows that are to be rendered: earlier versions had none, so a row of
    which an image is finished is not invalid for them.
    """
    faults: list[str] = []
    parsed = _parse(cells, rules, faults)
    if faults:
        yield invalid(cells, "; ".join(faults))
        return
    limits = [*_too_long(parsed), *([cells.too_large] if cells.too_large else ())]
    if limits and not any(map(is_finished, _requests(cells, rules, dict(parsed)))):
        yield invalid(cells, "; ".join(limits))
    else:
        yield from _requests(cells, rules, parsed)


def _requests(cells: Cells, rules: RowRules, parsed: dict[str, Any]) -> Iterator[PromptRequest]:
    count, seed, prompt, negative_prompt = (
        parsed.pop(name) for name in ("num_images_per_prompt", "seed", "prompt", "negative_prompt")
    )
    params = SamplingParams(**parsed, embedded_guidance=rules.embedded_guidance)
    for k in range(count):
        yield PromptRequest(
            cells.id,
            k,
            prompt,
            negative_prompt,
            seed + k,
            params,
            cells.source,
            digest([rules.fingerprint, prompt, negative_prompt, seed + k, *parsed.values()]),
            cells.carried,
            id_collides=cells.id_collides,
            stem_collides=cells.stem_collides,
        )


def invalid(cells: Cells, error: str) -> ResultRow:
    """The result of a row that cannot be rendered."""
    prompt = cells.fields.get("prompt")
    fields = {name: value[:LONGEST_TEXT] if isinstance(value, str) else value for name, value in cells.fields.items()}
    return ResultRow(
        id=cells.id,
        image_index=0,
        prompt=None if prompt is None else clean(str(prompt)[:LONGEST_TEXT]),
        status="invalid",
        error=clean(error),
        finished_at=utc_now(),
        source_file=cells.source.file,
        source_row=cells.source.row,
        fingerprint=digest(["invalid", error, str(fields)]),
        carried={name: clean(value) if isinstance(value, str) else value for name, value in cells.carried.items()},
        line=cells.source.line,
    )


def _parse(cells: Cells, rules: RowRules, faults: list[str]) -> dict[str, Any]:
    """The row's values by field, row over default; what is wrong is added to `faults`."""
    for part in (cells.carried, cells.fields):
        for name, value in part.items():
            if value.__class__ is str and not value.isascii() and (fault := encoding_fault(value)):
                faults.append(f"column {name!r} {fault}")
    get = cells.fields.get
    if get("prompt") is None:
        faults.append("the prompt is empty")
    parsed: dict[str, Any] = {}
    for field, read in _READ.items():
        value = get(field)
        try:
            parsed[field] = getattr(rules.defaults, field, None) if value is None else read(field, value, rules)
        except RowError as error:
            faults.append(str(error))
    for field, value in rules.fixed:
        if field in parsed and parsed[field] != value:
            faults.append(f"{field} {_show(parsed[field])} is given, and this model takes none")
    if faults:
        return parsed
    if get("seed") is None:
        parsed["seed"] = derived_seed(rules.defaults.seed, cells.id)
    if parsed["seed"] + parsed["num_images_per_prompt"] - 1 > LARGEST_SEED:
        faults.append(f"seed {parsed['seed']} leaves no room for {parsed['num_images_per_prompt']} images (seed + k)")
    return parsed


def derived_seed(seed: int, row_id: str) -> int:
    """The seed, below 2^32, of a row that names none: stable, whatever stands around the row."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{row_id}".encode("utf-8", "surrogatepass")).digest()[:4], "big")


def is_empty(value: Any) -> bool:
    """Return whether a cell is empty: null, NaN, or an empty string of characters or bytes."""
    return value is None or value in ("", b"") or (isinstance(value, float) and math.isnan(value))


def own_cells(columns: Mapping[str, str], get: Callable[[str], Any]) -> dict[str, Any]:
    """A row's cells by field, None where they say nothing; `columns` has the column of each field."""
    own = {}
    for field, name in columns.items():
        value = get(name)
        if value is None or is_empty(value) or (value.__class__ is str and field in NUMBERS and _is_missing(value)):
            value = None
        own[field] = value
    return own


def _is_missing(text: str) -> bool:
    """Whether the text of a number is what databases, spreadsheets and pandas write for a missing one."""
    return not text[0].isdigit() and text.strip().lower() in MISSING


def _prompt(field: str, value: Any, rules: RowRules) -> str:
    text = _text(field, value, rules)
    if not text.strip():
        raise RowError("the prompt is empty")
    return text


def _text(field: str, value: Any, rules: RowRules) -> str:
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


def _too_long(parsed: Mapping[str, Any]) -> list[str]:
    """Say which texts of a row are longer than a row to be rendered may have."""
    return [
        f"the {field} has {len(text)} characters, and {LONGEST_TEXT} are the most: a model reads some 75 words"
        for field in ("prompt", "negative_prompt")
        if len(text := parsed[field] or "") > LONGEST_TEXT
    ]


def _whole(field: str, value: Any, least: int, most: int) -> int:
    if value.__class__ is str and value.isdecimal() and value.isascii() and len(value) < 20:
        number = int(value)  # as almost all cells are: ten times as fast
        if least <= number <= most:
            return number
    decimal = _decimal(value)
    # An exponent of millions is a short cell, an endless integer and no operand: compare, then convert.
    if decimal is None or (-(10**30) < decimal < 10**30 and decimal != decimal.to_integral_value()):
        raise RowError(f"{field} {_show(value)} is not a whole number")
    if not least <= decimal <= most:
        raise RowError(f"{field} {_show(value)} is not within {least} to {most}")
    return int(decimal)


def _side(field: str, value: Any, rules: RowRules) -> int:
    sizes = rules.sizes
    side = _whole(field, value, sizes.smallest, sizes.largest)
    if side % sizes.factor:
        raise RowError(f"{field} {side} is not a multiple of {sizes.factor}; the nearest is {_nearest(side, sizes)}")
    return side


def _nearest(side: int, sizes: SizeRules) -> int:
    return max(sizes.smallest, round(side / sizes.factor) * sizes.factor)


def _real(field: str, value: Any, most: float) -> float:
    number = _decimal(value)
    if number is None:
        raise RowError(f"{field} {_show(value)} is not a number")
    if not 0 <= number <= Decimal(most):
        raise RowError(f"{field} {_show(value)} is not within 0 to {most:g}")
    return float(number)


def _decimal(value: Any) -> Decimal | None:
    """A cell as a finite number, or None; a boolean is not one."""
    if isinstance(value, str):
        return _common_decimal(value) if len(value) < 20 else _to_decimal(value.strip())
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return None
    return _to_decimal(value)


@lru_cache(maxsize=4096)
def _common_decimal(text: str) -> Decimal | None:
    """A short text's number, remembered: a table has few that differ."""
    return _to_decimal(text.strip())


def _to_decimal(value: str | int | float | Decimal) -> Decimal | None:
    try:
        number = Decimal(value)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _show(value: Any) -> str:
    text = clean(str(value))
    return repr(text if len(text) <= 40 else text[:37] + "...")


_READ: Mapping[str, Callable[[str, Any, RowRules], Any]] = {
    "prompt": _prompt,
    "negative_prompt": _text,
    "seed": lambda field, value, rules: _whole(field, value, 0, LARGEST_SEED),
    "num_images_per_prompt": lambda field, value, rules: _whole(field, value, 1, MOST_IMAGES),
    "height": _side,
    "width": _side,
    "num_inference_steps": lambda field, value, rules: _whole(field, value, 1, MOST_STEPS),
    "guidance_scale": lambda field, value, rules: _real(field, value, MOST_GUIDANCE),
    "guidance_rescale": lambda field, value, rules: _real(field, value, 1.0),
}
"""How a field is read, in the order in which faults are told and fingerprints are made."""
