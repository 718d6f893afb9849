"""Read JSON that does not fit in memory, one value at a time."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any

from batch_infer.table.jsonl import parse_exact_float
from batch_infer.table.streams import BUFFER, MAX_ROW_SIZE


class Scanner:
    """Reads JSON text from start to end.

    Methods raise StorageError if the disk fails, and OSError if the text cannot be read, is not JSON, or contains a
    value that is too long or nested too deeply.

    The standard library's decoder reads each value. ijson is unsuitable: it stops at lone surrogates and at bytes that
    are not UTF-8, or silently changes them, and its memory use grows with the square of the nesting depth.
    """

    def __init__(self, stream: io.BufferedReader, max_length: int = MAX_ROW_SIZE) -> None:
        """Values of up to `max_length` characters are read, and those of more than about twice as many are rejected."""
        self._stream, self._max_length = stream, max_length
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._decode = json.JSONDecoder(parse_float=parse_exact_float).raw_decode
        self._text, self._position = "", 0
        self._is_at_end = False

    def peek(self) -> str:
        """Return the next character that is not whitespace, or '' at the end. Do not consume it."""
        while True:
            character = self._text[self._position : self._position + 1]
            if character and not character.isspace():
                return character
            if character:
                self._position += 1
            elif not self._read_more():
                return ""

    def read_token(self, *tokens: str) -> str:
        """Read one of these one-character tokens and return it."""
        character = self.peek()
        if character not in tokens:
            expected = " or ".join(tokens)
            raise OSError(f"{character!r} instead of {expected}" if character else "it ends in the middle")
        self._position += 1
        return character

    def read_value(self) -> Any:
        """Read and return one value."""
        if not self.peek():
            raise OSError("it ends in the middle")
        while True:
            try:
                value, end = self._decode(self._text, self._position)
            except json.JSONDecodeError as error:
                message = f"it is not JSON: {error.msg.removesuffix(' at')}"
            except ValueError as error:
                raise OSError("a number in it is too long") from error
            except RecursionError as error:
                raise OSError("it is nested too deeply") from error
            else:
                if end < len(self._text) or self._is_at_end:  # otherwise 12 may be the start of 123
                    self._position = end
                    return value
                message = f"a value is longer than {self._max_length} characters"
            if self._is_at_end or len(self._text) - self._position > self._max_length:
                raise OSError(message)
            size = 2 * (len(self._text) - self._position)
            while len(self._text) - self._position < size and self._read_more():
                pass

    def skip_value(self) -> None:
        """Skip a value. An array may have any length."""
        if self.peek() == "[":
            for _ in self.find_elements():
                self.read_value()
        else:
            self.read_value()

    def find_elements(self) -> Iterator[None]:
        """Yield before each element of an array. The caller must consume the element."""
        return self._find_items("[", "]")

    def read_keys(self) -> Iterator[str]:
        """Yield the keys of an object. The caller must consume the value after each key."""
        for _ in self._find_items("{", "}"):
            key = self.read_value()
            if not isinstance(key, str):
                raise OSError("a key is not text")
            self.read_token(":")
            yield key

    def read_end(self) -> None:
        """Raise OSError unless the document ends here."""
        if character := self.peek():
            raise OSError(f"{character!r} after its end")

    def _find_items(self, start: str, end: str) -> Iterator[None]:
        self.read_token(start)
        if self.peek() == end:
            self.read_token(end)
            return
        yield
        while self.read_token(",", end) == ",":
            yield

    def _read_more(self) -> bool:
        """Read more text. Return False at the end. Bytes that are not UTF-8 become lone surrogates."""
        data = self._stream.read1(BUFFER)
        self._text = self._text[self._position :] + self._utf8(data, not data)
        self._position, self._is_at_end = 0, not data
        return bool(data)
