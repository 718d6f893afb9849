"""Record the network calls of a pipeline call, to find their batch axes and to count them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from batch_infer.stacking.networks import Network
from batch_infer.stacking.trees import BatchAxes, Path, find_axes, list_shapes


@dataclass(frozen=True, slots=True)
class RecordedCall:
    network: Network
    arguments: Mapping[str, Any]
    result: Any


@contextmanager
def recording(networks: Sequence[Network], results_by_shape: dict[object, Any] | None) -> Iterator[list[RecordedCall]]:
    """Record calls. See `record_pipeline`."""
    calls: list[RecordedCall] = []
    results = {} if results_by_shape is None else results_by_shape

    def replace(network: Network, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        key = network.name, list_shapes(arguments)
        is_reused = network.kind == "denoise" or results_by_shape is not None
        result = results.get(key) if is_reused else None
        if result is None:
            result = original(**network.to_device(arguments))
        if is_reused:
            results[key] = result
        calls.append(RecordedCall(network, arguments, result))
        return result

    with ExitStack() as replacements:
        for network in networks:
            replacements.enter_context(network.replaced(_bind(replace, network)))
        yield calls


def _bind(function: Callable[..., Any], network: Network) -> Callable[[Callable[..., Any], dict[str, Any]], Any]:
    return lambda original, arguments: function(network, original, arguments)


def compare_calls(once: Sequence[RecordedCall], twice: Sequence[RecordedCall]) -> dict[str, BatchAxes]:
    """Return the batch axes by network, from the calls for one prompt and for two equal prompts.

    A network that is called for each prompt separately, or whose axes differ between its calls, gets none.
    """
    axes: dict[str, BatchAxes] = {}
    for name in {call.network.name for call in once}:
        ones, twos = ([call for call in calls if call.network.name == name] for calls in (once, twice))
        common = _compare(ones, twos) if len(ones) == len(twos) else None
        if common is not None and common.arguments and common.results:
            axes[name] = common
    return axes


def _compare(ones: Sequence[RecordedCall], twos: Sequence[RecordedCall]) -> BatchAxes | None:
    arguments: dict[Path, int] = {}
    results: dict[Path, int] = {}
    for one, two in zip(ones, twos, strict=True):
        for axes, first, second in (
            (arguments, one.arguments, two.arguments),
            (results, one.result, two.result),
        ):
            for path, axis in find_axes(first, second):
                if axes.setdefault(path, axis) != axis:
                    return None
    return BatchAxes(arguments, results)


def first_calls(calls: Sequence[RecordedCall]) -> dict[str, RecordedCall]:
    """Return the first call of each network."""
    return {call.network.name: call for call in reversed(calls)}


def pair_calls(
    short: Sequence[RecordedCall], long: Sequence[RecordedCall]
) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return, by network, the arguments of its first calls for two texts in which shapes differ.

    With guidance in separate calls, the calls for the negative prompt are equal.
    """
    pairs: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for name in {call.network.name for call in short}:
        ones, others = ([call.arguments for call in calls if call.network.name == name] for calls in (short, long))
        different = (pair for pair in zip(ones, others, strict=False) if list_shapes(pair[0]) != list_shapes(pair[1]))
        if (pair := next(different, None)) is not None:
            pairs[name] = pair
    return pairs


@torch.no_grad()
def record_pipeline(
    pipeline: Any,
    networks: Sequence[Network],
    arguments: Mapping[str, Any],
    results_by_shape: dict[object, Any] | None = None,
) -> list[RecordedCall]:
    """Call a pipeline and return its network calls.

    A denoiser is evaluated once for each shape of its arguments, and its result is reused, so that the call takes about
    as long as one step. With `results_by_shape`, which collects results by network and shapes, so is every network.
    """
    with recording(networks, results_by_shape) as calls:
        pipeline(**arguments)
    return calls
