"""Prompts of more than 77 tokens, and words with weights, by compel: windows of 77 tokens one after the other.

Each window is encoded by itself, always alone in its call, and a row's context has the same number of windows whatever
its prompt: what is left over holds the empty prompt, as compel fills up. So neither the neighbours nor the length of a
prompt decide a shape.
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
"""Without any of these a text says no weights, and compel's parser, which takes its time, is not asked."""
SPECIAL = "<|"
"""How a tokenizer's own marks begin, which would move what weights belong to."""
DEEPEST = 16
LONGEST = 5000
"""Parentheses in each other, and characters, up to which a text is parsed: bounds of the parser's stack and time."""
TEXTS_KEPT = 1024
LITERAL_ERRORS = (ParseBaseException, PromptParser.ParsingException, IndexError, RecursionError)
"""What the parser raises for texts that it cannot read as its syntax."""

Piece = tuple[str, float]


class LongPrompts:
    """Encodes and counts texts with the tokenizers and text encoders of a Stable Diffusion pipeline, of any version."""

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
        self.longest = WINDOWS * (self._window - 2)
        """Tokens of a text that the encoders see whole."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """The texts' own tokens, without those of weights, start, end and padding."""
        return [max(sum(_lengths(found, read_weights(text))) for found in self._providers) for text in texts]

    def __call__(self, texts: Sequence[str]) -> list[Context]:
        """Each text's embedding (WINDOWS * 77, width), and with two encoders the second's pooled one."""
        found = {text: self._encode(text) for text in dict.fromkeys(texts)}
        return [found[text] for text in texts]

    def _encode(self, text: str) -> Context:
        pieces = read_weights(text)
        embeddings = torch.cat([self._windows(provider, pieces) for provider in self._providers], dim=-1)
        context = {"encoder_hidden_states": embeddings.to(self._dtype)}
        if len(self._providers) > 1:  # of the text as it stands, and of its beginning, as compel has it
            context["text_embeds"] = self._providers[1].get_pooled_embeddings([text])[0].to(self._dtype)
        return context

    def _windows(self, provider: EmbeddingsProvider, pieces: Iterable[Piece]) -> torch.Tensor:
        # One window more than is kept: the text is cut within it, and the cut moves no token of the others.
        texts, weights = zip(*_cut(provider, pieces, (WINDOWS + 1) * (self._window - 2)), strict=True)
        device = provider.device
        if set(weights) == {1.0}:
            tokens, ones, mask = provider.get_token_ids_and_expand_weights(list(texts), weights, device=device)
            found = provider.build_weighted_embedding_tensor(tokens, ones, mask, device=device)
        else:
            found = provider.get_embeddings_for_weighted_prompt_fragments([list(texts)], [weights], device=device)
        kept: torch.Tensor = found[0, : WINDOWS * self._window]
        missing = WINDOWS - len(kept) // self._window
        return torch.cat([kept, *[provider.empty_z[0].to(kept.dtype)] * missing])


@lru_cache(TEXTS_KEPT)
def read_weights(text: str) -> tuple[Piece, ...]:
    """A text's pieces and their weights: `(word)1.2`, `word++`, `(some words)0.8`, `\\(` for a parenthesis.

    A text that is not to be read so is one piece as it stands, and so is one that asks for more than weights.
    """
    literal = ((text, 1.0),)
    if not SYNTAX.intersection(text) or SPECIAL in text or len(text) > LONGEST or _depth(text) > DEEPEST:
        return literal
    try:
        found = _parser().parse_conjunction(text)
    except LITERAL_ERRORS:
        return literal
    children = getattr(found.prompts[0], "children", []) if len(found.prompts) == 1 else []
    if found.lora_weights or not children or any(type(child) is not Fragment for child in children):
        return literal
    return tuple((child.text, child.weight) for child in children)


@cache
def _parser() -> PromptParser:
    # Without a memory the parser takes twice as long for every parenthesis within another: minutes for ten.
    ParserElement.enable_packrat(cache_size_limit=None)
    return PromptParser()


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def _lengths(provider: EmbeddingsProvider, pieces: Iterable[Piece]) -> list[int]:
    found = provider.get_token_ids([text for text, _ in pieces], include_start_and_end_markers=False)
    return [len(tokens) for tokens in found]


def _cut(provider: EmbeddingsProvider, pieces: Iterable[Piece], budget: int) -> list[Piece]:
    """The pieces that hold tokens, up to so many of these."""
    backend = provider.tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    found = []
    for text, weight in pieces:
        encoding = backend.encode(text, add_special_tokens=False)
        if encoding.ids and budget > 0:
            kept = text if len(encoding.ids) <= budget else text[: encoding.offsets[budget - 1][1]]
            found.append((kept, weight))
        budget -= len(encoding.ids)
    return found or [("", 1.0)]
