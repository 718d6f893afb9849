"""Counting tokens: how long a prompt is, and whether the text encoder will see all of it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from batch_infer.errors import ModelError, first_line

COUNTED_AT_ONCE = 1024
COUNTS_AHEAD = 8


class TokenCounter:
    """Counts with a fast tokenizer of transformers' that frames a text with a start and an end."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.longest: int = tokenizer.model_max_length - 2
        """Tokens of a text that the encoder sees whole."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """The texts' own tokens, without start, end and padding."""
        # Asked directly: half as long again goes by until transformers has packed up what is only counted here.
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return [len(found) for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def is_short(self, text: str) -> bool:
        """Whether a text is seen whole, told without counting: in ASCII no token is shorter than a character."""
        return len(text) <= self.longest and text.isascii()


class TruncationCount:
    """Counts, on a thread beside the one that reads the prompts, those that the text encoder will not see whole."""

    def __init__(self, counter: TokenCounter) -> None:
        self._counter = counter
        self._pool = ThreadPoolExecutor(1)
        self._waiting: list[str] = []
        self._under_way: deque[Future[int]] = deque()
        self._total = 0

    def add(self, prompt: str) -> None:
        if self._counter.is_short(prompt):
            return
        self._waiting.append(prompt)
        if len(self._waiting) == COUNTED_AT_ONCE:
            self._send()

    def close(self) -> int:
        """The count, once all are counted."""
        if self._waiting:
            self._send()
        self._pool.shutdown()
        return self._total + sum(future.result() for future in self._under_way)

    def _send(self) -> None:
        self._under_way.append(self._pool.submit(self._truncated, self._waiting))
        self._waiting = []
        while len(self._under_way) > COUNTS_AHEAD:
            self._total += self._under_way.popleft().result()

    def _truncated(self, prompts: list[str]) -> int:
        return sum(number > self._counter.longest for number in self._counter.count(prompts))


def load_clip(folder: Path) -> Any:
    """A checkpoint's CLIP tokenizer. Raises ModelError."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before the import: advice for its programmers
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder} could not be loaded: {first_line(error)}") from error
