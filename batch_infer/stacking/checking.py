"""Check that calls in a stack have the results of calls alone, up to the first step of each row."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from batch_infer.stacking.evaluator import CallEvaluator
from batch_infer.stacking.networks import Network, copy_pipeline, has_nested_pipelines
from batch_infer.stacking.plan import StackingPlan
from batch_infer.stacking.rows import Call
from batch_infer.stacking.stack import Stack
from batch_infer.stacking.stacker import CallStacker
from batch_infer.stacking.trees import UnstackableError, find_tensor

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Maximum difference, relative to the largest value, between a result in a stack and that of the call itself."""
HALF_TOLERANCE = 0.05


class _FirstStepDone(RuntimeError):
    """Ends a row after its scheduler's first step."""

    def __init__(self, sample: torch.Tensor) -> None:
        super().__init__("the first step is done")
        self.sample = sample


class CheckingStacker(CallStacker[int]):
    """Ends rows after their first step, unless the pipeline has several stages."""

    def _copy_pipeline(self) -> Any:
        row_pipeline = super()._copy_pipeline()
        if not has_nested_pipelines(row_pipeline) and hasattr(getattr(row_pipeline, "scheduler", None), "step"):
            _end_after_first_step(row_pipeline.scheduler)
        return row_pipeline


class CheckingEvaluator(CallEvaluator):
    """Compares each result of a stack with that of the call itself."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.different: set[str] = set()
        """Names of the networks whose results differ."""

    def stack(self, calls: Sequence[Call[Any]]) -> list[Any]:
        network = calls[0].network
        # The stack comes last, so that a network that stores something, such as attention maps, has stored it then.
        expected = [find_tensor(network.evaluate(call.arguments)) for call in calls]
        results = super().stack(calls)
        for one, result in zip(expected, results, strict=True):
            if not _is_close(find_tensor(result), one):
                self.different.add(network.name)
        return results


def take_first_step(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """Call a pipeline until the end of its scheduler's first step, or completely if it has no scheduler."""
    row_pipeline = copy_pipeline(pipeline, pipeline._execution_device, host_timesteps=False)
    if hasattr(getattr(row_pipeline, "scheduler", None), "step"):
        _end_after_first_step(row_pipeline.scheduler)
    with suppress(_FirstStepDone):
        row_pipeline(**arguments)


def _end_after_first_step(scheduler: Any) -> None:
    """Make a scheduler raise _FirstStepDone after its first step."""
    step = scheduler.step

    @functools.wraps(step)
    def step_once(*args: Any, **kwargs: Any) -> None:
        output = step(*args, **kwargs)
        raise _FirstStepDone(output[0])

    scheduler.step = step_once


def sample_of(result: Any, error: Exception | None) -> torch.Tensor:
    if isinstance(error, _FirstStepDone):
        return error.sample
    if error is not None:
        raise error
    images = result.images if hasattr(result, "images") else result[0]
    return images if isinstance(images, torch.Tensor) else torch.as_tensor(images)


def replace_latents(value: Any, generator: torch.Generator) -> Any:
    """Return other values of the same shape for latents, and everything else unchanged."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return torch.randn(value.shape, generator=generator).to(value)


def is_separate(plan: StackingPlan, network: Network, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether a network computes a call in a stack as it does alone, and independently of the other call."""
    axes = plan.axes[network.name]
    try:
        count = axes.count_elements(one)
    except UnstackableError:
        return False
    expected = find_tensor(network.evaluate(one))
    alone = Stack(axes, [count], 2 * count, network.device)
    pair = Stack(axes, [count, count], 2 * count, network.device)
    first = find_tensor(alone.split(network.evaluate(alone.stack([one])), 0))
    second = find_tensor(pair.split(network.evaluate(pair.stack([other, one])), 1))
    return _is_close(first, expected) and torch.equal(first, second)


def _is_close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    tolerance = TOLERANCES.get(expected.dtype, HALF_TOLERANCE)
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())
