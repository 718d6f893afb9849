"""The tokenizer: CLIP's byte-level pairs, learned so that every word of a caption is one token."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from transformers import CLIPTokenizer

import world

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
MAX_TOKENS = 77


def byte_alphabet() -> list[str]:
    """Return the printable character that byte-level pairs use for each of the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(hidden))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merge the most frequent pair until each word is one token."""
    pieces = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges = []
    while any(len(parts) > 1 for parts in pieces):
        pairs = Counter(pair for parts in pieces for pair in zip(parts, parts[1:], strict=False))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = [_join(parts, best) for parts in pieces]
    return merges


def _join(parts: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def build() -> CLIPTokenizer:
    """Return the tokenizer."""
    vocab, merges = tables()
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def tables() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the tokens with their ids, and the merges in order."""
    merges = learn_merges(world.vocabulary())
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(letter + WORD_END for letter in alphabet), *(a + b for a, b in merges), START, END]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def save(folder: Path) -> None:
    """Write the tokenizer, with the two text files that older readers need."""
    build().save_pretrained(folder)
    vocab, merges = tables()
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
