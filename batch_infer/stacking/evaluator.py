"""Make the calls of networks, alone or stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from batch_infer.stacking.cache import EncoderCache
from batch_infer.stacking.networks import Kind, Network
from batch_infer.stacking.padding import take_one
from batch_infer.stacking.plan import StackingPlan
from batch_infer.stacking.rows import Call, autocast
from batch_infer.stacking.stack import ReusedTensors, Stack
from batch_infer.stacking.trees import clone_tensors

Observer = Callable[[Kind], AbstractContextManager[object]]
"""Returns a context manager for the duration of a network call."""


class CallEvaluator:
    """Makes calls with equal signatures as one call, whose number of batch elements is fixed."""

    def __init__(self, plan: StackingPlan, sizes: Mapping[Kind, int], observe: Observer, cache: EncoderCache) -> None:
        """`sizes`: batch elements of a stack, by kind of network. `cache`: results of text encoders."""
        self.plan, self.sizes, self.cache = plan, sizes, cache
        self._observe = observe
        self._reused = {network.name: ReusedTensors() for network in plan.networks if network.kind == "denoise"}
        self.last_used, self.last_size = 0, 0
        """Batch elements of rows in the last denoiser call, and its size."""

    def evaluate(self, calls: Sequence[Call[Any]]) -> Iterable[Any]:
        """Make calls that share a group, and return the result of each."""
        network, first = calls[0].network, calls[0]
        with self._observe(network.kind), autocast(first.autocast):
            if first.signature is None:
                self._count(network, first.elements, first.elements)
                return [network.evaluate(first.arguments)]
            return self._encode(calls) if network.kind == "encode" else self.stack(calls)

    def stack(self, calls: Sequence[Call[Any]]) -> list[Any]:
        """Make calls with equal signatures as one, and return the result of each."""
        network = calls[0].network
        self._count(network, count_elements(calls), self.sizes[network.kind])
        stack, arguments = self._prepare(calls)
        result = network.evaluate(arguments)
        return [stack.split(result, index) for index in range(len(calls))]

    def prepare(self, calls: Sequence[Call[Any]]) -> Callable[[], object]:
        """Return a function that makes calls that share a group as one."""
        arguments = calls[0].arguments if calls[0].signature is None else self._prepare(calls)[1]

        @torch.no_grad()
        def make() -> Any:
            with autocast(calls[0].autocast):
                return calls[0].network.evaluate(arguments)

        return make

    def release(self) -> None:
        """Drop the tensors that are kept for the next call."""
        self._reused.clear()

    def _prepare(self, calls: Sequence[Call[Any]]) -> tuple[Stack, dict[str, Any]]:
        network = calls[0].network
        axes, texts = self.plan.axes[network.name], self.plan.stand_ins.get(network.name, ())
        # The rest of a stand-in, such as latents of the right size, comes from the first call.
        stand_ins = [{**take_one(axes, calls[0].arguments), **text} for text in texts]
        counts = (*(call.elements for call in calls), *[1] * len(stand_ins))
        stack = Stack(axes, counts, self.sizes[network.kind] + len(stand_ins), network.device)
        arguments = [*(call.arguments for call in calls), *stand_ins]
        return stack, stack.stack(arguments, self._reused.get(network.name))

    def _encode(self, calls: Sequence[Call[Any]]) -> Iterable[Any]:
        """Make a stack of the calls with different texts, and cache the results.

        Each row gets a copy, because some pipelines modify embeddings in place. It is made when it is needed, since a
        result, which may have the states of all layers, can be hundreds of megabytes.
        """
        distinct = {call.content: call for call in calls}
        stacked = self.stack(list(distinct.values()))
        results = {content: clone_tensors(result) for content, result in zip(distinct, stacked, strict=True)}
        for content, result in results.items():
            self.cache.put(content, result)
        return (clone_tensors(results[call.content]) for call in calls)

    def _count(self, network: Network, used: int, size: int) -> None:
        if network.kind == "denoise":
            self.last_used, self.last_size = used, size


def count_elements(calls: Iterable[Call[Any]]) -> int:
    """Return the batch elements of all calls."""
    return sum(call.elements for call in calls)
