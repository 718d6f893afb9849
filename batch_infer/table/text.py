"""Text that was not UTF-8 where it came from: such bytes arrive as lone surrogates, which no result can hold."""

from __future__ import annotations


def is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def clean(text: str) -> str:
    """Text that a results table can hold: bytes that were not UTF-8 become U+FFFD."""
    return text if is_utf8(text) else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
