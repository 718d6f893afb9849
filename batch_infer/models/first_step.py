"""Trial calls of a pipeline at load: whether texts of any length are computed alike, and all noise is a row's own."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batch_infer.errors import ModelError

TEXTS = ("a", "a red circle beside two blue squares")
"""Two texts of different lengths, neither too long for any model."""
DRAWS = {
    *("randn", "randn_like", "rand", "rand_like", "randint", "randint_like", "randperm", "normal", "normal_"),
    *("uniform_", "random_", "exponential_", "bernoulli", "bernoulli_", "multinomial"),
}
"""torch's operations that draw."""

Operation = tuple[str, tuple[tuple[int, ...], ...]]
"""What torch calls it, and the shapes of the tensors that go in and come out."""


def has_one_shape(pipeline: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a call with these arguments does the same operations on the same shapes whatever the text's length is.

    Only then can rows share a call without depending on each other. It is watched from its start to the end of the
    first step. Raises ModelError where it draws noise that no row's generator gives.
    """
    short, longer = (_watch(pipeline, {**arguments, "prompt": [text]}) for text in TEXTS)
    return short == longer


def take_first_step(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """Call a pipeline up to the end of its first step, or wholly where it has no scheduler."""
    generator = [torch.Generator("cpu").manual_seed(0)]
    with _first_step_alone(pipeline), suppress(_Left):
        pipeline(**{"prompt": [TEXTS[0]], **arguments}, generator=generator, output_type="np")


def make_cheap_image(pipeline: Any, denoiser: torch.nn.Module, arguments: Mapping[str, Any]) -> None:
    """Call a pipeline to its end, decoder included, with one denoiser evaluation for each shape of its inputs.

    Later evaluations return the first one's output, so that the call costs about one step and one decoded image.
    """
    generator = [torch.Generator("cpu").manual_seed(0)]
    outputs: dict[object, Any] = {}
    evaluate = denoiser.forward

    @functools.wraps(evaluate)  # pipelines look at what it takes
    def replay(*args: Any, **kwargs: Any) -> Any:
        key = tuple(tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        if key not in outputs:
            outputs[key] = evaluate(*args, **kwargs)
        return outputs[key]

    denoiser.forward = replay
    try:
        pipeline(**{"prompt": [TEXTS[0]], **arguments}, generator=generator, output_type="np")
    finally:
        del denoiser.forward


def _watch(pipeline: Any, arguments: Mapping[str, Any]) -> list[Operation]:
    watch = _Watch()
    with watch:
        take_first_step(pipeline, arguments)
    if watch.drawn:
        name = " with ".join(type(part).__name__ for part in (pipeline, getattr(pipeline, "scheduler", None)) if part)
        raise ModelError(
            f"{name} draws noise ({watch.drawn}) that no row's seed decides, so that no image could be made again; try "
            "another --scheduler"
        )
    return watch.seen


class _Left(BaseException):
    """Ends a call of which enough was seen; no pipeline catches it."""


@contextmanager
def _first_step_alone(pipeline: Any) -> Iterator[None]:
    """Have the pipeline's call end with _Left after its scheduler's first step, where it has one."""
    scheduler: Any = getattr(pipeline, "scheduler", None)
    if not hasattr(scheduler, "step"):
        yield
        return
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at what it takes
    def last(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        raise _Left

    scheduler.step = last
    try:
        yield
    finally:
        del scheduler.step


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operation that computes something, with the shapes of what goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Operation] = []
        self.drawn: str | None = None
        """An operation that drew from the generator that all share."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func.overloadpacket.__name__ in DRAWS and kwargs.get("generator") is None:
            self.drawn = func.overloadpacket.__name__
        # What gives whole numbers only counts: tokens, of which no more is seen than the texts' length, and places.
        if any(leaf.is_floating_point() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)):
            leaves = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, torch.Tensor)]
            self.seen.append((str(func), tuple(tuple(leaf.shape) for leaf in leaves)))
        return found
