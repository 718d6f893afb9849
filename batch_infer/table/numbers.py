"""Numbers of JSON, read without rounding."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from batch_infer.carried import JsonNumber

SHORT = 15
"""So many digits come out of a float as they went in (IEEE 754 binary64)."""
LONGEST = 4000
"""Digits of an integer: Python converts no more than 4300 at once."""


def exact_float(text: str) -> float | int | Decimal | JsonNumber:
    """A JSON number with a point or an exponent as a float, or as what holds it where a float would round it.

    What a float prints as is taken for exact: 0.1 is the float that 0.1 names. An exponent too large stays as written.
    """
    number = float(text)
    plain = "e" not in text.lower()
    if repr(number) == text or (plain and len(text) <= SHORT):
        return number
    try:
        exact = Decimal(text)
    except InvalidOperation:
        return JsonNumber(text)
    if Decimal(repr(number)) == exact:
        return number
    return int(exact) if plain and exact.adjusted() < LONGEST and exact == exact.to_integral_value() else exact
