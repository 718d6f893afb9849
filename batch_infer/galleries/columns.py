"""Choose how the page shows each column of the results, and convert its values to JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from batch_infer.carried import shorten_float32, to_text, to_values
from batch_infer.records import RESULT_COLUMNS

Kind: TypeAlias = Literal["category", "text", "integer", "number", "boolean", "time", "scores", "json"]
MAX_CATEGORIES = 200
"""Maximum number of distinct values of a category. A text column with more is searched instead."""
MAX_DETAIL_LENGTH = 20_000
"""Maximum number of characters of a text in the details."""
MAX_ROW_LENGTHS = {"prompt": 2_000, "negative_prompt": 2_000, "error": 300}
"""Maximum number of characters in the rows of texts that may be longer. The details have the whole text."""
MAX_CARRIED_LENGTH = 300
"""A carried column with a longer text is only in the details."""
MAX_SAFE_INTEGER = 2**53 - 1
"""JavaScript reads larger numbers inexactly, so they are written as text."""
MAX_SECONDS = 8_640_000_000_000
"""JavaScript's dates end this many seconds after 1970."""
RESERVED = frozenset({"_thumb", "_problem", "_image", "rating", "mark", "__proto__"})
"""Names that a column of a table must not have in the gallery. The last one has a meaning in scripts."""
_SCORE_PREFIX = "safety_scores."
"""Beginning of the names that the page gives to the safety scores."""
_TEXTS = frozenset({"id", "prompt", "error"})
_DETAILS = frozenset(
    {"generated_image", "sha256", "pixels_sha256", "image_bytes", "fingerprint", "prompt_tokens", "slots"}
)
_RESULTS = frozenset(column.name for column in RESULT_COLUMNS)
_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


def choose_names(names: Sequence[str]) -> list[str]:
    """Return the names of columns in the gallery, which differ from each other and from those that the page uses."""
    chosen: list[str] = []
    for name in names:
        renamed = name
        while renamed in RESERVED or renamed.startswith(_SCORE_PREFIX) or (renamed != name and renamed in names):
            renamed = f"input_{renamed}"
        chosen.append(renamed)
    return chosen


def choose_kind(field: pa.Field) -> Kind:
    """Return the kind of a column by its type. Text becomes a category later if it has few distinct values."""
    dtype = field.type
    if field.name == "safety_scores":
        return "scores"
    if types.is_boolean(dtype):
        return "boolean"
    if types.is_integer(dtype):
        return "integer"
    if types.is_floating(dtype):
        return "number"
    if types.is_timestamp(dtype):
        return "time"
    is_flat = types.is_string(dtype) or types.is_null(dtype) or types.is_decimal(dtype) or types.is_temporal(dtype)
    return "text" if is_flat else "json"


class Column:
    """A column of the results: its kind, and what all of its values have in common.

    First pass all values to `observe`, then convert them with `to_row_values` and `to_detail_values`.
    """

    def __init__(self, field: pa.Field, name: str) -> None:
        self.source = field.name
        """The name in the results. `name` is that in the gallery."""
        self.name = name
        self.is_carried = field.name not in _RESULTS
        self._kind = choose_kind(field)
        self._longest = 0
        self._low: Any = None
        self._high: Any = None
        self._codes: dict[str, int] | None = None
        """The code of each distinct value, in the order of occurrence, or None if there are too many."""
        if self._kind == "text" and self.name not in _TEXTS and self.name not in _DETAILS:
            self._codes = {}

    @property
    def kind(self) -> Kind:
        return "category" if self._codes is not None else self._kind

    @property
    def is_detail(self) -> bool:
        """Whether only the details have this column."""
        is_long = self.is_carried and self.kind == "text" and self._longest > MAX_CARRIED_LENGTH
        return self.name in _DETAILS or self.kind == "json" or is_long

    def describe(self) -> dict[str, Any]:
        """Return the entry of this column in meta.js."""
        entry: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "detail": self.is_detail,
            "carried": self.is_carried,
        }
        if self._codes is not None:
            entry["values"] = list(self._codes)
        if self.kind in ("integer", "number", "time"):
            entry |= {"min": self._low, "max": self._high}
        return entry

    def observe(self, values: pa.ChunkedArray) -> None:
        """Take the values of a batch into account."""
        if self._kind == "text":
            self._observe_texts(_to_texts(values))
        elif self._kind in ("integer", "number", "time"):
            numbers = [number for number in self._to_numbers(values) if number is not None]
            if numbers:
                self._low = min(numbers) if self._low is None else min(self._low, min(numbers))
                self._high = max(numbers) if self._high is None else max(self._high, max(numbers))

    def _observe_texts(self, texts: pa.ChunkedArray) -> None:
        self._longest = max(self._longest, pc.max(pc.utf8_length(texts)).as_py() or 0)
        if self._codes is None:
            return
        for value in pc.unique(texts).drop_null().to_pylist():
            self._codes.setdefault(value, len(self._codes))
        if len(self._codes) > MAX_CATEGORIES or self._longest > MAX_CARRIED_LENGTH:
            self._codes = None

    def to_row_values(self, values: pa.ChunkedArray) -> list[Any]:
        """Return the JSON values of a batch for rows-*.js."""
        match self.kind:
            case "category":
                codes = self._codes or {}
                return [None if text is None else codes[text] for text in _to_texts(values).to_pylist()]
            case "text":
                limit = MAX_ROW_LENGTHS.get(self.name)
                return [_cut(text, limit) for text in _to_texts(values).to_pylist()]
            case "integer" | "number" | "time":
                return [_to_exact(number) for number in self._to_numbers(values)]
            case "scores":
                return [_to_scores(scores) for scores in values.to_pylist()]
            case "json":
                return [_cut(text, MAX_DETAIL_LENGTH) for text in _to_json_texts(values)]
            case _:
                return list(values.to_pylist())

    def to_detail_values(self, values: pa.ChunkedArray) -> list[Any] | None:
        """Return the JSON values of a batch for details-*.js, or None if the details do not have the column.

        For a text that the rows have, a value is null unless the rows have only its beginning.
        """
        limit = MAX_ROW_LENGTHS.get(self.name)
        if self.kind == "text":
            texts = _to_texts(values).to_pylist()
            if self.is_detail:
                return [_cut(text, MAX_DETAIL_LENGTH) for text in texts]
            if limit is None or self._longest <= limit:
                return None
            return [_cut(text, MAX_DETAIL_LENGTH) if text and len(text) > limit else None for text in texts]
        return self.to_row_values(values) if self.is_detail else None

    def _to_numbers(self, values: pa.ChunkedArray) -> Iterator[Any]:
        """Yield numbers, with null instead of NaN and infinity, and times in seconds since 1970."""
        if self._kind == "integer":
            return iter(values.to_pylist())
        if self._kind == "time":
            scale = _UNITS[values.type.unit]
            return (_to_seconds(value, scale) for value in values.cast(pa.int64()).to_pylist())
        is_short = not types.is_float64(values.type)
        numbers = map(_to_finite, values.to_pylist())
        return (shorten_float32(value) for value in numbers) if is_short else numbers


def _to_texts(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the values of a column without nesting as text."""
    if types.is_string(values.type):
        return values
    texts = [None if value is None else to_text(value, values.type) for value in to_values(values)]
    return pa.chunked_array([pa.array(texts, pa.string())])


def _to_json_texts(values: pa.ChunkedArray) -> Iterator[str | None]:
    """Yield nested values as JSON text, and the length of bytes instead of the bytes."""
    for value in to_values(values):
        if isinstance(value, bytes):
            yield f"{len(value):,} bytes"
        else:
            yield None if value is None else to_text(value, values.type)


def _to_scores(scores: Any) -> dict[str, float | None] | None:
    """Return safety scores by category."""
    if scores is None:
        return None
    return {score["category"]: shorten_float32(_to_finite(score["score"])) for score in scores}


def _to_finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _to_seconds(value: int | None, scale: int) -> float | None:
    seconds = None if value is None else round(value / scale, 3)
    return None if seconds is None or abs(seconds) > MAX_SECONDS else seconds


def _to_exact(number: Any) -> Any:
    is_unsafe = isinstance(number, int) and abs(number) > MAX_SAFE_INTEGER
    return str(number) if is_unsafe else number


def _cut(text: str | None, limit: int | None) -> str | None:
    return text if text is None or limit is None or len(text) <= limit else f"{text[:limit]}…"
