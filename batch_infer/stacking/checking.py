"""Check that calls in a stack have the results of calls alone, up to the first step of each row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_pre_hook

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
FACTORS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Multiples of the recorded numbers of rows with which a layer is tried. Runs have more slots than trial calls."""
MAX_VALUES = 1 << 26
"""Maximum number of values in an input for these trials."""
LayerShapes = dict[torch.nn.Module, set[torch.Size]]
"""Shapes of the inputs of layers."""


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
        self.layer_shapes: dict[str, LayerShapes] = {}
        """Shapes of the inputs of layers in stacks, by network."""

    def stack(self, calls: Sequence[Call[Any]]) -> list[Any]:
        network = calls[0].network
        # The stack comes last, so that a network that stores something, such as attention maps, has stored it then.
        expected = [find_tensor(network.evaluate(call.arguments)) for call in calls]
        with _recorded_shapes(self.layer_shapes.setdefault(network.name, {})):
            results = super().stack(calls)
        for one, result in zip(expected, results, strict=True):
            if not _is_close(find_tensor(result), one):
                self.different.add(network.name)
        return results


@contextmanager
def _before_layers(action: Callable[[torch.nn.Module, torch.Tensor], None]) -> Iterator[None]:
    """Call a function with each linear or convolution layer and its input, before the layer computes."""

    def act(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, (torch.nn.Linear, _ConvNd)) and args:
            action(module, args[0])

    hook = register_module_forward_pre_hook(act)
    try:
        yield
    finally:
        hook.remove()


def _recorded_shapes(shapes: LayerShapes) -> AbstractContextManager[None]:
    return _before_layers(lambda layer, values: shapes.setdefault(layer, set()).add(values.shape))


def find_varying_layers(alone: LayerShapes, together: LayerShapes) -> LayerShapes:
    """Return the layers whose inputs have other shapes if a row is alone, with all shapes of these inputs.

    An example is an expert of a mixture, whose input contains those tokens of all rows that are routed to it.
    """
    return {
        layer: shapes | together.get(layer, set())
        for layer, shapes in alone.items()
        if not shapes <= together.get(layer, set())
    }


@torch.no_grad()
def depends_on_shape(network: Network, arguments: Mapping[str, Any], layers: LayerShapes) -> bool:
    """Return whether the bytes that a layer computes for a row of its input may depend on the number of rows.

    Libraries choose kernels by shape, so linear layers are tried with many numbers of rows. Convolutions, and layers
    that this call of the network does not reach, are assumed to depend on it.
    """
    untried = {layer for layer in layers if isinstance(layer, torch.nn.Linear)}
    independent: set[torch.nn.Module] = set()

    def try_counts(layer: torch.nn.Module, values: torch.Tensor) -> None:
        if layer not in untried:
            return
        untried.remove(layer)  # before the layer is called here
        if _has_equal_rows(layer, values, {shape[:-1].numel() for shape in layers[layer]}):
            independent.add(layer)
        else:
            untried.clear()

    with _before_layers(try_counts):
        network.evaluate(arguments)
    return independent != layers.keys()


def _has_equal_rows(layer: torch.nn.Module, values: torch.Tensor, counts: set[int]) -> bool:
    """Return whether a linear layer gives rows the same bytes for these numbers of rows and multiples of them."""
    width = values.shape[-1]
    counts = {factor * count for factor in FACTORS for count in counts if factor * count * width <= MAX_VALUES} | counts
    noise = torch.Generator(values.device).manual_seed(0)
    rows = torch.randn(max(counts), width, generator=noise, device=values.device, dtype=values.dtype)
    expected = layer(rows)
    return all(torch.equal(layer(rows[:count]), expected[:count]) for count in counts)


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
