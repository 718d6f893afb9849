"""Make the rows of the benchmark, which depend only on its settings and the model, and count their cost."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from batch_infer.bench.settings import Size, WorkloadSettings
from batch_infer.records import PromptRequest, SamplingParams, Source

if TYPE_CHECKING:
    from batch_infer.bench.subject import Subject

SEED = 7
"""Seed of the rows' prompts and parameters. The noise of row k has seed k."""
WORDS = (
    ("small", "large"),
    ("red", "green", "blue", "yellow", "purple", "orange", "white", "black"),
    ("circle", "square", "triangle", "star", "ring"),
    ("a sandy beach", "a wooden table", "a plain grey wall", "fresh snow"),
)
PROMPTS = tuple(f"a {size} {colour} {shape} on {ground}" for size, colour, shape, ground in product(*WORDS))
TERA = 1e12


@dataclass(frozen=True, slots=True)
class SizeWork:
    """Images and denoiser evaluations (`row_forwards`) of one size, and the TFLOP of one evaluation and decoding."""

    height: int
    width: int
    images: int
    row_forwards: int
    row_forward_tflop: float
    decode_tflop: float


@dataclass(frozen=True, slots=True)
class Workload:
    """Rows and their cost by size. `evaluations`: batch elements of all denoiser calls of a row, by row id."""

    rows: Sequence[PromptRequest]
    settings: WorkloadSettings
    steps: tuple[int, int]
    evaluations: Mapping[str, int]
    sizes: dict[Size, SizeWork] = field(default_factory=dict)

    def row_forwards_of(self, rows: Sequence[PromptRequest]) -> int:
        """Return the number of denoiser evaluations for these rows."""
        return sum(self.evaluations[row.id] for row in rows)

    @property
    def row_forwards(self) -> int:
        return self.row_forwards_of(self.rows)

    @property
    def unguided(self) -> float:
        """Expected share of rows without guidance."""
        return self.settings.unguided if any(row.params.guidance_scale > 1 for row in self.rows) else 1.0

    @property
    def denoiser_tflop(self) -> float:
        return sum(work.row_forwards * work.row_forward_tflop for work in self.sizes.values())

    @property
    def tflop(self) -> float:
        """TFLOP of the denoiser and the decoder.

        Text encoding is left out: it adds 0.02 % in Stable Diffusion, and up to 4 % in few-step models with a large
        language model.
        """
        return self.denoiser_tflop + sum(work.images * work.decode_tflop for work in self.sizes.values())

    def denoiser_seconds(self, rates: Mapping[Size, float]) -> float:
        """Return the seconds for all denoiser evaluations at these rates per second, with all slots always full."""
        return sum(work.row_forwards / rates[size] for size, work in self.sizes.items())

    def as_dict(self) -> dict[str, Any]:
        """Return the settings and the cost as --json prints them."""
        totals = {name: getattr(self, name) for name in ("row_forwards", "denoiser_tflop", "tflop")}
        shape = {"rows": len(self.rows), "steps": self.steps, "unguided": self.unguided}
        return {**shape, **totals, "sizes": [asdict(work) for work in self.sizes.values()]}


def make_workload(settings: WorkloadSettings, subject: Subject) -> Workload:
    """Make rows for a model and count their cost. Raises SettingsError for unsupported sizes or steps."""
    steps = settings.steps_for(subject.defaults.num_inference_steps)
    rows = make_rows(settings, settings.sizes_of(subject.sizes), subject.defaults)
    workload = Workload(rows, settings, steps, {row.id: subject.evaluations(row) for row in rows})
    for size in dict.fromkeys(map(size_of, rows)):
        size_rows = [row for row in rows if size_of(row) == size]
        denoise, decode = subject.probe.count_flops(size_rows[0])
        forwards = workload.row_forwards_of(size_rows)
        workload.sizes[size] = SizeWork(*size, len(size_rows), forwards, denoise / TERA, decode / TERA)
    return workload


def make_rows(settings: WorkloadSettings, sizes: Sequence[Size], defaults: SamplingParams) -> list[PromptRequest]:
    """Make rows with random prompts, sizes, steps and use of guidance. Other parameters are `defaults`."""
    generator = random.Random(SEED)
    steps = settings.steps_for(defaults.num_inference_steps)
    rows = []
    for index in range(settings.rows):
        height, width = generator.choice(sizes)
        params = replace(defaults, height=height, width=width, num_inference_steps=generator.randint(*steps))
        if generator.random() < settings.unguided and params.guidance_scale > 1:
            params = replace(params, guidance_scale=1.0)
        name, prompt = f"row-{index:08d}", generator.choice(PROMPTS)
        rows.append(PromptRequest(name, 0, prompt, None, index, params, Source("bench", index), name))
    return rows


def size_of(row: PromptRequest) -> Size:
    """Return the height and width of a row's image."""
    return row.params.height, row.params.width


def size_name(size: Size) -> str:
    """Format a size as `width x height`."""
    return f"{size[1]}x{size[0]}"


def sample_evenly(rows: Sequence[PromptRequest], max_count: int) -> list[PromptRequest]:
    """Return at most `max_count` rows from evenly spaced positions."""
    count = min(max_count, len(rows))
    return [rows[k * len(rows) // count] for k in range(count)]
