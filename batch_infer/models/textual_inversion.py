"""Read the headers of textual inversion embeddings (Gal et al., arXiv 2208.01618), and put tokens into prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_infer.errors import ModelError
from batch_infer.models.untrusted import hash_file, read_shapes
from batch_infer.settings import EmbeddingSpec

ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""Text encoders by the names of the tensors in the files for Stable Diffusion XL."""
UNNAMED = ("emb_params", "*")
"""Tensor names that are not tokens."""
MAX_VECTORS = 75
"""Maximum number of vectors. More would not fit into a prompt."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """A local file with `vectors` embeddings of one token. `tensors` maps text encoders to tensor names."""

    path: Path
    token: str
    vectors: int
    tensors: tuple[tuple[str, str], ...]
    fingerprint: str

    def __str__(self) -> str:
        return self.token

    @property
    def tokens(self) -> list[str]:
        """The tokens of the vectors, named as by diffusers."""
        return [self.token, *(f"{self.token}_{number}" for number in range(1, self.vectors))]


def read_embeddings(specs: Iterable[EmbeddingSpec]) -> tuple[Embedding, ...]:
    """Read the headers of the files of --embedding, and hash the files.

    Raises ModelError for a file that is missing, damaged or not an embedding, and for tokens that contain each other.
    """
    embeddings = tuple(map(_read, specs))
    for embedding in embeddings:
        for other in embeddings:
            if other is not embedding and embedding.token.lower() in other.token.lower():
                raise ModelError(
                    f"--embedding: the token {other.token!r} contains the token {embedding.token!r}; give other "
                    "tokens: FILE.safetensors:TOKEN"
                )
    return embeddings


def _read(spec: EmbeddingSpec) -> Embedding:
    path = Path(spec.file).expanduser().absolute()
    if not path.is_file():
        raise ModelError(f"--embedding {spec.file}: there is no such file")
    shapes = read_shapes(path, str(path))
    if shapes.keys() == ENCODERS.keys():
        tensors, token = tuple((encoder, name) for name, encoder in ENCODERS.items()), path.stem
    elif len(shapes) == 1:
        (name,) = shapes
        tensors, token = (("text_encoder", name),), path.stem if name in (*UNNAMED, *ENCODERS) else name
    else:
        raise ModelError(
            f"{path} is not a textual inversion embedding: it has {len(shapes)} tensors instead of one, or of clip_l "
            "and clip_g"
        )
    counts = {len(shape) == 1 or shape[0] for shape in shapes.values() if len(shape) in (1, 2)}
    if not all(len(shape) in (1, 2) for shape in shapes.values()) or len(counts) != 1:
        raise ModelError(f"{path} is not a textual inversion embedding: its shapes are {list(shapes.values())}")
    (vectors,) = map(int, counts)
    if not 1 <= vectors <= MAX_VECTORS:
        raise ModelError(f"{path} has {vectors} vectors; the maximum is {MAX_VECTORS}")
    token = spec.token or token
    if not re.fullmatch(r"[^\s;]{1,100}", token) or not token.isprintable():
        raise ModelError(f"{path}: {token[:100]!r} cannot be a token; give another: FILE.safetensors:TOKEN")
    return Embedding(path, token, vectors, tensors, hash_file(path))


def add_tokens(tokenizer: Any, embeddings: Iterable[Embedding]) -> None:
    """Add the tokens of embeddings to a tokenizer that only counts. Raises ModelError if a token exists."""
    for embedding in embeddings:
        refuse_known_token(embedding, tokenizer)
        tokenizer.add_tokens(embedding.tokens)


def refuse_known_token(embedding: Embedding, tokenizer: Any) -> None:
    """Raise ModelError if a tokenizer has one of the tokens of an embedding."""
    vocabulary = tokenizer.get_vocab()
    if known := next((token for token in embedding.tokens if token in vocabulary), None):
        raise ModelError(
            f"{embedding.path}: the tokenizer already has the token {known!r}; give another: FILE.safetensors:TOKEN"
        )


def expand_tokens(texts: Sequence[str], embeddings: Sequence[Embedding]) -> list[str]:
    """Write one token for each vector of an embedding into texts that contain its token, as diffusers does."""
    expanded = list(texts)
    for embedding in embeddings:
        if embedding.vectors > 1:
            pattern, words = re.escape(embedding.token) + r"(?!_\d)", " ".join(embedding.tokens)
            expanded = [re.sub(pattern, lambda _, words=words: words, text) for text in expanded]  # type: ignore[misc]
    return expanded
