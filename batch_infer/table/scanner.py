"""JSON text that does not fit in memory, read one value at a time by the standard library's decoder.

(ijson was tried: a byte that is not UTF-8 or a lone surrogate ends its document or becomes another character in
silence, and its memory grows with the square of the depth.)
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any

from batch_infer.table.numbers import exact_float
from batch_infer.table.streams import BUFFER, LONGEST


class BrokenDocument(Exception):
    """The document goes on as JSON does not, or not at all."""


class Scanner:
    """Stands at a place in a document; each method goes past what it is named for.

    All raise OSError, and BrokenDocument.
    """

    def __init__(self, stream: io.BufferedReader, longest: int = LONGEST) -> None:
        self._stream, self._longest = stream, longest
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._decode = json.JSONDecoder(parse_float=exact_float).raw_decode
        self._text, self._at = "", 0
        self._ended = False

    def peek(self) -> str:
        """The next character that is no space, or '' at the end."""
        while True:
            rest = self._text[self._at : self._at + 1]
            if rest and not rest.isspace():
                return rest
            if rest:
                self._at += 1
            elif not self._more():
                return ""

    def take(self, *marks: str) -> str:
        """One of these marks."""
        found = self.peek()
        if found not in marks:
            wanted = " or ".join(marks)
            raise BrokenDocument(f"{found!r} stands where {wanted} should" if found else "it ends in the middle")
        self._at += 1
        return found

    def value(self) -> Any:
        """A value, of `longest` characters at most."""
        if not self.peek():
            raise BrokenDocument("it ends in the middle")
        while True:
            try:
                found, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                fault = f"it is no JSON: {error.msg.removesuffix(' at')}"
            except ValueError as error:
                raise BrokenDocument("a number in it is too long") from error
            except RecursionError as error:
                raise BrokenDocument("it is nested too deeply") from error
            else:
                if end < len(self._text) or self._ended:  # else 12 may be the start of 123
                    self._at = end
                    return found
                fault = ""
            if self._ended or len(self._text) - self._at > self._longest:
                raise BrokenDocument(fault or f"a value is longer than {self._longest} characters")
            more = 2 * (len(self._text) - self._at)
            while len(self._text) - self._at < more and self._more():
                pass

    def skip(self) -> None:
        """A value, or an array of any length."""
        if self.peek() == "[":
            for _ in self.elements():
                self.value()
        else:
            self.value()

    def elements(self) -> Iterator[None]:
        """Stops before each element of an array; whoever walks goes past it."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        yield
        while self.take(",", "]") == ",":
            yield

    def members(self) -> Iterator[str]:
        """The keys of an object; whoever walks goes past the value of each."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        yield self._key()
        while self.take(",", "}") == ",":
            yield self._key()

    def end(self) -> None:
        """The end of the document."""
        if found := self.peek():
            raise BrokenDocument(f"{found!r} stands after its end")

    def _key(self) -> str:
        key = self.value()
        if not isinstance(key, str):
            raise BrokenDocument("a key is not text")
        self.take(":")
        return key

    def _more(self) -> bool:
        """Take in more text; False at the end of the document. Bytes that are not UTF-8 come as lone surrogates."""
        found = self._stream.read1(BUFFER)
        self._text = self._text[self._at :] + self._utf8(found, not found)
        self._at, self._ended = 0, not found
        return bool(found)
