"""Walk nested arguments and results of networks, and find the axes that count batch elements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Path = tuple[Any, ...]
"""Keys and indices that lead from the arguments or the result of a call to a value inside."""


class UnstackableError(ValueError):
    """A call that cannot be stacked with others. It runs unchanged."""


@dataclass(frozen=True, slots=True)
class BatchAxes:
    """The batch axes of a network's arguments and results, by path. For a list of batch elements, the axis is 0.

    Values without an axis are the same for all batch elements.
    """

    arguments: dict[Path, int] = field(default_factory=dict)
    results: dict[Path, int] = field(default_factory=dict)

    def merge(self, other: BatchAxes) -> bool:
        """Add the axes of other calls of the same network. Returns False if they contradict each other."""
        for mine, others in ((self.arguments, other.arguments), (self.results, other.results)):
            if any(mine.setdefault(path, axis) != axis for path, axis in others.items()):
                return False
        return True

    def count_elements(self, arguments: Mapping[str, Any]) -> int:
        """Return the number of batch elements of a call. Raises UnstackableError if its arguments contradict."""
        counts = set()
        for path, axis in self.arguments.items():
            try:
                value: Any = arguments
                for key in path:
                    value = value[key]
            except (KeyError, IndexError, TypeError):
                continue  # an optional argument
            if isinstance(value, torch.Tensor):
                counts.add(value.shape[axis] if axis < value.ndim else 0)
            elif isinstance(value, list):
                counts.add(len(value))
        if len(counts) != 1 or 0 in counts:
            raise UnstackableError
        return int(counts.pop())


def version_of(value: Any) -> int:
    """Return the number of times that operations have changed a tensor in place, or -1 if it is not counted."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else -1


def find_axes(one: Any, two: Any, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Yield the paths and axes that are twice as long in `two`, the same values for twice as many batch elements.

    The batch axis is not always the first: HiDream's language model embeddings have it second.
    """
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.ndim == two.ndim:
            doubled = [axis for axis in range(one.ndim) if two.shape[axis] == 2 * one.shape[axis] > 0]
            if len(doubled) == 1:
                yield path, doubled[0]
    elif isinstance(one, Mapping) and isinstance(two, Mapping):
        for key in one.keys() & two.keys():
            yield from find_axes(one[key], two[key], (*path, key))
    elif isinstance(one, list) and isinstance(two, list) and len(two) == 2 * len(one) > 0:
        yield path, 0
    elif isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        for index, (first, second) in enumerate(zip(one, two, strict=False)):
            yield from find_axes(first, second, (*path, index))


def count_bytes(value: Any) -> int:
    """Return the bytes of all tensors inside a value."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(count_bytes, value.values()))
    return sum(map(count_bytes, value)) if isinstance(value, (list, tuple)) else 0


def clone_tensors(value: Any) -> Any:
    """Return a copy of a result with cloned tensors. Objects of unknown types, such as key-value caches, become None.

    A view would keep the memory of a whole batch alive.
    """
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        parts = {key: clone_tensors(part) for key, part in value.items()}
        return parts if type(value) is dict else type(value)(**parts)
    if isinstance(value, (list, tuple)):
        return type(value)(map(clone_tensors, value))
    return value if isinstance(value, (bool, int, float, str)) else None


def list_shapes(value: Any) -> tuple[Any, ...]:
    """Return the shapes of all tensors inside a value."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape),)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return tuple(shape for part in parts for shape in list_shapes(part))


def find_tensor(value: Any) -> torch.Tensor:
    """Return the first tensor inside a result. Raises UnstackableError if there is none."""
    if isinstance(value, torch.Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    for part in parts:
        try:
            return find_tensor(part)
        except UnstackableError:
            continue
    raise UnstackableError
