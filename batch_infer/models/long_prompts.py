"""Prompts of more than 77 tokens and words with weights, by compel, in consecutive windows of 77 tokens.

Each window is encoded in a call of its own, and every row has the same number of windows, padded with the empty prompt
as compel does: no shape depends on the neighbours or on the length of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from compel.embeddings_provider import EmbeddingsProvider, ReturnedEmbeddingsType, SplitLongTextMode
from compel.prompt_parser import Fragment, PromptParser
from pyparsing import ParseBaseException, ParserElement

from batch_infer.diffusion import Context
from batch_infer.models.tokens import WINDOWS

SYNTAX = frozenset('()"+-\\')
"""A text without any of these has no weights and needs no parsing, which is slow."""
SPECIAL = "<|"
"""Start of a tokenizer's special tokens, which would shift the weights."""
MAX_PARENTHESES = 16
MAX_CHARACTERS = 5000
"""Nested parentheses and characters of a text that is parsed: bounds of the parser's stack and time."""
PARSED_TEXTS = 1024
LITERAL_ERRORS = (ParseBaseException, PromptParser.ParsingException, IndexError, RecursionError)
"""Errors of the parser for texts that are not in its syntax."""

Piece = tuple[str, float]


class LongPrompts:
    """Encodes texts and counts tokens with the components of a Stable Diffusion pipeline, of any version."""

    def __init__(self, pipeline: Any, dtype: torch.dtype) -> None:
        parts = pipeline.components
        self._dtype = dtype
        if "text_encoder_2" in parts:
            kind = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
            pairs = [(parts["tokenizer"], parts["text_encoder"]), (parts["tokenizer_2"], parts["text_encoder_2"])]
        else:
            kind = ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
            pairs = [(parts["tokenizer"], parts["text_encoder"])]
        self._providers = [
            EmbeddingsProvider(
                tokenizer, network, truncate=False, returned_embeddings_type=kind,
                split_long_text_mode=SplitLongTextMode.BRUTAL,
            )
            for tokenizer, network in pairs
        ]  # fmt: skip
        self._window: int = min(tokenizer.model_max_length for tokenizer, _ in pairs)
        self.max_tokens = WINDOWS * (self._window - 2)
        """Tokens of a text that the encoders see."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return each text's tokens without those of weights, start, end and padding."""
        return [max(_count(provider, read_weights(text)) for provider in self._providers) for text in texts]

    def __call__(self, texts: Sequence[str]) -> list[Context]:
        """Return each text's embedding (WINDOWS * 77, width), and with two encoders the second's pooled one."""
        contexts = {text: self._encode(text) for text in dict.fromkeys(texts)}
        return [contexts[text] for text in texts]

    def _encode(self, text: str) -> Context:
        pieces = read_weights(text)
        embeddings = torch.cat([self._windows(provider, pieces) for provider in self._providers], dim=-1)
        context = {"encoder_hidden_states": embeddings.to(self._dtype)}
        if len(self._providers) > 1:  # of the unparsed text's first window, as compel has it
            context["text_embeds"] = self._providers[1].get_pooled_embeddings([text])[0].to(self._dtype)
        return context

    def _windows(self, provider: EmbeddingsProvider, pieces: Iterable[Piece]) -> torch.Tensor:
        # One window more than is kept: the text is cut within it, so that the cut affects no token of the others.
        texts, weights = zip(*_cut(provider, pieces, (WINDOWS + 1) * (self._window - 2)), strict=True)
        device = provider.device
        if set(weights) == {1.0}:
            tokens, ones, mask = provider.get_token_ids_and_expand_weights(list(texts), weights, device=device)
            embedding = provider.build_weighted_embedding_tensor(tokens, ones, mask, device=device)
        else:
            embedding = provider.get_embeddings_for_weighted_prompt_fragments([list(texts)], [weights], device=device)
        kept: torch.Tensor = embedding[0, : WINDOWS * self._window]
        missing = WINDOWS - len(kept) // self._window
        return torch.cat([kept, *[provider.empty_z[0].to(kept.dtype)] * missing])


@lru_cache(PARSED_TEXTS)
def read_weights(text: str) -> tuple[Piece, ...]:
    """Split a text into pieces and their weights: `(word)1.2`, `word++`, `(some words)0.8`, `\\(` for a parenthesis.

    A text in another syntax, or with more than weights in it, is one literal piece.
    """
    literal = ((text, 1.0),)
    if not SYNTAX.intersection(text) or SPECIAL in text or len(text) > MAX_CHARACTERS or _depth(text) > MAX_PARENTHESES:
        return literal
    try:
        conjunction = _parser().parse_conjunction(text)
    except LITERAL_ERRORS:
        return literal
    children = getattr(conjunction.prompts[0], "children", []) if len(conjunction.prompts) == 1 else []
    if conjunction.lora_weights or not children or any(type(child) is not Fragment for child in children):
        return literal
    return tuple((child.text, child.weight) for child in children)


@cache
def _parser() -> PromptParser:
    # Without a cache the time doubles with every nested parenthesis: minutes for ten.
    ParserElement.enable_packrat(cache_size_limit=None)
    return PromptParser()


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def _count(provider: EmbeddingsProvider, pieces: Iterable[Piece]) -> int:
    texts = [text for text, _ in pieces]
    return sum(map(len, provider.get_token_ids(texts, include_start_and_end_markers=False)))


def _cut(provider: EmbeddingsProvider, pieces: Iterable[Piece], budget: int) -> list[Piece]:
    """Return the pieces that hold tokens, up to a total of `budget` tokens."""
    backend = provider.tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    kept = []
    for text, weight in pieces:
        encoding = backend.encode(text, add_special_tokens=False)
        if encoding.ids and budget > 0:
            fits = len(encoding.ids) <= budget
            kept.append((text if fits else text[: encoding.offsets[budget - 1][1]], weight))
        budget -= len(encoding.ids)
    return kept or [("", 1.0)]
