"""Render the rows with batch-infer's chain, or with the diffusers pipeline as a script would call it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from batch_infer.accelerator import out_of_memory_errors
from batch_infer.bench.probe import make_probe
from batch_infer.bench.workload import size_name, size_of
from batch_infer.chain import UnrenderedRow
from batch_infer.errors import ModelError
from batch_infer.planning import order_requests
from batch_infer.records import PromptRequest
from batch_infer.settings import Compute
from batch_infer.worker import make_chain

if TYPE_CHECKING:
    from batch_infer.models import AnyPipeline, LatentDiffusion

Model: TypeAlias = "LatentDiffusion | AnyPipeline"
RowImage = tuple[PromptRequest, np.ndarray]
"""A row and its pixels (H, W, 3) uint8 on the host."""


class BatchInfer:
    """Renders with the chain and row order of a run."""

    def __init__(self, model: Model, compute: Compute) -> None:
        self._model = model
        self.chain = make_chain(model, compute)

    def capacity(self, row: PromptRequest) -> int:
        """Return the number of rows with this row's size and guidance that fit into a batch."""
        return self.chain.batch_sizes.for_size(size_of(row))[0] // row.params.slots

    def render(self, rows: Sequence[PromptRequest]) -> Iterator[RowImage]:
        """Yield each image once its pixels are on the host. Raises ModelError if a row has no image.

        Prompts of earlier renderings are encoded again, as the pipeline does.
        """
        self._model.clear_embeddings()
        self.chain.stages_by_size.clear()
        for outcome in self.chain.render(order_requests(rows, lambda size: self.chain.batch_sizes.for_size(size)[0])):
            if isinstance(outcome, UnrenderedRow):
                raise ModelError(f"a row of {outcome.request.params} has no image: {outcome.error}")
            yield outcome.request, outcome.pixels

    def details(self) -> Mapping[str, Any]:
        """Return more figures of the last rendering, as --json prints them."""
        stages = self.chain.stages
        shapes = {size_name(size): self.chain.batch_sizes.for_size(size) for size in self.chain.stages_by_size}
        return {
            "ticks": stages.ticks,
            "row_forwards": stages.row_forwards,
            "slot_ticks": stages.slot_ticks,
            "occupancy": round(stages.occupancy, 4),
            "stage_shares": stages.shares,
            "slots": {name: slots for name, (slots, _) in shapes.items()},
            "decode_batch": {name: decode for name, (_, decode) in shapes.items()},
        }


class PlainDiffusers:
    """Renders with the diffusers pipeline on the same networks, with one generator per row and no safety checker.

    By default, it calls the networks uncompiled, but with their other GPU optimisations (channels last, fused
    projections). With `compiled`, it calls the compiled networks, and pads batches so that torch.compile does not
    compile for every number of rows.
    """

    def __init__(self, model: Model, compute: Compute, *, grouped: bool, compiled: bool = False) -> None:
        self._networks, self._compute = model.networks, compute
        self._grouped, self._compiled = grouped, compiled
        self._probe = make_probe(model)
        self.decodes_singly = False
        """Whether images are decoded one by one because a batch ran out of memory."""

    def capacity(self, row: PromptRequest) -> int:
        return self._compute.shape_of(*size_of(row)).slots // row.params.slots if self._grouped else 1

    def render(self, rows: Sequence[PromptRequest]) -> Iterator[RowImage]:
        with nullcontext() if self._compiled else _without_compilation(self._networks):
            for batch in self._batches(rows):
                padding = [batch[-1]] * (self.capacity(batch[0]) - len(batch)) if self._compiled else []
                yield from zip(batch, self._call(batch + padding), strict=False)

    def details(self) -> Mapping[str, Any]:
        return {"vae_slicing": self.decodes_singly}

    def _batches(self, rows: Sequence[PromptRequest]) -> Iterator[list[PromptRequest]]:
        """Yield batches of rows with equal parameters that fit into the slots, or single rows if not grouped."""
        if not self._grouped:
            yield from ([row] for row in rows)
            return
        for _, group in groupby(sorted(rows, key=_group_key), _group_key):
            group_rows = list(group)
            limit = self.capacity(group_rows[0])
            yield from (group_rows[start : start + limit] for start in range(0, len(group_rows), limit))

    def _call(self, batch: list[PromptRequest]) -> np.ndarray:
        try:
            with out_of_memory_errors():
                return self._render(batch)
        except torch.OutOfMemoryError:
            if self.decodes_singly or not hasattr(getattr(self._probe.pipeline, "vae", None), "use_slicing"):
                raise
        # Retry outside the except block, where the traceback would keep tensors alive.
        self.decodes_singly = True
        return self._render(batch)

    def _render(self, batch: list[PromptRequest]) -> np.ndarray:
        with _decoding_singly(self._probe.pipeline.vae) if self.decodes_singly else nullcontext():
            return self._probe.call_pipeline(batch)


Renderer: TypeAlias = BatchInfer | PlainDiffusers


def _group_key(row: PromptRequest) -> tuple[float, ...]:
    params = row.params
    return params.height, params.width, params.num_inference_steps, params.guidance_scale


@contextmanager
def _without_compilation(networks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Use the networks' original forward methods instead of the compiled ones inside the context."""
    replaced = [(network, network.__dict__.pop("forward")) for network in networks if "forward" in vars(network)]
    try:
        yield
    finally:
        for network, forward in replaced:
            network.forward = forward


@contextmanager
def _decoding_singly(vae: Any) -> Iterator[None]:
    """Decode one image per call inside the context only, because other contenders share the decoder."""
    previous, vae.use_slicing = vae.use_slicing, True
    try:
        yield
    finally:
        vae.use_slicing = previous
