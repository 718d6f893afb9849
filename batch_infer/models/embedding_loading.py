"""Load textual inversion embeddings into the tokenizers and text encoders of a pipeline with diffusers."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from batch_infer.errors import ModelError
from batch_infer.models.card import ModelCard
from batch_infer.models.textual_inversion import Embedding, refuse_known_token
from batch_infer.models.untrusted import hash_file, loading_errors


def load_embeddings(pipeline: Any, card: ModelCard) -> None:
    """Load the embeddings of --embedding. Raises ModelError if one does not fit, or if its token exists."""
    for embedding in card.embeddings:
        if hash_file(embedding.path) != embedding.fingerprint:
            raise ModelError(f"{embedding.path} was changed after the command had started")
        with loading_errors(embedding.path):
            tensors = load_file(embedding.path)
        needed = _list_encoders(pipeline)
        if missing := needed ^ {encoder for encoder, _ in embedding.tensors}:
            raise ModelError(
                f"{embedding.path} does not fit {card.name}; was it made for another family? (only one of them has "
                f"an embedding for {min(missing)})"
            )
        for encoder, name in embedding.tensors:
            _load(pipeline, embedding, encoder, tensors[name], card.name)


def _list_encoders(pipeline: Any) -> set[str]:
    """Return the CLIP text encoders, which embeddings are made for, or the only text encoder if it is another one."""
    has_two = isinstance(getattr(pipeline, "tokenizer_2", None), CLIPTokenizer)
    return {"text_encoder", "text_encoder_2"} if has_two else {"text_encoder"}


def _load(pipeline: Any, embedding: Embedding, encoder: str, vectors: torch.Tensor, model: str) -> None:
    """Load the vectors of one text encoder, and check that its embedding layer has them."""
    network, tokenizer = getattr(pipeline, encoder), getattr(pipeline, encoder.replace("text_encoder", "tokenizer"))
    vectors = vectors.reshape(embedding.vectors, -1)
    if not vectors.isfinite().all():
        raise ModelError(f"{embedding.path} contains NaN or infinity")
    width = network.get_input_embeddings().weight.shape[-1]
    if vectors.shape[-1] != width:
        raise ModelError(
            f"{embedding.path} does not fit {model}; was it made for another family? (its vectors have "
            f"{vectors.shape[-1]} numbers, but {encoder} takes {width})"
        )
    refuse_known_token(embedding, tokenizer)
    with loading_errors(embedding.path):
        pipeline.load_textual_inversion(
            {embedding.token: vectors}, token=embedding.token, tokenizer=tokenizer, text_encoder=network
        )
        ids = tokenizer.convert_tokens_to_ids(embedding.tokens)
        weight = network.get_input_embeddings().weight
        if not torch.equal(weight[ids], vectors.to(weight)):
            raise ModelError(f"{embedding.path}: diffusers has not loaded the embedding into {encoder}")
