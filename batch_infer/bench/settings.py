"""What the benchmark is asked to do, as the command line says it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from batch_infer.errors import SettingsError
from batch_infer.records import SizeRules
from batch_infer.settings import ComputeSettings, ModelSettings

RIVALS = ("grouped", "grouped-compiled", "one-by-one", "bare")
ARCHITECTURES = ("sd15", "decidiffusion", "sdxl")
SWEEP = (4, 8, 16, 32, 64)
"""Numbers of slots that a plot shows where none are named."""

Size = tuple[int, int]
"""Height and width in pixels."""

ASPECT = 1.5
"""Of the two sizes beside the model's own in a mixed table."""


@dataclass(frozen=True, slots=True)
class TableShape:
    """The rows that are rendered.

    `steps`: the fewest and the most; `sizes`: `mixed`, `native`, or pixels as `640x448,512x512` (width x height);
    `unguided`: the share of rows without guidance.
    """

    rows: int = 200
    steps: tuple[int, int] = (20, 50)
    sizes: str = "mixed"
    unguided: float = 0.2

    def sizes_of(self, rules: SizeRules) -> tuple[Size, ...]:
        """The sizes for a model. Raises SettingsError for one that it does not take."""
        native = rules.native_height, rules.native_width
        match self.sizes:
            case "native":
                return (native,)
            case "mixed":
                long, short = (_near(rules, factor) for factor in (ASPECT**0.5, ASPECT**-0.5))
                return tuple(dict.fromkeys([native, (short[0], long[1]), (long[0], short[1])]))
            case text:
                return tuple(dict.fromkeys(_parse_size(part, rules) for part in text.split(",")))


def _near(rules: SizeRules, factor: float) -> Size:
    """The native sides times a factor, as multiples of what the UNet's deepest level divides by."""
    unit = rules.smallest
    height, width = (max(1, round(side * factor / unit)) for side in (rules.native_height, rules.native_width))
    return unit * height, unit * width


def _parse_size(text: str, rules: SizeRules) -> Size:
    found = re.fullmatch(r"\s*(\d+)x(\d+)\s*", text)
    if found is None:
        raise SettingsError(f"--sizes {text}: say `mixed`, `native`, or width x height as 512x512,640x448")
    width, height = int(found[1]), int(found[2])
    for side in (width, height):
        if side % rules.factor or not rules.smallest <= side <= rules.largest:
            raise SettingsError(
                f"--sizes {text.strip()}: {side} is not a multiple of {rules.factor} from {rules.smallest} to "
                f"{rules.largest}"
            )
    return height, width


def parse_steps(text: str) -> tuple[int, int]:
    """Read `A-B` or `N`. Raises SettingsError."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high <= 1000:
        raise SettingsError(f"--steps {text}: say a number of steps (50), or the fewest and the most (20-50)")
    return low, high


def parse_sweep(text: str) -> tuple[int, ...]:
    """Read numbers of slots, apart by commas. Raises SettingsError."""
    numbers = tuple(sorted({int(part) for part in text.split(",") if part.strip().isdecimal()}))
    if len(numbers) != len(set(text.split(","))) or min(numbers) < 2:
        raise SettingsError(f"--sweep {text}: say numbers of slots from 2 on: 4,8,16,32,64")
    return numbers


def parse_against(text: str) -> tuple[str, ...]:
    """Read names of rivals, apart by commas. Raises SettingsError."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if strange := [name for name in names if name not in RIVALS]:
        raise SettingsError(f"--against {strange[0]}: there are {', '.join(RIVALS)}")
    return names


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """`architecture` in place of `model`: a released model's layers at full size with random weights."""

    table: TableShape = TableShape()
    model: ModelSettings = ModelSettings()
    architecture: str | None = None
    compute: ComputeSettings = ComputeSettings()
    rounds: int = 3
    against: Sequence[str] = field(default=("grouped", "one-by-one", "bare"))
    sweep: tuple[int, ...] = ()
    plot: Path | None = None
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        """Raises SettingsError."""
        if self.architecture is not None and self.architecture not in ARCHITECTURES:
            raise SettingsError(f"--architecture {self.architecture}: there are {', '.join(ARCHITECTURES)}")
        if self.architecture is not None and self.model.name is not None:
            raise SettingsError("--architecture and --model do not go together: one has random weights, one its own")
