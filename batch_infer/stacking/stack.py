"""Stack the arguments of several calls of a network to those of one call, and split its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from batch_infer.accelerator import copy_to
from batch_infer.stacking.signature import SCALARS
from batch_infer.stacking.trees import BatchAxes, Path, version_of


class ReusedTensors:
    """Keeps stacked tensors, such as embedded texts, for the next step of the same rows.

    The counter `_version` of a tensor increases when an operation changes it in place.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, tuple[Sequence[Any], Sequence[int], list[int], torch.Tensor]] = {}

    def get(self, name: str, values: Sequence[Any], counts: Sequence[int]) -> torch.Tensor | None:
        """Return the tensor that was stacked of the same values, unless one of them has changed."""
        if name not in self._tensors:
            return None
        parts, part_counts, versions, stacked = self._tensors[name]
        if values[0] is not parts[0] or len(values) != len(parts) or counts != part_counts:
            return None
        is_same = all(value is part for value, part in zip(values, parts, strict=True))
        return stacked if is_same and versions == [version_of(tensor) for tensor in (*values, stacked)] else None

    def put(self, name: str, values: Sequence[Any], counts: Sequence[int], stacked: Any) -> None:
        """Keep a stacked tensor, instead of the last one with this name. Ignore other values."""
        if isinstance(stacked, torch.Tensor):
            versions = [version_of(tensor) for tensor in (*values, stacked)]
            self._tensors[name] = values, counts, versions, stacked


class Stack:
    """A call with `size` batch elements, made of calls with equal signatures and `counts` batch elements.

    The rest is filled with copies of the last element, so that the shape is always the same.
    """

    def __init__(self, axes: BatchAxes, counts: Sequence[int], size: int, device: torch.device) -> None:
        self._axes, self._counts, self._size, self._device = axes, counts, size, device
        self._spare = size - sum(counts)
        self._starts = [0, *accumulate(counts)]

    def stack(self, calls: Sequence[Mapping[str, Any]], reused: ReusedTensors | None = None) -> dict[str, Any]:
        """Return the arguments of the call. `reused` contains the tensors of the network's last stack."""
        arguments: dict[str, Any] = {}
        for name in calls[0]:
            values = [call[name] for call in calls]
            stacked = reused.get(name, values, self._counts) if reused is not None else None
            if stacked is None:
                stacked = self._stack(values, (name,))
                if reused is not None:
                    reused.put(name, values, self._counts, stacked)
            arguments[name] = stacked
        return arguments

    def _stack(self, values: Sequence[Any], path: Path) -> Any:
        first = values[0]
        if isinstance(first, torch.Tensor):
            return self._stack_tensors(values, path)
        if isinstance(first, (int, float)) and not isinstance(first, bool) and path[-1] in SCALARS:
            numbers = [float(value) for value, count in zip(values, self._counts, strict=True) for _ in range(count)]
            return copy_to(self._device, torch.tensor(numbers + numbers[-1:] * self._spare))
        if isinstance(first, Mapping):
            return type(first)((key, self._stack([value[key] for value in values], (*path, key))) for key in first)  # type: ignore[call-arg]
        if isinstance(first, list) and path in self._axes.arguments:
            elements = [element for value in values for element in value]
            return elements + elements[-1:] * self._spare
        if isinstance(first, (list, tuple)):
            parts = zip(*values, strict=True)
            return type(first)(self._stack(part, (*path, index)) for index, part in enumerate(parts))
        return first

    def _stack_tensors(self, values: Sequence[torch.Tensor], path: Path) -> torch.Tensor:
        axis = self._axes.arguments.get(path)
        if axis is None:
            if values[0].numel() != 1 or values[0].ndim > 1:
                return values[0]
            axis, scalars = 0, zip(values, self._counts, strict=True)
            values = [value.reshape(1).expand(count) for value, count in scalars]
        filler = [values[-1].narrow(axis, -1, 1)] * self._spare
        stacked = torch.cat([*values, *filler], axis)
        # Schedulers keep their timesteps on the host. See copy_pipeline.
        return copy_to(self._device, stacked) if stacked.device.type == "cpu" else stacked

    def split(self, result: Any, index: int) -> Any:
        """Return the part of the result that belongs to a call."""
        return self._split(result, index, ())

    def _split(self, value: Any, index: int, path: Path) -> Any:
        start, count = self._starts[index], self._counts[index]
        if isinstance(value, torch.Tensor):
            axis = self._axes.results.get(path)
            return value if axis is None else value.narrow(axis, start, count)
        if isinstance(value, Mapping):
            parts = {key: self._split(part, index, (*path, key)) for key, part in value.items()}
            return parts if type(value) is dict else type(value)(**parts)
        if isinstance(value, list) and path in self._axes.results:
            return value[start : start + count]
        if isinstance(value, (list, tuple)):
            return type(value)(self._split(part, index, (*path, place)) for place, part in enumerate(value))
        return value
