"""The embedding cache: every call has one shape, rows share the embeddings of a text, and the bytes are limited."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from batch_infer.diffusion import Context
from batch_infer.models.latent_diffusion import TEXT_BATCH, EmbeddingCache

TEXT_BYTES = 8
"""Size of the encoder's embeddings in bytes."""
CAPACITY = 16


class Encoder:
    """Encodes a text as its length and records the batches."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> list[Context]:
        self.batches.append(list(texts))
        return [{"length": part} for part in torch.tensor([len(text) for text in texts]).unbind()]


def test_each_text_gets_its_embedding_and_every_call_has_one_shape() -> None:
    encode = Encoder()
    texts = ["x" * length for length in range(2 * TEXT_BATCH + 1)]
    embeddings = EmbeddingCache().get([*texts, *texts], encode)
    assert {text: int(part["length"]) for text, part in embeddings.items()} == {text: len(text) for text in texts}
    assert [len(batch) for batch in encode.batches] == [TEXT_BATCH] * 3


def test_cached_texts_are_not_encoded_again() -> None:
    encode, cache = Encoder(), EmbeddingCache()
    first = cache.get(["", "red"], encode)
    again = cache.get(["red", "green"], encode)
    assert again["red"] is first["red"]
    assert set(again) == {"red", "green"}
    assert [text for batch in encode.batches for text in batch if text] == ["red", "green"]


def test_the_most_recently_used_texts_stay_in_the_cache() -> None:
    encode, cache = Encoder(), EmbeddingCache(CAPACITY * TEXT_BYTES)
    cache.get(["common", "rare"], encode)
    for number in range(CAPACITY):
        cache.get([f"text {number}", "common"], encode)
    assert sum("common" in batch for batch in encode.batches) == 1
    encode.batches.clear()
    cache.get(["rare"], encode)
    assert encode.batches


def test_one_call_may_have_more_texts_than_the_cache_holds() -> None:
    encode, cache = Encoder(), EmbeddingCache(CAPACITY * TEXT_BYTES)
    texts = [f"text {number}" for number in range(CAPACITY + TEXT_BATCH)]
    assert set(cache.get(texts, encode)) == set(texts)
    encode.batches.clear()
    cache.get(texts, encode)
    assert encode.batches


def test_an_embedding_does_not_keep_its_batch_in_memory() -> None:
    (embedding,) = EmbeddingCache().get(["red"], Encoder()).values()
    assert embedding["length"].untyped_storage().nbytes() == TEXT_BYTES
