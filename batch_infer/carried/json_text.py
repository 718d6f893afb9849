"""Format results as JSON."""

from __future__ import annotations

import base64
import json
import math
from typing import Any


def shorten_float32(value: float | None) -> float | None:
    """Round to 7 significant digits, because converting a float32 to double adds meaningless digits."""
    return None if value is None else float(f"{value:.7g}")


def to_json(value: Any) -> str:
    """Format a value as JSON. NaN and infinity become null, and types that JSON lacks become text."""
    return json.dumps(_replace_non_finite(value), ensure_ascii=False, allow_nan=False, default=format_value)


def _replace_non_finite(value: Any) -> Any:
    """Replace NaN and infinity with None, as pandas does."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: _replace_non_finite(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_replace_non_finite(inner) for inner in value]
        case _:
            return value


def format_value(value: Any) -> str:
    """Format a value whose type JSON and CSV lack."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
