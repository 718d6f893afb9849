"""Count the tokens of prompts to detect which prompts the text encoder truncates. Imports no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from batch_infer.errors import ModelError
from batch_infer.models.card import ModelCard
from batch_infer.models.configs import SHORTEST_TEXT, text_positions
from batch_infer.models.families import FAMILIES
from batch_infer.models.textual_inversion import Embedding, add_tokens, expand_tokens
from batch_infer.models.untrusted import loading_errors

WINDOWS = 3
"""Maximum number of windows, usually of 77 tokens, per prompt with --long-prompts."""
COUNT_BATCH = 1024
"""Maximum number of prompts whose tokens are counted together."""
MAX_PENDING = 8
"""Number of submitted batches beyond which `add` waits for the oldest one, to bound the memory."""


class TokenCounter:
    """Counts tokens with fast transformers tokenizers, which add a start and an end token to every text."""

    def __init__(self, *tokenizers: Any, windows: int = 1, embeddings: Sequence[Embedding] = ()) -> None:
        """The tokenizers have the tokens of the embeddings."""
        self._tokenizers, self._embeddings = tokenizers, embeddings
        self.max_tokens: int = windows * (min(tokenizer.model_max_length for tokenizer in tokenizers) - 2)
        """Maximum number of tokens, without start and end tokens, of a text that no text encoder truncates."""

    def is_short(self, text: str) -> bool:
        """Return whether a text certainly fits, because a token of ASCII text has at least one character."""
        return len(text) <= self.max_tokens and text.isascii() and not self._embeddings

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the maximum token count of each text over the tokenizers, without start, end and padding tokens."""
        texts = expand_tokens(texts, self._embeddings)
        counts = []
        for tokenizer in self._tokenizers:
            # Counting with the backend takes a third less time, because transformers also converts every encoding.
            backend = tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            counts.append([len(encoding) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)])
        return [max(text_counts) for text_counts in zip(*counts, strict=True)]


class TruncationCounter:
    """Counts prompts that the text encoder truncates, on a background thread."""

    def __init__(self, counter: TokenCounter) -> None:
        self._counter = counter
        self._pool = ThreadPoolExecutor(1)
        self._batch: list[str] = []
        self._pending: deque[Future[int]] = deque()
        self._total = 0

    def add(self, prompt: str) -> None:
        if self._counter.is_short(prompt):
            return
        self._batch.append(prompt)
        if len(self._batch) == COUNT_BATCH:
            self._submit()

    def close(self) -> int:
        """Wait for the background thread and return the number of truncated prompts."""
        self._submit()
        self._pool.shutdown()
        return self._total + sum(future.result() for future in self._pending)

    def _submit(self) -> None:
        self._pending.append(self._pool.submit(self._count_truncated, self._batch))
        self._batch = []
        while len(self._pending) > MAX_PENDING:
            self._total += self._pending.popleft().result()

    def _count_truncated(self, prompts: list[str]) -> int:
        return sum(count > self._counter.max_tokens for count in self._counter.count(prompts))


def load_token_counter(card: ModelCard) -> TokenCounter | None:
    """Load a checkpoint's token counter, or return None if only its pipeline can count tokens. Raises ModelError."""
    if card.uses_pipeline_call:
        return None
    from transformers import CLIPTokenizer

    tokenizers = []
    for name in FAMILIES[card.pipeline].tokenizers:
        folder = card.path / name
        with loading_errors(folder):
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            positions, embeddings = text_positions(card.path, name.replace("tokenizer", "text_encoder"), card.path.name)
            limit_tokenizer(tokenizer, positions, embeddings, folder)
            add_tokens(tokenizer, card.embeddings)
        tokenizers.append(tokenizer)
    return TokenCounter(*tokenizers, windows=card.windows, embeddings=card.embeddings)


def limit_tokenizer(tokenizer: Any, positions: int | None, embeddings: int | None, folder: Path) -> None:
    """Limit a tokenizer's maximum length to the positions of its text encoder.

    Raises ModelError if a token has no embedding, or if the maximum length leaves no room for a word.
    """
    if isinstance(positions, int):
        tokenizer.model_max_length = int(min(tokenizer.model_max_length, positions))
    if tokenizer.model_max_length < SHORTEST_TEXT:
        raise ModelError(f"{folder}: model_max_length={tokenizer.model_max_length} leaves no room for a word")
    token, last_id = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1], default=("", -1))
    if isinstance(embeddings, int) and last_id >= embeddings:
        encoder = folder.name.replace("tokenizer", "text_encoder")
        raise ModelError(
            f"{folder}: token {token!r} has id {last_id}, but {encoder} has only {embeddings} embeddings; do they "
            "belong together?"
        )
