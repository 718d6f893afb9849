"""A row of a table as requests, or as the invalid result that says what is wrong with it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from batch_infer.errors import RowError, SettingsError
from batch_infer.records import PromptRequest, ResultRow, SamplingParams, SizeRules, Source, digest, now
from batch_infer.settings import RowDefaults
from batch_infer.table.text import clean, is_utf8

LARGEST_SEED = 2**63 - 1
MOST_STEPS = 1000
MOST_GUIDANCE = 100.0
MOST_IMAGES = 1000


@dataclass(frozen=True, slots=True)
class RowRules:
    """What a row's empty cells become, what its sizes may be, and the fingerprint of all that the run decides.

    `defaults` has no None left but in negative_prompt.
    """

    defaults: RowDefaults
    sizes: SizeRules
    fingerprint: str

    def check(self) -> None:
        """Hold the defaults to the rules that rows are held to. Raises SettingsError."""
        faults: list[str] = []
        _parse(Cells("", Source("", 0), {**asdict(self.defaults), "prompt": "any"}, {}), self, faults)
        if faults:
            raise SettingsError("; ".join(faults))


@dataclass(frozen=True, slots=True)
class Cells:
    """A row's own cells by field (None where empty), its carried ones, and where it stands.

    `id` is the row's own or the default one, and is the row's alone.
    """

    id: str
    source: Source
    fields: Mapping[str, Any]
    carried: Mapping[str, Any]


def requests(cells: Cells, rules: RowRules) -> Iterator[PromptRequest | ResultRow]:
    """One request for each image of a row, or its one invalid result."""
    faults: list[str] = []
    parsed = _parse(cells, rules, faults)
    if faults:
        yield invalid(cells, "; ".join(faults))
        return
    count, seed, prompt, negative_prompt = (
        parsed.pop(name) for name in ("num_images_per_prompt", "seed", "prompt", "negative_prompt")
    )
    params = SamplingParams(**parsed)
    for k in range(count):
        fingerprint = digest([rules.fingerprint, prompt, negative_prompt, seed + k, *parsed.values()])
        yield PromptRequest(
            cells.id, k, prompt, negative_prompt, seed + k, params, cells.source, fingerprint, cells.carried
        )


def invalid(cells: Cells, error: str) -> ResultRow:
    """The result of a row that cannot be rendered."""
    prompt = cells.fields.get("prompt")
    return ResultRow(
        id=cells.id,
        image_index=0,
        prompt=None if prompt is None else clean(str(prompt)),
        status="invalid",
        error=clean(error),
        finished_at=now(),
        source_file=cells.source.file,
        source_row=cells.source.row,
        fingerprint=digest(["invalid", error, str(dict(cells.fields))]),
        carried={name: clean(value) if isinstance(value, str) else value for name, value in cells.carried.items()},
    )


def _parse(cells: Cells, rules: RowRules, faults: list[str]) -> dict[str, Any]:
    """The row's values by field, row over default; what is wrong is added to `faults`."""
    defaults, sizes = rules.defaults, rules.sizes
    parsed: dict[str, Any] = {}

    def take(field: str, read: Any, *limits: Any, default: Any) -> None:
        value = cells.fields.get(field)
        try:
            parsed[field] = default if value is None else read(field, value, *limits)
        except RowError as error:
            faults.append(str(error))

    for name, value in {**cells.carried, **cells.fields}.items():
        if isinstance(value, str) and not is_utf8(value):
            faults.append(f"column {name!r} is not UTF-8: save the table as UTF-8")
    take("prompt", _prompt, default=None)
    if cells.fields.get("prompt") is None:
        faults.append("the prompt is empty")
    take("negative_prompt", _text, default=defaults.negative_prompt)
    take("seed", _whole, 0, LARGEST_SEED, default=derived_seed(defaults.seed, cells.id))
    take("num_images_per_prompt", _whole, 1, MOST_IMAGES, default=defaults.num_images_per_prompt)
    for side in ("height", "width"):
        take(side, _side, sizes, default=getattr(defaults, side))
    take("num_inference_steps", _whole, 1, MOST_STEPS, default=defaults.num_inference_steps)
    take("guidance_scale", _real, MOST_GUIDANCE, default=defaults.guidance_scale)
    take("guidance_rescale", _real, 1.0, default=defaults.guidance_rescale)
    if not faults and parsed["seed"] + parsed["num_images_per_prompt"] - 1 > LARGEST_SEED:
        faults.append(f"seed {parsed['seed']} leaves no room for {parsed['num_images_per_prompt']} images (seed + k)")
    return parsed


def derived_seed(seed: int, row_id: str) -> int:
    """The seed, below 2^32, of a row that names none: stable, whatever stands around the row."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{row_id}".encode("utf-8", "surrogatepass")).digest()[:4], "big")


def is_empty(value: Any) -> bool:
    """Whether a cell says nothing: null, NaN or an empty string."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _prompt(field: str, value: Any) -> str:
    text = _text(field, value)
    if not text.strip():
        raise RowError("the prompt is empty")
    return text


def _text(field: str, value: Any) -> str:
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


def _whole(field: str, value: Any, least: int, most: int) -> int:
    number = _decimal(value)
    # An exponent of millions is a short cell, an endless integer and no operand: compare, then convert.
    if number is None or (-(10**30) < number < 10**30 and number != number.to_integral_value()):
        raise RowError(f"{field} {_show(value)} is not a whole number")
    if not least <= number <= most:
        raise RowError(f"{field} {_show(value)} is not within {least} to {most}")
    return int(number)


def _side(field: str, value: Any, sizes: SizeRules) -> int:
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
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Decimal)):
        return None
    try:
        number = Decimal(value.strip() if isinstance(value, str) else value)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _show(value: Any) -> str:
    text = clean(str(value))
    return repr(text if len(text) <= 40 else text[:37] + "...")
