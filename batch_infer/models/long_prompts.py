"""Encode prompts of more than 77 tokens and weighted words with compel, in consecutive windows of 77 tokens.

Each window is encoded in a separate call. Every text is padded with the empty prompt, as in compel, to the same number
of windows, so that no shape depends on other rows or on the length of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from itertools import accumulate
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
"""Prefix of special tokens. Texts that contain it are not parsed, because such tokens would shift their weights."""
MAX_PARENTHESES = 16
MAX_CHARACTERS = 5000
"""Maximum nesting and length of a parsed text, to bound the stack and the time of the parser."""
PARSE_CACHE_SIZE = 1024
SYNTAX_ERRORS = (ParseBaseException, PromptParser.ParsingException, IndexError, RecursionError)
"""Errors that the parser raises for texts that do not follow the syntax."""

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
        """Maximum number of tokens of a text that is not truncated."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return each text's highest token count of the tokenizers, without weights, start, end and padding tokens."""
        counts = []
        for text in texts:
            pieces = [piece for piece, _ in read_weights(text)]
            ids = [provider.get_token_ids(pieces, include_start_and_end_markers=False) for provider in self._providers]
            counts.append(max(sum(map(len, piece_ids)) for piece_ids in ids))
        return counts

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
        # Cut the text in an extra window, which is dropped below, so that the cut does not affect the other tokens.
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

    A text that does not follow this syntax, is too complex, contains special tokens or uses other features of compel is
    one literal piece.
    """
    literal = ((text, 1.0),)
    depths = accumulate((character == "(") - (character == ")") for character in text)
    is_too_complex = len(text) > MAX_CHARACTERS or max(depths, default=0) > MAX_PARENTHESES
    if not SYNTAX.intersection(text) or SPECIAL in text or is_too_complex:
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
    # Without a cache, each nested parenthesis doubles the parsing time: ten take minutes.
    ParserElement.enable_packrat(cache_size_limit=None)
    return PromptParser()


def _cut(provider: EmbeddingsProvider, pieces: Iterable[Piece], budget: int) -> list[Piece]:
    """Return the pieces with at least one token, cut after `budget` tokens in total, or one empty piece if none."""
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
