"""Define the settings of the benchmark, and parse its options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from batch_infer.errors import SettingsError
from batch_infer.records import SizeRules
from batch_infer.settings import ComputeSettings, ModelSettings

BASELINES = ("grouped", "grouped-compiled", "one-by-one", "bare")
PIPELINE_ARCHITECTURES = ("flux-schnell", "flux2-klein", "qwen-image", "z-image", "sana")
"""Architectures without a model family, which run in their diffusers pipeline."""
ARCHITECTURES = ("sd15", "decidiffusion", "sdxl", *PIPELINE_ARCHITECTURES)
STEPS = (20, 50)
"""Default minimum and maximum of steps, except for few-step models."""
SWEEP = (4, 8, 16, 32, 64)
"""Default numbers of slots for a plot."""

Size = tuple[int, int]
"""Height and width in pixels."""

ASPECT = 1.5
"""Approximate ratio of the sides of the two sizes in a mixed workload that are not the model's native size."""


@dataclass(frozen=True, slots=True)
class WorkloadSettings:
    """Settings of the rows to render.

    `steps`: minimum and maximum, or None for the model's default (see `steps_for`); `sizes`: `mixed`, `native`, or
    width x height as in `640x448,512x512`; `unguided`: probability that a row has no guidance.
    """

    rows: int = 200
    steps: tuple[int, int] | None = None
    sizes: str = "mixed"
    unguided: float = 0.2

    def steps_for(self, default: int) -> tuple[int, int]:
        """Return the minimum and maximum for a model's default number of steps.

        Unless steps are set, few-step models always take their default number, and others 20 to 50.
        """
        return self.steps or (STEPS if default >= STEPS[0] else (default, default))

    def sizes_of(self, rules: SizeRules) -> tuple[Size, ...]:
        """Return the sizes for a model. Raises SettingsError for an invalid or unsupported size."""
        native = rules.native_height, rules.native_width
        match self.sizes:
            case "native":
                return (native,)
            case "mixed":
                long, short = (_scale(rules, factor) for factor in (ASPECT**0.5, ASPECT**-0.5))
                return tuple(dict.fromkeys([native, (short[0], long[1]), (long[0], short[1])]))
            case text:
                return tuple(dict.fromkeys(_parse_size(part, rules) for part in text.split(",")))


def _scale(rules: SizeRules, factor: float) -> Size:
    """Multiply the native sides by a factor, and round them to multiples of the smallest supported side."""
    unit = rules.min_side
    height, width = (max(1, round(side * factor / unit)) for side in (rules.native_height, rules.native_width))
    return unit * height, unit * width


def _parse_size(text: str, rules: SizeRules) -> Size:
    match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", text)
    if match is None:
        raise SettingsError(f"--sizes {text}: write `mixed`, `native`, or width x height such as 512x512,640x448")
    width, height = int(match[1]), int(match[2])
    for side in (width, height):
        if side % rules.side_multiple or not rules.min_side <= side <= rules.max_side:
            limits = f"{rules.side_multiple} from {rules.min_side} to {rules.max_side}"
            raise SettingsError(f"--sizes {text.strip()}: {side} is not a multiple of {limits}")
    return height, width


def parse_steps(text: str) -> tuple[int, int]:
    """Parse `A-B` or `N`. Raises SettingsError."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high <= 1000:
        raise SettingsError(f"--steps {text}: write a number of steps (50), or the smallest and the largest (20-50)")
    return low, high


def parse_sweep(text: str) -> tuple[int, ...]:
    """Parse numbers of slots, separated by commas, and sort them. Raises SettingsError."""
    counts = tuple(sorted({int(part) for part in text.split(",") if part.strip().isdecimal()}))
    if len(counts) != len(set(text.split(","))) or min(counts) < 2:
        raise SettingsError(f"--sweep {text}: write numbers of slots, at least 2 each: 4,8,16,32,64")
    return counts


def parse_against(text: str) -> tuple[str, ...]:
    """Parse names of baselines, separated by commas. Raises SettingsError."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [name for name in names if name not in BASELINES]:
        raise SettingsError(f"--against {unknown[0]}: the baselines are {', '.join(BASELINES)}")
    return names


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """Settings of a benchmark. `architecture`: a name in ARCHITECTURES, to use its layers with random weights."""

    workload: WorkloadSettings = WorkloadSettings()
    model: ModelSettings = ModelSettings()
    architecture: str | None = None
    compute: ComputeSettings = ComputeSettings()
    rounds: int = 3
    against: Sequence[str] = ("grouped", "one-by-one", "bare")
    sweep: tuple[int, ...] = ()
    plot: Path | None = None
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        """Check the combination. Raises SettingsError."""
        model = self.model
        if self.architecture is not None:
            if model.name is not None:
                raise SettingsError("--architecture and --model exclude each other: an architecture has random weights")
            if model.quantize is not None:
                raise SettingsError(
                    "--quantize compares images, but those of an --architecture are noise: give a --model"
                )
            given = {
                "--revision": model.revision,
                "--variant": model.variant,
                "--lora": model.loras,
                "--embedding": model.embeddings,
                "--long-prompts": model.long_prompts,
                "--scheduler": model.scheduler,
            }
            if options := [option for option, value in given.items() if value]:
                raise SettingsError(f"--architecture has no checkpoint: leave out {' and '.join(options)}")
        if model.lora_folder is not None:
            raise SettingsError("--lora-folder serves rows that name a LoRA; those of bench name none: leave it out")
