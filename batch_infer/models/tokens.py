"""Counting tokens: how long a prompt is, and whether the text encoder will see all of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batch_infer.errors import ModelError
from batch_infer.models.configs import SHORTEST_TEXT, text_positions
from batch_infer.models.untrusted import LoadingErrors

WINDOWS = 3
"""Times 77 tokens that the UNet is told of a prompt with --long-prompts."""
LENGTHENED = ("stable_diffusion", "stable_diffusion_xl", "decidiffusion")
"""Families that --long-prompts is for."""
COUNTED_AT_ONCE = 1024
COUNTS_AHEAD = 8


class TokenCounter:
    """Counts with fast tokenizers of transformers' that frame a text with a start and an end."""

    def __init__(self, *tokenizers: Any, windows: int = 1) -> None:
        self._tokenizers = tokenizers
        self.longest: int = windows * (min(tokenizer.model_max_length for tokenizer in tokenizers) - 2)
        """Tokens of a text that every encoder sees whole, in so many windows."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """The texts' own tokens, without start, end and padding; of several tokenizers those of the one with most."""
        texts = list(texts)
        counts = []
        for tokenizer in self._tokenizers:
            # Asked directly: half as long again goes by until transformers has packed up what is only counted here.
            backend = tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            counts.append([len(found) for found in backend.encode_batch_fast(texts, add_special_tokens=False)])
        return list(map(max, *counts)) if len(counts) > 1 else counts[0]

    def is_short(self, text: str) -> bool:
        """Whether a text is seen whole, told without counting: in ASCII no token is shorter than a character."""
        return len(text) <= self.longest and text.isascii()


class TruncationCounter:
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


def count_windows(family: str, name: str, *, long_prompts: bool) -> int:
    """How many times 77 tokens a model of this family is told of a prompt. Raises ModelError where that cannot be."""
    if not long_prompts:
        return 1
    if family not in LENGTHENED:
        raise ModelError(f"{name} is of the family {family}; --long-prompts is for Stable Diffusion and DeciDiffusion")
    if find_spec("compel") is None:
        raise ModelError("--long-prompts needs compel: pip install 'batch-infer[long-prompts]'")
    return WINDOWS


def load_clip(path: Path, suffix: str = "") -> Any:
    """Load a checkpoint's CLIP tokenizer, `suffix` "_2" its second, fitted to its text encoder. Raises ModelError."""
    from transformers import CLIPTokenizer

    folder = path / f"tokenizer{suffix}"
    with LoadingErrors(folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        fit_tokenizer(tokenizer, *text_positions(path, f"text_encoder{suffix}", path.name), folder)
    return tokenizer


def fit_tokenizer(tokenizer: Any, positions: int | None, embeddings: int | None, place: Path) -> None:
    """Limit a tokenizer to as many tokens as its text encoder has positions, where it names more or no limit.

    Raises ModelError where a token has no embedding, or the limit leaves no room for a word.
    """
    if isinstance(positions, int):
        tokenizer.model_max_length = int(min(tokenizer.model_max_length, positions))
    if tokenizer.model_max_length < SHORTEST_TEXT:
        raise ModelError(f"{place}: model_max_length={tokenizer.model_max_length} leaves no room for a word")
    token, last = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1], default=("", -1))
    if isinstance(embeddings, int) and last >= embeddings:
        raise ModelError(
            f"{place}: the token {token!r} has the number {last}, and "
            f"{place.name.replace('tokenizer', 'text_encoder')} has {embeddings} embeddings; do they belong together?"
        )
