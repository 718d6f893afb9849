"""Text that was not UTF-8 where it came from: such bytes arrive as lone surrogates, which no result can hold."""

from __future__ import annotations

import re

SURROGATE = re.compile("[\ud800-\udfff]")
OF_NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Surrogates that stand for no byte: JSON has spelled them."""


def is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encoding_fault(text: str) -> str | None:
    """What is wrong with text that cannot be UTF-8, and what to do; None where nothing is."""
    if is_utf8(text):
        return None
    if OF_NO_BYTE.search(text):
        return "holds a lone surrogate, which is half a character: write whole characters"
    return "is not UTF-8: save the table as UTF-8"


def clean(text: str) -> str:
    """Text that a results table can hold: bytes that were not UTF-8 become U+FFFD."""
    if is_utf8(text):
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # JSON can spell a surrogate that stands for no byte
        return SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
