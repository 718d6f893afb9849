"""Write data as scripts, which a page from disk may load."""

from __future__ import annotations

import json
from typing import Any

import msgspec

_ESCAPES = {b"<": b"\\u003c", b"\xe2\x80\xa8": b"\\u2028", b"\xe2\x80\xa9": b"\\u2029"}
"""Escapes inside JSON strings. `<` could end a script element, and U+2028 and U+2029 end a line in older engines."""


def to_script(kind: str, number: int, value: Any) -> bytes:
    """Return a script that passes a JSON value to the page. NaN and infinity become null.

    The value may contain any text: it is a JSON literal, so the script does nothing else.
    """
    try:
        content = msgspec.json.encode(value)
    except UnicodeEncodeError:  # names of files that are not UTF-8
        content = json.dumps(value).encode("ascii")
    for text, escape in _ESCAPES.items():
        content = content.replace(text, escape)
    return b'BatchInferGallery.receive("%s", %d, %s);\n' % (kind.encode("ascii"), number, content)
