"""Convert a table row to requests, or to an invalid result with an error message."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from batch_infer.errors import RowError, SettingsError
from batch_infer.records import Lora, PromptRequest, ResultRow, SamplingParams, SizeRules, Source, digest, utc_now
from batch_infer.settings import FIELDS, LORA_FIELD, RowDefaults
from batch_infer.table.base import find_encoding_error, is_utf8, make_default_id, replace_surrogates
from batch_infer.table.fields import MAX_SEED, MAX_TEXT_LENGTH, PARSERS, format_id, format_value, read_fields

REQUEST_STEM = "request"
"""File name used in the sources and default ids of rows that do not come from a file."""

EARLIER_WORDINGS = (
    (re.compile(r"duplicate id (.+)"), r"the id \1 stands twice"),
    (re.compile(r"it is not JSON: "), "it is no JSON: "),
    (re.compile(r" cells, but the number of columns is (\d+)"), r" cells where columns names \1"),
    (
        re.compile(r" cells, but the header has (\d+); quote cells that contain "),
        r" cells where the header names \1; quote cells that hold ",
    ),
    (re.compile(r" has (\d+) (characters|columns); the maximum is (\d+)"), r" has \1 \2, and \3 are the most"),
    (re.compile(r" \(a model reads about 75 tokens\)"), ": a model reads some 75 words"),
    (re.compile(r": unknown file extension (.+); a table ends in "), r": unknown ending \1; a table ends in "),
    (
        re.compile(r" is not a supported table: a \.json file contains (.+), or one object with a prompt per line"),
        r" is no table: a .json holds \1, or one object with a prompt a line",
    ),
    (re.compile(r"('.+'|\".+\") instead of (.+)"), r"\1 stands where \2 should"),
    (re.compile(r"('.+'|\".+\") after its end"), r"\1 stands after its end"),
    (
        re.compile(r"the row's carried cells exceed (\d+) bytes in total: dropped "),
        r"the carried cells of a row may be \1 bytes together: left out ",
    ),
    (re.compile(r"the id must be text or a number, not a (\w+)"), r"the id is not text but \1"),
    (re.compile(r" is given, but this model does not support it"), " is given, and this model takes none"),
    (
        re.compile(r"seed (\d+) is too large for (\d+) images: image k uses seed \+ k, and the maximum is \d+"),
        r"seed \1 leaves no room for \2 images (seed + k)",
    ),
    (re.compile(r" contains (a NUL byte|a lone surrogate|no table)"), r" holds \1"),
    (re.compile(r"half a character: send whole characters"), "half a character: send whole ones"),
    (
        re.compile(r"has (no custom_id and body, unlike the first line|a body that is not a JSON object but \w+)"),
        "has no custom_id and body, as the first line has",
    ),
    (re.compile(r": the target of the link does not exist"), ": the link leads to no file"),
    (
        re.compile(
            r"has an unsupported column ('.*?'|\".*?\"): its name is not UTF-8, or the table already has (\d+) columns"
        ),
        r"has a column that the table cannot have, \1: it is not UTF-8, or there are \2 before it",
    ),
)
"""Patterns that match current error messages, each with the earlier wording.

An invalid row's fingerprint includes its error. It is computed from the earlier wording, so that it stays the same.
"""

FindLora: TypeAlias = "Callable[[str], Lora]"
"""Returns the LoRA that a cell names. Raises RowError."""
HasFinalResult: TypeAlias = "Callable[[PromptRequest], bool]"
"""Returns whether the manifest has a final result for a request."""


@dataclass(frozen=True, slots=True)
class RowRules:
    """Default values for empty cells, valid image sizes, and the fingerprint of the run's settings.

    In `defaults`, only `negative_prompt` may be None. `fixed` contains the fields that the model does not support, each
    with the only value that a row may have. With `embedded_guidance`, the guidance scale is an input of the model.
    """

    defaults: RowDefaults
    sizes: SizeRules
    fingerprint: str
    embedded_guidance: bool = False
    fixed: tuple[tuple[str, Any], ...] = ()

    def validate(self) -> None:
        """Raise SettingsError if the defaults violate the rules for rows."""
        errors: list[str] = []
        row = RowCells("", Source("", 0), {**asdict(self.defaults), "prompt": "any"}, {})
        values = _parse(row, self, errors)
        if errors := errors or _check_lengths(values):
            raise SettingsError("; ".join(errors))


@dataclass(frozen=True, slots=True)
class RowCells:
    """The cells of a row: those of fields (None if empty), and those carried to the results.

    `id` is unique among the rows of a run's tables, but may repeat in `parse_rows`. `too_large` is an error
    message if carried cells were dropped because of their size. `lora` is the row's LoRA, or an error. PromptRequest
    documents `id_collides` and `stem_collides`.
    """

    id: str
    source: Source
    fields: Mapping[str, Any]
    carried: Mapping[str, Any]
    too_large: str | None = None
    id_collides: bool = False
    stem_collides: bool = False
    lora: Lora | RowError | None = None


def parse_rows(
    rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], rules: RowRules, find_lora: FindLora | None = None
) -> Iterator[PromptRequest | ResultRow]:
    """For each row of a data frame or HTTP request, yield its prompt requests or one invalid result.

    `columns` maps a field to its column if their names differ, or to '' if the field has no column. Other columns are
    ignored. Ids need not be unique: they only determine the seeds of rows without a seed. Without `find_lora`, rows
    cannot name a LoRA.
    """
    field_columns = {field: name for field in FIELDS if (name := columns.get(field, field))}
    for number, row in enumerate(rows):
        fields = read_fields(field_columns, row.get)
        value = fields.pop("id", None)
        name = make_default_id(REQUEST_STEM, number) if value is None else format_id(value)
        lora = read_lora(row.get(columns.get(LORA_FIELD, LORA_FIELD)), find_lora)
        cells = RowCells(name, Source(REQUEST_STEM, number), fields, {}, lora=lora)
        not_utf8 = [field for field, cell in fields.items() if isinstance(cell, str) and not is_utf8(cell)]
        if not_utf8:  # there is no table to save as UTF-8, as `find_encoding_error` may advise
            yield make_invalid(
                cells, f"the {not_utf8[0]} contains a lone surrogate, which is half a character: send whole characters"
            )
        elif isinstance(value, (list, dict)):
            yield make_invalid(cells, f"the id must be text or a number, not a {type(value).__name__}")
        else:
            yield from make_requests(cells, rules)


def read_lora(cell: Any, find_lora: FindLora | None) -> Lora | RowError | None:
    """Return the LoRA that a cell names, an error, or None if the cell is empty or rows cannot name one."""
    value = read_fields({LORA_FIELD: LORA_FIELD}, {LORA_FIELD: cell}.get)[LORA_FIELD]
    if find_lora is None or value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if not isinstance(value, str):
            return RowError(f"lora {format_value(value)} is not text but {type(value).__name__}")
        return find_lora(value)
    except RowError as error:
        return error


def make_requests(
    cells: RowCells, rules: RowRules, has_final_result: HasFinalResult = lambda _: False
) -> Iterator[PromptRequest | ResultRow]:
    """Yield one request for each image of a row, or a single invalid result.

    A row that has a final result is valid even if its texts or carried cells are too large, because earlier versions
    had no size limits.
    """
    errors: list[str] = []
    values = _parse(cells, rules, errors)
    if errors:
        yield make_invalid(cells, "; ".join(errors))
        return
    too_large = [*_check_lengths(values), *filter(None, [cells.too_large])]
    if too_large and not any(map(has_final_result, _make_requests(cells, rules, dict(values)))):
        yield make_invalid(cells, "; ".join(too_large))
    else:
        yield from _make_requests(cells, rules, values)


def _make_requests(cells: RowCells, rules: RowRules, values: dict[str, Any]) -> Iterator[PromptRequest]:
    count, seed, prompt, negative_prompt = (
        values.pop(name) for name in ("num_images_per_prompt", "seed", "prompt", "negative_prompt")
    )
    params = SamplingParams(**values, embedded_guidance=rules.embedded_guidance)
    lora = cells.lora if isinstance(cells.lora, Lora) else None
    adapters = [] if lora is None else [[lora.fingerprint, lora.weight]]
    for image_index in range(count):
        image_seed = seed + image_index
        yield PromptRequest(
            id=cells.id,
            image_index=image_index,
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=image_seed,
            params=params,
            source=cells.source,
            fingerprint=digest([rules.fingerprint, prompt, negative_prompt, image_seed, *values.values(), *adapters]),
            carried=cells.carried,
            id_collides=cells.id_collides,
            stem_collides=cells.stem_collides,
            lora=lora,
        )


def make_invalid(cells: RowCells, error: str) -> ResultRow:
    """Return the invalid result for a row that cannot be rendered."""
    prompt = cells.fields.get("prompt")
    earlier_error = error
    for pattern, wording in EARLIER_WORDINGS:
        earlier_error = pattern.sub(wording, earlier_error)
    fields = {
        name: value[:MAX_TEXT_LENGTH] if isinstance(value, str) else value for name, value in cells.fields.items()
    }
    return ResultRow(
        id=cells.id,
        image_index=0,
        prompt=None if prompt is None else replace_surrogates(str(prompt)[:MAX_TEXT_LENGTH]),
        status="invalid",
        error=replace_surrogates(error),
        finished_at=utc_now(),
        source_file=cells.source.file,
        source_row=cells.source.row,
        fingerprint=digest(["invalid", earlier_error, str(fields)]),
        carried={
            name: replace_surrogates(value) if isinstance(value, str) else value
            for name, value in cells.carried.items()
        },
        line=cells.source.line,
    )


def _parse(cells: RowCells, rules: RowRules, errors: list[str]) -> dict[str, Any]:
    """Return the values of a row by field, with defaults for empty cells. Add error messages to `errors`."""
    for columns in (cells.carried, cells.fields):
        for name, value in columns.items():
            if value.__class__ is str and not value.isascii() and (error := find_encoding_error(value)):
                errors.append(f"column {name!r} {error}")
    if cells.fields.get("prompt") is None:
        errors.append("the prompt is empty")
    values: dict[str, Any] = {}
    for field, parse in PARSERS.items():
        value = cells.fields.get(field)
        try:
            values[field] = getattr(rules.defaults, field, None) if value is None else parse(field, value, rules.sizes)
        except RowError as exc:
            errors.append(str(exc))
    for field, value in rules.fixed:
        if field in values and values[field] != value:
            errors.append(f"{field} {format_value(values[field])} is given, but this model does not support it")
    if isinstance(cells.lora, RowError):
        errors.append(str(cells.lora))
    if errors:
        return values
    if cells.fields.get("seed") is None:
        values["seed"] = derive_seed(rules.defaults.seed, cells.id)
    if values["seed"] + values["num_images_per_prompt"] - 1 > MAX_SEED:
        errors.append(
            f"seed {values['seed']} is too large for {values['num_images_per_prompt']} images: "
            f"image k uses seed + k, and the maximum is {MAX_SEED}"
        )
    return values


def derive_seed(seed: int, row_id: str) -> int:
    """Return a seed below 2^32 for a row without a seed. It does not depend on other rows."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{row_id}".encode("utf-8", "surrogatepass")).digest()[:4], "big")


def _check_lengths(values: Mapping[str, Any]) -> list[str]:
    """Return error messages for texts of a row that are too long."""
    return [
        f"the {field} has {len(text)} characters; the maximum is {MAX_TEXT_LENGTH} (a model reads about 75 tokens)"
        for field in ("prompt", "negative_prompt")
        if len(text := values[field] or "") > MAX_TEXT_LENGTH
    ]
