"""Helpers for tests that stack the network calls of rows."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from batch_infer.models import AnyPipeline
from batch_infer.records import PromptRequest
from batch_infer.stacking import ENCODE_BATCH, CallEvaluator, CallStacker, EncoderCache, EndedRow


@contextmanager
def open_stacker(model: AnyPipeline, slots: int = 8, decode: int = 2) -> Iterator[CallStacker[str]]:
    """Open a stacker with its own cache of encoder results."""
    sizes: Any = {"encode": ENCODE_BATCH, "denoise": slots, "decode": decode}
    stacker: CallStacker[str] = CallStacker(
        model.pipeline, CallEvaluator(model.plan, sizes, lambda _: nullcontext(), EncoderCache())
    )
    try:
        yield stacker
    finally:
        stacker.close()


def start(stacker: CallStacker[str], model: AnyPipeline, rows: Sequence[PromptRequest]) -> None:
    stacker.start([(row.id, model.make_arguments(row)) for row in rows])
    stacker.admit()


def run_to_the_end(stacker: CallStacker[str]) -> dict[str, EndedRow[str]]:
    ended: list[EndedRow[str]] = []
    while stacker.has_rows:
        stacker.admit()
        if stacker.is_denoising:
            stacker.tick()
        else:
            stacker.finish_decoding()
    ended += stacker.take_ended()
    return {row.tag: row for row in ended}


def run(model: AnyPipeline, rows: Sequence[PromptRequest], slots: int = 8) -> dict[str, EndedRow[str]]:
    """Run rows together, or one after the other if the plan demands it."""
    groups = [[row] for row in rows] if model.plan.is_alone else [rows]
    ended: dict[str, EndedRow[str]] = {}
    with open_stacker(model, slots) as stacker:
        for group in groups:
            start(stacker, model, group)
            ended |= run_to_the_end(stacker)
    return ended


def image_of(row: EndedRow[str]) -> torch.Tensor:
    assert row.error is None, row.error
    image: torch.Tensor = row.result.images
    return image


def assert_restored(model: AnyPipeline) -> None:
    for network in model.plan.networks:
        assert network.method not in vars(network.module)
        assert isinstance(getattr(network.module, network.method), types.MethodType)
