"""Read JSON text that does not fit in memory, one value at a time."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any

from batch_infer.table.jsonl import exact_float
from batch_infer.table.streams import BUFFER, LONGEST


class BrokenDocumentError(Exception):
    """The rest of the document is not JSON, or is missing."""


class Scanner:
    """Reads JSON text from start to end. All methods raise OSError and BrokenDocumentError.

    The standard library's decoder reads one value at a time. (ijson was tried. It stops at a byte that is not UTF-8 or
    at a lone surrogate, or silently changes it, and its memory use grows with the square of the nesting depth.)
    """

    def __init__(self, stream: io.BufferedReader, longest: int = LONGEST) -> None:
        """`longest` is the maximum length of a value in characters."""
        self._stream, self._longest = stream, longest
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._decode = json.JSONDecoder(parse_float=exact_float).raw_decode
        self._text, self._position = "", 0
        self._is_at_end = False

    def peek(self) -> str:
        """Return the next character that is not a space, or '' at the end."""
        while True:
            character = self._text[self._position : self._position + 1]
            if character and not character.isspace():
                return character
            if character:
                self._position += 1
            elif not self._read_more():
                return ""

    def read_mark(self, *marks: str) -> str:
        """Read and return one of the marks."""
        character = self.peek()
        if character not in marks:
            expected = " or ".join(marks)
            raise BrokenDocumentError(f"{character!r} instead of {expected}" if character else "it ends in the middle")
        self._position += 1
        return character

    def read_value(self) -> Any:
        """Read and return one value."""
        if not self.peek():
            raise BrokenDocumentError("it ends in the middle")
        while True:
            try:
                value, end = self._decode(self._text, self._position)
            except json.JSONDecodeError as error:
                message = f"it is not JSON: {error.msg.removesuffix(' at')}"
            except ValueError as error:
                raise BrokenDocumentError("a number in it is too long") from error
            except RecursionError as error:
                raise BrokenDocumentError("it is nested too deeply") from error
            else:
                if end < len(self._text) or self._is_at_end:  # else 12 may be the start of 123
                    self._position = end
                    return value
                message = f"a value is longer than {self._longest} characters"
            if self._is_at_end or len(self._text) - self._position > self._longest:
                raise BrokenDocumentError(message)
            size = 2 * (len(self._text) - self._position)
            while len(self._text) - self._position < size and self._read_more():
                pass

    def skip_value(self) -> None:
        """Skip a value, or an array of any length."""
        if self.peek() == "[":
            for _ in self.elements():
                self.read_value()
        else:
            self.read_value()

    def elements(self) -> Iterator[None]:
        """Yield before each element of an array. The caller must consume the element."""
        self.read_mark("[")
        if self.peek() == "]":
            self.read_mark("]")
            return
        yield
        while self.read_mark(",", "]") == ",":
            yield

    def read_keys(self) -> Iterator[str]:
        """Yield the keys of an object. The caller must consume each value."""
        self.read_mark("{")
        if self.peek() == "}":
            self.read_mark("}")
            return
        yield self._read_key()
        while self.read_mark(",", "}") == ",":
            yield self._read_key()

    def read_end(self) -> None:
        """Raise BrokenDocumentError unless the document ends here."""
        if character := self.peek():
            raise BrokenDocumentError(f"{character!r} after its end")

    def _read_key(self) -> str:
        key = self.read_value()
        if not isinstance(key, str):
            raise BrokenDocumentError("a key is not text")
        self.read_mark(":")
        return key

    def _read_more(self) -> bool:
        """Read more text. Return False at the end. Bytes that are not UTF-8 become lone surrogates."""
        data = self._stream.read1(BUFFER)
        self._text = self._text[self._position :] + self._utf8(data, not data)
        self._position, self._is_at_end = 0, not data
        return bool(data)
