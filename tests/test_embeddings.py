"""Texts kept: encoded at one shape, once for all rows that share one, and in the end let go."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from batch_infer.diffusion import Context
from batch_infer.models.embeddings import TEXT_BATCH, TEXTS_KEPT, TextEmbeddings


class Encoder:
    """A text's embedding is its length; remembers what it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> list[Context]:
        self.batches.append(list(texts))
        return [{"length": torch.tensor(len(text))} for text in texts]


def test_each_text_gets_its_own_and_every_call_has_one_shape() -> None:
    encoder = Encoder()
    texts = ["x" * length for length in range(2 * TEXT_BATCH + 1)]
    found = TextEmbeddings(encoder).of([*texts, *texts])
    assert {text: int(part["length"]) for text, part in found.items()} == {text: len(text) for text in texts}
    assert [len(batch) for batch in encoder.batches] == [TEXT_BATCH] * 3


def test_a_text_that_is_kept_is_not_encoded_again() -> None:
    encoder = Encoder()
    embeddings = TextEmbeddings(encoder)
    first = embeddings.of(["", "red"])
    again = embeddings.of(["red", "green"])
    assert again["red"] is first["red"]
    assert set(again) == {"red", "green"}
    assert [text for batch in encoder.batches for text in batch if text] == ["red", "green"]


def test_the_texts_asked_for_last_are_kept() -> None:
    encoder = Encoder()
    embeddings = TextEmbeddings(encoder)
    embeddings.of(["common", "rare"])
    for number in range(TEXTS_KEPT):
        embeddings.of([f"text {number}", "common"])
    assert sum("common" in batch for batch in encoder.batches) == 1
    encoder.batches.clear()
    embeddings.of(["rare"])
    assert encoder.batches


def test_more_texts_at_once_than_are_kept() -> None:
    encoder = Encoder()
    embeddings = TextEmbeddings(encoder)
    texts = [f"text {number}" for number in range(TEXTS_KEPT + TEXT_BATCH)]
    assert set(embeddings.of(texts)) == set(texts)
    encoder.batches.clear()
    embeddings.of(texts)
    assert encoder.batches
