"""All that a run is asked to do, and how run.json keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from batch_infer.errors import SettingsError
from batch_infer.settings.compute import ComputeSettings, Count
from batch_infer.settings.model import ModelSettings
from batch_infer.settings.safety import SafetySettings

FIELDS = (
    "prompt",
    "id",
    "negative_prompt",
    "seed",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "guidance_rescale",
    "num_images_per_prompt",
)
"""The columns of a table that say what to render; every other column is carried through."""

IdSource = Literal["row", "content"]
ImageFormat = Literal["png", "jpeg", "webp"]
IMAGE_SUFFIXES: dict[ImageFormat, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
ResultsFormat = Literal["parquet", "csv", "jsonl"]
Retried = Literal["failed", "flagged", "blocked", "invalid", "missing"]
"""What `retry` renders again; `missing`: the result names an image, and the image is gone."""


@dataclass(frozen=True, slots=True)
class RowDefaults:
    """What rows get that do not say themselves; None leaves it to the model."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    num_images_per_prompt: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class OutputSettings:
    image_format: ImageFormat = "png"
    results: tuple[ResultsFormat, ...] = ("parquet",)
    base64: bool = False

    def __post_init__(self) -> None:
        """Raises SettingsError."""
        if self.base64 and not {"csv", "jsonl"} & set(self.results):
            raise SettingsError("--base64 is for results.csv and results.jsonl: add --results csv or --results jsonl")


@dataclass(frozen=True, slots=True)
class TableSettings:
    """The tables as the user named them; `columns` maps a field to the table's own name for it ('' takes none).

    `folder` is where relative names start: the current folder of the command that named them. `id_from` says what the
    id of a row without one is made of: its file and row number, or its content.
    """

    tables: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    limit: Count | None = None
    folder: Path = Path()
    id_from: IdSource = "row"


@dataclass(frozen=True, slots=True)
class FailureBudget:
    """How many failed or invalid rows are still a success: a count, or a share of all rows."""

    count: int = 0
    percent: float | None = None

    @classmethod
    def parse(cls, text: str) -> FailureBudget:
        """Read `N` or `P%`. Raises SettingsError."""
        number = text.strip().removesuffix("%")
        try:
            if text.strip().endswith("%"):
                percent = float(number)
                if 0 <= percent <= 100:
                    return cls(percent=percent)
            elif int(number) >= 0:
                return cls(count=int(number))
        except ValueError:
            pass
        raise SettingsError(f"--max-failed {text}: say a number of rows (5) or a share of them (1%)")

    def allows(self, failed: int, rows: int) -> bool:
        limit = self.count if self.percent is None else rows * self.percent / 100
        return failed <= limit


@dataclass(frozen=True, slots=True)
class RunSettings:
    table: TableSettings
    out: Path
    model: ModelSettings = ModelSettings()
    defaults: RowDefaults = RowDefaults()
    safety: SafetySettings = SafetySettings()
    output: OutputSettings = OutputSettings()
    compute: ComputeSettings = ComputeSettings()
    max_failed: FailureBudget = FailureBudget()
    overwrite: bool = False
    rerender_changed: bool = False
    price_per_hour: float | None = None
