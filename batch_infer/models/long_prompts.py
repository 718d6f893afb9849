"""Encode prompts of more than 77 tokens and weighted words with compel, in consecutive windows of 77 tokens.

Each window is encoded in a separate call. As in compel, a row is padded to the same number of windows with the empty
prompt, so that no shape depends on other rows or on the length of a prompt.
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
"""Characters of the weight syntax. Texts without them skip the slow parser."""
SPECIAL = "<|"
"""Prefix of special tokens. In a text they would shift the weights."""
MAX_PARENTHESES = 16
MAX_CHARACTERS = 5000
"""Maximum nesting of parentheses and maximum length of a parsed text, to bound the parser's stack and time."""
PARSE_CACHE_SIZE = 1024
SYNTAX_ERRORS = (ParseBaseException, PromptParser.ParsingException, IndexError, RecursionError)
"""Parser errors for texts in another syntax."""

Piece = tuple[str, float]


class LongPrompts:
    """Encodes texts and counts tokens with a pipeline's CLIP text encoders and tokenizers."""

    def __init__(self, pipeline: Any, dtype: torch.dtype) -> None:
        components = pipeline.components
        self._dtype = dtype
        pairs = [(components["tokenizer"], components["text_encoder"])]
        if "text_encoder_2" in components:
            embeddings_type = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
            pairs.append((components["tokenizer_2"], components["text_encoder_2"]))
        else:
            embeddings_type = ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
        self._providers = [
            EmbeddingsProvider(
                tokenizer, network, truncate=False, returned_embeddings_type=embeddings_type,
                split_long_text_mode=SplitLongTextMode.BRUTAL,
            )
            for tokenizer, network in pairs
        ]  # fmt: skip
        self._window: int = min(tokenizer.model_max_length for tokenizer, _ in pairs)
        self.max_tokens = WINDOWS * (self._window - 2)
        """Maximum number of tokens that the text encoders see."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return each text's token count without weights, start, end and padding tokens."""
        return [max(_count(provider, read_weights(text)) for provider in self._providers) for text in texts]

    def __call__(self, texts: Sequence[str]) -> list[Context]:
        """Return an embedding (WINDOWS * 77, width) per text, with a pooled embedding if there are two encoders."""
        contexts = {text: self._encode(text) for text in dict.fromkeys(texts)}
        return [contexts[text] for text in texts]

    def _encode(self, text: str) -> Context:
        pieces = read_weights(text)
        embeddings = torch.cat([self._encode_windows(provider, pieces) for provider in self._providers], dim=-1)
        context = {"encoder_hidden_states": embeddings.to(self._dtype)}
        if len(self._providers) > 1:  # from the first window of the unparsed text, as in compel
            context["text_embeds"] = self._providers[1].get_pooled_embeddings([text])[0].to(self._dtype)
        return context

    def _encode_windows(self, provider: EmbeddingsProvider, pieces: Iterable[Piece]) -> torch.Tensor:
        # The text is cut within an additional window, which is dropped, so that the cut affects no other tokens.
        texts, weights = zip(*_cut(provider, pieces, (WINDOWS + 1) * (self._window - 2)), strict=True)
        device = provider.device
        if set(weights) == {1.0}:
            tokens, token_weights, mask = provider.get_token_ids_and_expand_weights(list(texts), weights, device=device)
            embedding = provider.build_weighted_embedding_tensor(tokens, token_weights, mask, device=device)
        else:
            embedding = provider.get_embeddings_for_weighted_prompt_fragments([list(texts)], [weights], device=device)
        encoded: torch.Tensor = embedding[0, : WINDOWS * self._window]
        missing = WINDOWS - len(encoded) // self._window
        return torch.cat([encoded, *[provider.empty_z[0].to(encoded.dtype)] * missing])


@lru_cache(PARSE_CACHE_SIZE)
def read_weights(text: str) -> tuple[Piece, ...]:
    """Split a text into weighted pieces: `(word)1.2`, `word++`, `(two words)0.8`, `\\(` for a parenthesis.

    A text in another syntax, or with other features of compel, becomes one literal piece.
    """
    literal = ((text, 1.0),)
    if not SYNTAX.intersection(text) or SPECIAL in text or len(text) > MAX_CHARACTERS or _depth(text) > MAX_PARENTHESES:
        return literal
    try:
        conjunction = _parser().parse_conjunction(text)
    except SYNTAX_ERRORS:
        return literal
    children = getattr(conjunction.prompts[0], "children", []) if len(conjunction.prompts) == 1 else []
    if conjunction.lora_weights or not children or any(type(child) is not Fragment for child in children):
        return literal
    return tuple((child.text, child.weight) for child in children)


@cache
def _parser() -> PromptParser:
    # Without a cache, parsing time doubles with every nested parenthesis: ten take minutes.
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
    """Return the pieces with at least one token, cut after `budget` tokens in total."""
    backend = provider.tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    selected = []
    for text, weight in pieces:
        encoding = backend.encode(text, add_special_tokens=False)
        if encoding.ids and budget > 0:
            fits = len(encoding.ids) <= budget
            selected.append((text if fits else text[: encoding.offsets[budget - 1][1]], weight))
        budget -= len(encoding.ids)
    return selected or [("", 1.0)]
