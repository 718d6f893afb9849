"""Texts as the UNet is told of them, encoded at one fixed batch shape and kept for the rows that share a text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from batch_infer.diffusion import Context

if TYPE_CHECKING:
    from batch_infer.models.long_prompts import LongPrompts

TEXT_BATCH = 8
"""Texts in one text encoder call, padded: another batch size would move the embeddings by 1e-8."""
TEXTS_KEPT = 256
"""Texts kept for rows that share one, the empty negative prompt above all."""


def load_long_prompts(pipeline: Any, dtype: torch.dtype, windows: int) -> LongPrompts | None:
    """What encodes and counts texts in more than one window, with the pipeline's parts where they are; or None."""
    if windows == 1:
        return None
    from batch_infer.models.long_prompts import LongPrompts

    return LongPrompts(pipeline, dtype)


class TextEmbeddings:
    """What texts are encoded to; the latest are kept."""

    def __init__(self, encode: Callable[[Sequence[str]], Iterable[Context]]) -> None:
        """`encode` is called with TEXT_BATCH texts, always, and gives each one's part of a row's context."""
        self._encode = encode
        self._kept: OrderedDict[str, Context] = OrderedDict()

    def of(self, texts: Iterable[str]) -> Mapping[str, Context]:
        """Each of these texts' part of a context."""
        asked = set(texts)
        for text in asked & self._kept.keys():
            self._kept.move_to_end(text)
        missing = sorted(asked - self._kept.keys())
        for start in range(0, len(missing), TEXT_BATCH):
            batch = missing[start : start + TEXT_BATCH]
            padded = batch + [""] * (TEXT_BATCH - len(batch))
            self._kept.update(zip(batch, self._encode(padded), strict=False))
        found = {text: self._kept[text] for text in asked}
        while len(self._kept) > TEXTS_KEPT:
            self._kept.popitem(last=False)
        return found
