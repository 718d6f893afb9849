"""Tell which calls of a network can be stacked: those with equal signatures."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Hashable, Mapping
from typing import Any, cast

import torch

from batch_infer.stacking.trees import BatchAxes, Path, UnstackableError, version_of

SCALARS = frozenset({"timestep", "timesteps", "t", "r", "timestep_r", "timestep_ratio", "guidance", "guidance_scale"})
"""Names of arguments that may be Python numbers, and differ between the rows of a batch."""


PLAIN = frozenset({type(None), bool, str, torch.dtype, torch.device})


class Signatures:
    """Computes signatures, and caches digests of tensors that all batch elements share, such as position ids.

    A digest copies a tensor to the host, so each tensor object is read once.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._digests: dict[int, tuple[weakref.ref[torch.Tensor], int, bytes]] = {}

    def of(
        self,
        arguments: Mapping[str, Any],
        axes: BatchAxes,
        *,
        free_lengths: bool = False,
        last_tensors: dict[str, tuple[Any, int, int]] | None = None,
    ) -> int:
        """Return a number that is equal for calls that differ only in the values of their batch elements.

        With `free_lengths`, the tensors of a list may differ in length. `last_tensors` contains the tensors of the
        row's last call of this network, most of which are the same at each step. Raises UnstackableError for arguments
        of unknown types, such as caches, which a network may modify.
        """
        last_tensors = {} if last_tensors is None else last_tensors
        parts: list[Hashable] = []
        for name, value in arguments.items():  # a loop, because it runs for each row and step
            if isinstance(value, torch.Tensor):
                tensor, version, number = last_tensors.get(name, (None, 0, 0))
                if tensor is not value or version != version_of(value):
                    number = self._number((name, self._tensor_key(value, axes.arguments.get((name,)))))
                    last_tensors[name] = value, version_of(value), number
                parts.append(number)
            else:
                parts.append((name, self._key(value, (name,), axes.arguments, free_lengths)))
        return self._number(tuple(parts))

    def _number(self, key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def content(self, arguments: Mapping[str, Any]) -> Hashable:
        """Return a key that is equal for calls with equal arguments. Raises UnstackableError as `of` does."""
        return self._key(arguments, (), None, False)

    def _key(self, value: Any, path: Path, axes: Mapping[Path, int] | None, free_lengths: bool) -> Hashable:
        """Return the key of a value. Without `axes`, it identifies the whole content."""
        if type(value) in PLAIN:
            return cast(Hashable, value)
        if isinstance(value, torch.Tensor):
            return self._digest(value) if axes is None else self._tensor_key(value, axes.get(path))
        if isinstance(value, (int, float)):
            return value if axes is None or path[-1] not in SCALARS else "number"
        if isinstance(value, torch.Generator):
            return "generator"  # decoders take one, but draw nothing
        if isinstance(value, Mapping):
            keys = ((key, self._key(part, (*path, key), axes, free_lengths)) for key, part in value.items())
            return type(value), tuple(keys)
        if axes is not None and isinstance(value, list) and path in axes:
            return _list_key(value, free_lengths)
        if isinstance(value, (list, tuple)):
            parts = (self._key(part, (*path, index), axes, free_lengths) for index, part in enumerate(value))
            return type(value), tuple(parts)
        raise UnstackableError

    def _tensor_key(self, value: torch.Tensor, axis: int | None) -> Hashable:
        if axis is not None:
            return "batch", value.shape[:axis], value.shape[axis + 1 :], value.dtype
        if value.numel() == 1 and value.ndim <= 1:
            return "scalar", value.dtype
        return "shared", self._digest(value)

    def _digest(self, value: torch.Tensor) -> bytes:
        key, version = id(value), version_of(value)
        entry = self._digests.get(key)
        if entry is not None and entry[0]() is value and entry[1] == version:
            return entry[2]
        content = value.detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy().data
        digest = hashlib.blake2b(content, digest_size=16, key=repr((value.shape, value.dtype)).encode()[:64]).digest()
        self._digests[key] = weakref.ref(value, lambda _: self._digests.pop(key, None)), version, digest
        return digest


def _list_key(values: list[Any], free_lengths: bool) -> Hashable:
    """Return the key of a list of batch elements."""
    first = values[0]
    if isinstance(first, torch.Generator):
        return "generators"
    if not isinstance(first, torch.Tensor):
        return "items", frozenset(map(repr, values))
    if free_lengths:
        return "list", first.dtype, first.shape[1:]
    return "list", first.dtype, frozenset(value.shape for value in values)
