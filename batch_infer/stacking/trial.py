"""Try out whether the network calls of a pipeline can be stacked, and decide how."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from batch_infer.accelerator import is_device_error, out_of_memory_errors
from batch_infer.errors import first_line
from batch_infer.stacking.cache import EncoderCache
from batch_infer.stacking.checking import (
    CheckingEvaluator,
    CheckingStacker,
    LayerShapes,
    depends_on_shape,
    find_varying_layers,
    is_separate,
    replace_latents,
    sample_of,
)
from batch_infer.stacking.networks import Kind, copy_pipeline, find_networks
from batch_infer.stacking.padding import find_padding, make_stand_ins, takes_text_list
from batch_infer.stacking.plan import StackingPlan
from batch_infer.stacking.recording import RecordedCall, compare_calls, first_calls, pair_calls, record_pipeline
from batch_infer.stacking.stacker import ENCODE_BATCH, ROW_ERRORS

SHORT_TEXT = "a"
LONG_TEXT = "a red circle beside two blue squares, " * 100
"""A text that text encoders truncate to their maximum length."""
OTHER_TEXT = "two stars over a house"
MakeArguments = Callable[[Sequence[str], bool], Mapping[str, Any]]
"""Returns the arguments of a pipeline call for prompts, with or without guidance, and new generators."""


def make_stacking_plan(pipeline: Any, *candidates: MakeArguments) -> StackingPlan:
    """Return how the calls of a pipeline's networks can be stacked. Raises errors of the device.

    The pipeline is called with short and long texts, with and without guidance, and with the arguments of the first
    candidate that it supports. Calls are stacked only if, at the first step, each row gets the result of its own call,
    and the same bytes alone and among other rows.
    """
    networks = find_networks(pipeline)
    plan = StackingPlan(networks, is_alone=True)
    # A pipeline may compute with timesteps, which must then be on its device.
    for host_timesteps in (True, False) if pipeline._execution_device.type == "cuda" else (False,):
        plan = _try_plan(pipeline, candidates, StackingPlan(networks, host_timesteps=host_timesteps))
        if not plan.is_alone:
            break
    return plan


def _try_plan(pipeline: Any, candidates: Iterable[MakeArguments], plan: StackingPlan) -> StackingPlan:
    reason = ""
    for make_arguments in candidates:
        trial: _Trial | None = None
        try:
            with out_of_memory_errors():
                trial = _Trial(pipeline, make_arguments, plan)
                return trial.run()
        except ROW_ERRORS as error:
            if is_device_error(error):
                raise
            reason = first_line(error)
        if trial is not None:
            return run_alone(plan, f"a call with the elements of several rows fails ({reason})")
    return run_alone(plan, f"a trial call fails ({reason})")


def run_alone(plan: StackingPlan, *reasons: str) -> StackingPlan:
    """Return a plan that stacks nothing, so that each row runs as if it were alone."""
    return StackingPlan(plan.networks, host_timesteps=plan.host_timesteps, is_alone=True, reasons=reasons)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """First samples of rows, the number of denoiser calls, and how the networks computed.

    `different` contains the networks whose results differed in a stack. `layer_shapes` has the shapes of the inputs of
    layers in stacks, by network.
    """

    samples: list[torch.Tensor]
    ticks: int
    different: frozenset[str]
    layer_shapes: Mapping[str, LayerShapes]


class _Trial:
    def __init__(self, pipeline: Any, make_arguments: MakeArguments, plan: StackingPlan) -> None:
        self._pipeline, self._make_arguments = pipeline, make_arguments
        self._plan = plan
        self._recorded = {guided: self._record([SHORT_TEXT], guided) for guided in (True, False)}
        # Some components are networks that no call evaluates, such as the image normalizer of StableUnCLIPPipeline.
        called = {call.network.name for calls in self._recorded.values() for call in calls}
        networks = tuple(network for network in plan.networks if network.name in called)
        self._plan = replace(self._plan, networks=networks)
        self._elements = 1

    def run(self) -> StackingPlan:
        plan, reasons = replace(self._plan, axes=self._find_axes()), list[str]()
        self._elements = self._count_elements(plan)
        if not plan.axes:
            return run_alone(plan, "its networks do not take the prompts of several rows")
        if not self._have_equal_lengths(plan):
            plan, reason = self._fix_lengths(plan)
            reasons += [reason] if reason else []
        plan = self._drop(plan, self._check_decoders(plan), reasons)
        plan, is_independent = self._drop_different(plan, reasons)
        if not is_independent:  # perhaps because a network computes only as long as the longest text of a batch
            plan, is_independent = self._drop_different(self._add_stand_ins(plan), reasons)
        if not is_independent:
            reasons.append("a row depends on other rows in the batch")
        denoisers = {network.name for network in plan.networks if network.kind == "denoise"}
        if not is_independent or not denoisers & plan.axes.keys():
            return run_alone(plan, *reasons)
        return replace(plan, reasons=tuple(reasons))

    def _drop_different(self, plan: StackingPlan, reasons: list[str]) -> tuple[StackingPlan, bool]:
        """Return a plan that does not stack networks whose results differ, and whether rows are then independent."""
        is_independent = False
        for _ in range(2):
            different, is_independent = self._check_rows(functools.partial(self._render, plan))
            if not different:
                break
            plan = self._drop(plan, different, reasons)
        return plan, is_independent

    def _record(self, prompts: Sequence[str], guided: bool) -> list[RecordedCall]:
        row_pipeline = copy_pipeline(self._pipeline, self._plan.device, host_timesteps=self._plan.host_timesteps)
        return record_pipeline(row_pipeline, self._plan.networks, self._make_arguments(prompts, guided))

    def _find_axes(self) -> dict[str, Any]:
        """Return the batch axes of networks, as far as calls with and without guidance agree."""
        axes: dict[str, Any] = {}
        for guided, once in self._recorded.items():
            by_network = compare_calls(once, self._record([SHORT_TEXT, SHORT_TEXT], guided))
            for name in {call.network.name for call in once}:
                other = axes.get(name)
                if name not in by_network:
                    axes[name] = None
                elif name not in axes:
                    axes[name] = by_network[name]
                elif other is not None and not other.merge(by_network[name]):
                    axes[name] = None
        return {name: value for name, value in axes.items() if value is not None}

    def _count_elements(self, plan: StackingPlan) -> int:
        """Return the largest number of batch elements of a row's denoiser call."""
        calls = self._recorded[True] + self._recorded[False]
        counts = (plan.count_elements(call.network, call.arguments) for call in calls if call.network.kind == "denoise")
        return max(counts, default=1)

    # Texts of different lengths

    def _have_equal_lengths(self, plan: StackingPlan) -> bool:
        """Return whether rows with a short and a long text share every denoiser call."""
        alone = self._render(plan, [(SHORT_TEXT, True)]).ticks
        return self._render(plan, [(SHORT_TEXT, True), (LONG_TEXT, True)]).ticks == alone

    def _fix_lengths(self, plan: StackingPlan) -> tuple[StackingPlan, str]:
        """Return a plan in which texts of all lengths share calls, or one without calls of those denoisers."""
        pairs = pair_calls(self._recorded[True], self._record([LONG_TEXT], True))
        for network in plan.networks:
            name = network.name
            if network.kind != "denoise" or name not in plan.axes or name not in pairs:
                continue
            one, other = pairs[name]
            padding = find_padding(network, one, other)
            if padding is not None:
                masked = plan.axes[name]
                if padding.mask is not None:
                    masked = replace(masked, arguments={**masked.arguments, (padding.mask,): 0})
                plan = replace(plan, axes={**plan.axes, name: masked}, paddings={**plan.paddings, name: padding})
            elif takes_text_list(plan.axes[name], one, other):
                stand_ins = make_stand_ins(plan.axes[name], one, other)
                plan = replace(plan, stand_ins={**plan.stand_ins, name: stand_ins})
        if self._have_equal_lengths(plan):
            return plan, ""
        denoisers = {network.name for network in plan.networks if network.kind == "denoise"}
        axes = {name: value for name, value in plan.axes.items() if name not in denoisers}
        return replace(plan, axes=axes, paddings={}, stand_ins={}), "it takes texts of different lengths without a mask"

    def _add_stand_ins(self, plan: StackingPlan) -> StackingPlan:
        """Return a plan in which the shortest and the longest text are part of every denoiser call."""
        short, long = first_calls(self._recorded[True]), first_calls(self._record([LONG_TEXT], True))
        stand_ins = dict(plan.stand_ins)
        for network in plan.networks:
            name = network.name
            if network.kind == "denoise" and name in plan.axes and name in short and name not in stand_ins:
                padding = plan.paddings.get(name)
                calls = [call[name].arguments for call in (long, short)]
                padded = [padding.pad(arguments) if padding else arguments for arguments in calls]
                stand_ins[name] = make_stand_ins(plan.axes[name], padded[1], padded[0])
        return replace(plan, stand_ins=stand_ins)

    # Checks

    def _check_rows(self, render: Callable[..., _Outcome]) -> tuple[frozenset[str], bool]:
        """Return the networks whose results differ in a stack, and whether rows get the same bytes among others."""
        short, long, other = (SHORT_TEXT, True), (LONG_TEXT, True), (OTHER_TEXT, False)
        different: frozenset[str] = frozenset()
        is_independent = True
        for row, neighbour in ((short, long), (long, short), (other, short)):
            alone, together = render([row]), render([neighbour, row])
            different |= alone.different | together.different
            is_independent = (
                is_independent
                and torch.equal(alone.samples[0], together.samples[1])
                and not self._depends_on_shape(alone.layer_shapes, together.layer_shapes)
            )
        return different, is_independent

    def _depends_on_shape(self, alone: Mapping[str, LayerShapes], together: Mapping[str, LayerShapes]) -> bool:
        """Return whether equal bytes would be a coincidence, because neighbours change the shapes inside a network."""
        calls = first_calls(self._recorded[False]) | first_calls(self._recorded[True])
        for name, shapes in alone.items():
            layers = find_varying_layers(shapes, together.get(name, {}))
            if layers and depends_on_shape(calls[name].network, calls[name].arguments, layers):
                return True
        return False

    def _render(self, plan: StackingPlan, rows: Sequence[tuple[str, bool]]) -> _Outcome:
        """Render rows together up to the first step, or completely if the pipeline has several stages."""
        sizes: dict[Kind, int] = {"encode": ENCODE_BATCH, "denoise": 2 * self._elements, "decode": 2}
        evaluator = CheckingEvaluator(plan, sizes, lambda kind: nullcontext(), EncoderCache())
        stacker = CheckingStacker(self._pipeline, evaluator)
        ended: dict[int, torch.Tensor] = {}
        ticks = 0
        try:
            stacker.start([(index, self._make_arguments([text], guided)) for index, (text, guided) in enumerate(rows)])
            while stacker.has_rows:
                stacker.admit()
                if stacker.is_denoising:
                    stacker.tick()
                    ticks += 1
                else:
                    stacker.finish_decoding()
                ended |= {row.tag: sample_of(row.result, row.error) for row in stacker.take_ended()}
            ended |= {row.tag: sample_of(row.result, row.error) for row in stacker.take_ended()}
        finally:
            stacker.close()
        samples = [ended[index] for index in range(len(rows))]
        return _Outcome(samples, ticks, frozenset(evaluator.different), evaluator.layer_shapes)

    @torch.no_grad()
    def _check_decoders(self, plan: StackingPlan) -> frozenset[str]:
        """Return the decoders that do not treat the images of a stack separately."""
        different = set()
        for name, call in first_calls(self._recorded[True]).items():
            if call.network.kind == "decode" and name in plan.axes:
                noise = torch.Generator("cpu").manual_seed(0)
                values = {key: replace_latents(value, noise) for key, value in call.arguments.items()}
                if not is_separate(plan, call.network, call.arguments, values):
                    different.add(name)
        return frozenset(different)

    @staticmethod
    def _drop(plan: StackingPlan, names: frozenset[str], reasons: list[str]) -> StackingPlan:
        """Return a plan that does not stack the calls of these networks."""
        reasons += [f"{name} does not compute the rows of a batch separately" for name in sorted(names)]
        return replace(plan, axes={name: axes for name, axes in plan.axes.items() if name not in names})
