"""Define the settings of a run. run.json stores them under the names of their fields, unless these are renamed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from batch_infer.errors import SettingsError
from batch_infer.settings.model import ModelSettings
from batch_infer.settings.provenance import ProvenanceSettings
from batch_infer.settings.safety import SafetySettings

Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
"""Positive int32. The bounds are checked only when run.json is read."""
FIELDS = (
    *("prompt", "id", "negative_prompt", "seed", "height", "width"),
    *("num_inference_steps", "guidance_scale", "guidance_rescale", "num_images_per_prompt"),
)
"""Fields of a row that determine what is rendered. Table columns without a field are carried to the results."""

LORA_FIELD = "lora"
"""Field that names a row's LoRA, with --lora-folder. Its column is also carried to the results."""

EngineName = Literal["local", "ray"]
IdSource = Literal["row", "content"]
ImageFormat = Literal["png", "jpeg", "webp"]
IMAGE_SUFFIXES: dict[ImageFormat, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
Offload = Literal["model", "sequential"]
ResultsFormat = Literal["parquet", "csv", "jsonl", "openai"]
RESULTS_FILES: dict[ResultsFormat, tuple[str, ...]] = {
    "parquet": ("results.parquet",),
    "csv": ("results.csv",),
    "jsonl": ("results.jsonl",),
    "openai": ("output.jsonl", "error.jsonl"),
}
"""Names of the files of each format of the results, in OUT."""
METADATA = "metadata.parquet"
"""Name of the file, next to images/, that describes images to Hugging Face's datasets."""
SHARED_NAMES = (*RESULTS_FILES["openai"], METADATA)
"""Names that other programs use too. Such a file counts as a results file only if SHA256SUMS or run.json says so."""
SinkName = Literal["folder", "webdataset", "parquet"]
RetryStatus = Literal["failed", "flagged", "blocked", "invalid", "missing", "damaged"]
"""Statuses of the results that `retry` can render again.

`missing` selects results whose image file does not exist, and `damaged` those whose file has another size or SHA-256.
"""


def list_results_files(formats: Iterable[ResultsFormat]) -> tuple[str, ...]:
    """Return the names of the results files of a run with these formats. results.parquet is always one of them."""
    every_format: tuple[ResultsFormat, ...] = ("parquet", *formats)
    return tuple(name for results_format in dict.fromkeys(every_format) for name in RESULTS_FILES[results_format])


@dataclass(frozen=True, slots=True)
class RowDefaults:
    """Default values for rows. None means the model's default or no negative prompt."""

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
    sign_key: str | None = None
    """Path of the private key that signs SHA256SUMS. run.json does not record it."""
    sink: SinkName = "folder"
    provenance: ProvenanceSettings = ProvenanceSettings()

    @property
    def results_files(self) -> tuple[str, ...]:
        """Names of the files that merging writes."""
        return (*list_results_files(self.results), METADATA)

    def __post_init__(self) -> None:
        """Check that a format can contain base64 images if they are requested. Raises SettingsError."""
        if self.base64 and not {"csv", "jsonl", "openai"} & set(self.results):
            raise SettingsError(
                "--base64 needs results.csv, results.jsonl or output.jsonl: add --results csv or --results jsonl, or "
                "--results openai"
            )


@dataclass(frozen=True, slots=True)
class TableSettings:
    """Tables as the user names them.

    `columns` maps a field to its column if their names differ, or to '' if the field has no column.
    Table names are relative to `folder`, the command's working folder. A missing id is derived from the file and row
    number if `id_from` is `row`, and from the row's content if it is `content`.
    """

    tables: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    limit: Count | None = None
    folder: Path = Path()
    id_from: IdSource = "row"


@dataclass(frozen=True, slots=True)
class FailureBudget:
    """Maximum number or percentage of rows that may be failed or invalid."""

    count: int = 0
    percent: float | None = None

    @classmethod
    def parse(cls, text: str) -> FailureBudget:
        """Parse `N` or `P%`. Raises SettingsError."""
        number = text.strip().removesuffix("%")
        with suppress(ValueError):
            if not text.strip().endswith("%") and int(number) >= 0:
                return cls(count=int(number))
            if text.strip().endswith("%") and 0 <= float(number) <= 100:
                return cls(percent=float(number))
        raise SettingsError(f"--max-failed {text}: expected a number of rows (5) or a percentage of them (1%)")

    def allows(self, failed: int, rows: int) -> bool:
        limit = self.count if self.percent is None else rows * self.percent / 100
        return failed <= limit


@dataclass(frozen=True, slots=True)
class ComputeSettings:
    """Requested compute settings. None for `slots`, `threads` and `compiled` is the value in run.json, else a default.

    `processes` is the number of worker processes. With None, there is one for each GPU, or one without GPUs, or as many
    as a Ray cluster has room for. With 0, the command itself renders. `ray_address` is the address of that cluster,
    which run.json does not record. Image bytes do not depend on `processes`, `engine`, `ray_address` and `offload`.
    """

    slots: Count | Literal["auto"] | None = None
    threads: Count | None = None
    compiled: bool | None = None
    processes: int | None = None
    engine: EngineName = "local"
    ray_address: str | None = None
    offload: Offload | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """The devices of a run, all of one kind. `kind` is `cpu` or `cuda`, and `name` is the product name."""

    kind: str
    name: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Batch sizes for one image size: `slots` elements per denoiser call, `decode_batch` images per decoder call."""

    height: Count
    width: Count
    slots: Count
    decode_batch: Count


@dataclass(frozen=True, slots=True)
class Compute:
    """Compute settings in use. Image bytes may depend on every field except `offload`.

    `by_size` overrides the batch sizes for specific image sizes.
    """

    device: str
    dtype: str
    slots: Count
    decode_batch: Count
    threads: Count
    device_name: str = ""
    compiled: bool = False
    by_size: tuple[BatchShape, ...] = ()
    offload: Offload | None = None

    def shape_of(self, height: int, width: int) -> BatchShape:
        """Return the batch sizes for an image size."""
        matches = (shape for shape in self.by_size if (shape.height, shape.width) == (height, width))
        return next(matches, BatchShape(height, width, self.slots, self.decode_batch))

    def with_shapes(self, shapes: Iterable[BatchShape]) -> Compute:
        """Return a copy with these batch sizes added or replaced."""
        by_size = {(shape.height, shape.width): shape for shape in (*self.by_size, *shapes)}
        return replace(self, by_size=tuple(by_size.values()))


@dataclass(frozen=True, slots=True)
class RunSettings:
    table: TableSettings
    out: str
    """A path or a URL."""
    model: ModelSettings = ModelSettings()
    defaults: RowDefaults = RowDefaults()
    safety: SafetySettings = SafetySettings()
    output: OutputSettings = OutputSettings()
    compute: ComputeSettings = ComputeSettings()
    max_failed: FailureBudget = FailureBudget()
    overwrite: bool = False
    rerender_changed: bool = False
    price_per_hour: float | None = None
