"""The rows of the benchmark: the same for everybody who asks for the same table."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from batch_infer.bench.settings import Size, TableShape
from batch_infer.records import PromptRequest, SamplingParams, Source

SEED = 7
"""Of the rows' parameters; the noise of row k has the seed k."""
WORDS = (
    ("small", "large"),
    ("red", "green", "blue", "yellow", "purple", "orange", "white", "black"),
    ("circle", "square", "triangle", "star", "ring"),
    ("a sandy beach", "a wooden table", "a plain grey wall", "fresh snow"),
)
PROMPTS = tuple(f"a {size} {colour} {shape} on {ground}" for size, colour, shape, ground in product(*WORDS))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How rows with guidance are sampled, by the model's own defaults."""

    guidance_scale: float
    guidance_rescale: float
    embedded_guidance: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What the images of one size cost: images, and the row-forwards (rows of UNet calls) that they take."""

    images: int
    row_forwards: int


@dataclass(frozen=True, slots=True)
class Table:
    """Rows, and what they cost by size."""

    rows: Sequence[PromptRequest]
    work: Mapping[Size, Work]

    @property
    def row_forwards(self) -> int:
        return sum(work.row_forwards for work in self.work.values())


def make_rows(shape: TableShape, sizes: Sequence[Size], sampling: Sampling) -> list[PromptRequest]:
    """Rows of any steps, guidance and size, in an order without order, as tables come."""
    draw = random.Random(SEED)
    rows = []
    for number in range(shape.rows):
        height, width = draw.choice(sizes)
        steps = draw.randint(*shape.steps)
        guidance = 1.0 if draw.random() < shape.unguided else sampling.guidance_scale
        params = SamplingParams(
            height, width, steps, guidance, sampling.guidance_rescale, embedded_guidance=sampling.embedded_guidance
        )
        name = f"row-{number:08d}"
        rows.append(PromptRequest(name, 0, draw.choice(PROMPTS), None, number, params, Source("bench", number), name))
    return rows


def size_of(row: PromptRequest) -> Size:
    return row.params.height, row.params.width


def row_forwards(row: PromptRequest, evaluations: Mapping[int, int]) -> int:
    """`evaluations`: how often a row of so many steps asks the model."""
    return row.params.slots * evaluations[row.params.num_inference_steps]


def work_of(rows: Sequence[PromptRequest], evaluations: Mapping[int, int]) -> dict[Size, Work]:
    """What rows cost, by size."""
    found: dict[Size, Work] = {}
    for row in rows:
        so_far = found.get(size_of(row), Work(0, 0))
        found[size_of(row)] = Work(so_far.images + 1, so_far.row_forwards + row_forwards(row, evaluations))
    return found


def spread(rows: Sequence[PromptRequest], number: int) -> list[PromptRequest]:
    """So many rows from all over a table."""
    count = min(number, len(rows))
    return [rows[k * len(rows) // count] for k in range(count)]
