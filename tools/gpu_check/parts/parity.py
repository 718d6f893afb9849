"""Check the built-in model: parity with diffusers, equal bytes among other rows, and half precision."""

from __future__ import annotations

import random
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from batch_infer.bench.renderers import PlainDiffusers
from batch_infer.bench.subject import Subject
from tools.gpu_check import subjects
from tools.gpu_check.measure import compare_images, count_equal

if TYPE_CHECKING:
    from batch_infer.records import PromptRequest
    from tools.gpu_check.recorder import Recorder

LIBRARIES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
"""Libraries of the forms of quantized weights, which are checked if their library is installed."""
UNGUIDED = 0.2
"""Share of rows without guidance, which take one slot instead of two."""


def run(recorder: Recorder) -> None:
    """Render the same rows in each dtype."""
    count, steps, slots = (3, (2, 3), 4) if recorder.small else (48, (8, 40), 32)
    reference: dict[str, Any] = {}
    for dtype in ("float32",) if recorder.small else ("float32", "float16", "bfloat16"):
        with recorder.section(dtype) as results:
            # Loading in float32 turns TensorFloat-32 off, for diffusers too. `tf32_...` uses torch's default.
            subject = subjects.load_demo(recorder.device, dtype, slots)
            rows = subjects.rows_for(subject, count, steps, unguided=UNGUIDED)
            images = render(subject, rows)
            results["parity_with_diffusers"] = compare_with_diffusers(subject, rows, images)
            results |= compare_in_other_batches(subject, rows, images)
            if reference:
                results["compared_with_float32"] = compare_images(images, reference)
            elif not recorder.small:
                reference = images
                results |= compare_with_tf32(subject, rows, images)
    if recorder.small:
        return
    for mode in ("model", "sequential"):
        with recorder.section(f"offload {mode}") as results:
            subject = subjects.load_demo(recorder.device, "float32", slots, offload=mode)
            rows = subjects.rows_for(subject, count, steps, unguided=UNGUIDED)
            results["equal_to_images_without_offload"] = count_equal(
                subjects.render_as_worker(subject, rows), reference
            )
    for kind, library in LIBRARIES.items():
        if find_spec(library):
            with recorder.section(f"float16 in {kind}") as results:
                subject = subjects.load_demo(recorder.device, "float16", slots, quantize=kind)
                rows = subjects.rows_for(subject, count, steps, unguided=UNGUIDED)
                images = render(subject, rows)
                results |= compare_in_other_batches(subject, rows, images)
                results["quantized_compared_with_float32"] = compare_images(images, reference)


def render(subject: Subject, rows: list[PromptRequest]) -> dict[str, Any]:
    """Render rows with the subject's batch sizes."""
    return subjects.render(subjects.family_model(subject), rows, subject.compute.slots, subject.compute.decode_batch)


def compare_with_diffusers(subject: Subject, rows: list[PromptRequest], images: dict[str, Any]) -> dict[str, float]:
    """Compare a quarter of the images, at least two, with those of the diffusers pipeline, one row per call."""
    sample = rows[: max(2, len(rows) // 4)]
    plain = PlainDiffusers(subjects.family_model(subject), subject.compute, grouped=False)
    return compare_images(images, {row.id: pixels for row, pixels in plain.render(sample)})


def compare_in_other_batches(
    subject: Subject, rows: list[PromptRequest], images: dict[str, Any]
) -> dict[str, dict[str, int]]:
    """Count equal images if the rows are in another order, and if half of them are missing."""
    shuffled = rows[:]
    random.Random(5).shuffle(shuffled)
    return {
        "equal_in_other_order": count_equal(images, render(subject, shuffled)),
        "equal_among_other_rows": count_equal(images, render(subject, rows[::2])),
    }


def compare_with_tf32(subject: Subject, rows: list[PromptRequest], images: dict[str, Any]) -> dict[str, Any]:
    """Render in float32 with TensorFloat-32 convolutions, which torch allows by default."""
    torch.backends.cudnn.allow_tf32 = True
    with_tf32 = render(subject, rows)
    return {
        "tf32_compared_with_float32": compare_images(with_tf32, images),
        "tf32_parity_with_diffusers": compare_with_diffusers(subject, rows, with_tf32),
    }
