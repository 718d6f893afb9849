"""Cache the results of text encoders, so that equal texts, such as empty negative prompts, are encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from batch_infer.stacking.trees import count_bytes

CACHE_BYTES = 128 << 20
"""Maximum number of bytes of cached results on the device."""


class EncoderCache:
    """Caches the most recently used results, by network and content of the arguments."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._results: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable) -> Any | None:
        if key in self._results:
            self._results.move_to_end(key)
        return self._results.get(key)

    def put(self, key: Hashable, result: Any) -> None:
        """Add a result, unless it alone exceeds the limit."""
        size = count_bytes(result)
        if size > self._max_bytes:
            return
        self._bytes += size - count_bytes(self._results.pop(key, None))
        self._results[key] = result
        while self._bytes > self._max_bytes:
            self._bytes -= count_bytes(self._results.popitem(last=False)[1])

    def clear(self) -> None:
        self._results.clear()
        self._bytes = 0
