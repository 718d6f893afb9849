"""Check that rendering continues with smaller batches after out-of-memory errors.

The images must equal those of a rendering that starts with these batches.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from batch_infer.accelerator import MEMORY_FRACTION
from batch_infer.bench.subject import Subject, load_subject
from batch_infer.chain import BatchSizes, RenderedImage, StepLevelChain
from tools.gpu_check import subjects
from tools.gpu_check.measure import count_equal

if TYPE_CHECKING:
    from tools.gpu_check.recorder import Recorder

GIB = 2**30
TOO_MANY_SLOTS = 4096
ROOM_FOR_THE_DECODER = 5 * GIB
"""Bytes that suffice for UNet calls with 16 slots, but not to decode 16 images of 512x512 in one call."""


def run(recorder: Recorder) -> None:
    """Cause out-of-memory errors in the UNet and in the decoder, uncompiled."""
    subject = load_subject(subjects.bench_settings(recorder, compiled=False))
    with recorder.section("too many slots") as results:
        results |= render_twice(subject, BatchSizes(TOO_MANY_SLOTS, 8), rows=10)
    with recorder.section("too little memory for the decoder") as results:
        results |= render_twice(subject, BatchSizes(16, 16), rows=20, leave=ROOM_FOR_THE_DECODER)


def render_twice(subject: Subject, shape: BatchSizes, rows: int, leave: int | None = None) -> dict[str, Any]:
    """Render with batch sizes that do not fit, then with those that they shrank to, and count equal images.

    `shape`: batch sizes at the start; `leave`: bytes of memory to leave free in the first rendering.
    """
    requests = subjects.rows_for(subject, rows, (2, 3), unguided=0.3)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    ballast = occupy_memory(leave)
    chain = StepLevelChain(subjects.family_model(subject), shape, None)
    started = time.perf_counter()
    outcomes = list(chain.render(requests))
    seconds = round(time.perf_counter() - started, 1)
    slots, decode = chain.batch_sizes.for_size(subjects.native_size(subject))
    errors = [str(getattr(outcome, "error", "")) for outcome in outcomes if not isinstance(outcome, RenderedImage)]
    images = {outcome.request.id: outcome.pixels for outcome in outcomes if isinstance(outcome, RenderedImage)}
    del ballast, chain, outcomes
    torch.cuda.empty_cache()
    not_freed = torch.cuda.memory_allocated() - before
    again = subjects.render(subjects.family_model(subject), requests, slots, decode) if images else {}
    return {
        "shape_at_first": [shape.slots, shape.decode],
        "shape_at_the_end": [slots, decode],
        "seconds": seconds,
        "rows": rows,
        "errors": errors[:3],
        "bytes_not_freed": not_freed,
        **count_equal(again, images),
    }


def occupy_memory(leave: int | None) -> torch.Tensor | None:
    """Allocate all GPU memory that this process may use except `leave` bytes, or nothing if `leave` is None."""
    if leave is None:
        return None
    free, total = torch.cuda.mem_get_info()
    allowed = int(MEMORY_FRACTION * total) - torch.cuda.memory_reserved()
    return torch.empty(max(0, min(free, allowed) - leave), dtype=torch.uint8, device="cuda")
