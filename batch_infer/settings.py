"""What a run was asked to do, as the command line, the environment and a script all say it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from batch_infer.errors import SettingsError

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

SafetyMode = Literal["auto", "checker", "azure", "checker,azure", "none"]
OnFlagged = Literal["blank", "keep", "blur", "quarantine", "drop"]
ImageFormat = Literal["png", "jpeg", "webp"]
ResultsFormat = Literal["parquet", "csv", "jsonl"]
Retried = Literal["failed", "flagged", "blocked", "invalid", "missing"]
"""What `retry` renders again; `missing`: the result names an image, and the image is gone."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which model, and how it computes. `name` None is the built-in demo model."""

    name: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    scheduler: SchedulerSpec | None = None
    loras: tuple[LoraSpec, ...] = ()
    long_prompts: bool = False


@dataclass(frozen=True, slots=True)
class SchedulerSpec:
    """A diffusers scheduler class and the options to make it with, beside the model's own."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> SchedulerSpec:
        """Read `NAME[:key=value,...]`; a value is JSON where it can be, else a string. Raises SettingsError."""
        name, _, rest = text.partition(":")
        options = []
        for part in rest.split(",") if rest else []:
            key, equals, value = part.partition("=")
            if not equals or not key.strip().isidentifier():
                raise SettingsError(f"--scheduler {text}: {part!r} is not key=value")
            options.append((key.strip(), _value(value.strip())))
        if not name.isidentifier():
            raise SettingsError(f"--scheduler {text}: {name!r} is not the name of a diffusers scheduler class")
        return cls(name, tuple(sorted(options)))

    def __str__(self) -> str:
        options = ",".join(f"{key}={json.dumps(value)}" for key, value in self.options)
        return f"{self.name}:{options}" if options else self.name


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """A LoRA's file, and how much of it is added to the model's weights."""

    file: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraSpec:
        """Read `FILE[:WEIGHT]`; FILE ends in .safetensors, and colons may stand in its path. Raises SettingsError."""
        file, ending, rest = text.rpartition(".safetensors")
        colon, weight = rest[:1], rest[1:]
        if not ending or colon not in ("", ":"):
            raise SettingsError(f"--lora {text}: say FILE.safetensors or FILE.safetensors:WEIGHT")
        try:
            found = float(weight) if colon else 1.0
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise SettingsError(f"--lora {text}: the weight {weight!r} is not a finite number")
        return cls(file + ending, found)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


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


_ENDPOINT = re.compile(r"https://[^/\s@?#]+/?|http://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?/?")
"""Without TLS a key goes to this machine alone."""
CATEGORIES = ("Hate", "SelfHarm", "Sexual", "Violence")
"""What Azure AI Content Safety judges texts and images by, each with a severity of 0, 2, 4 or 6."""


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """How Azure AI Content Safety is asked, and what of its answers refuses a prompt or flags an image.

    That is a severity above the category's threshold, in the order of CATEGORIES, or a hit on a blocklist of the
    resource. The key is not kept here: it stands in the environment of who asks.
    """

    endpoint: str
    thresholds: tuple[int, ...] = (1, 1, 1, 1)
    blocklists: tuple[str, ...] = ()
    requests_per_second: float = 100.0
    """The service takes 1,000 requests in 10 s; workers share them."""
    patience: float = 120.0
    """For how many seconds it may be silent or failing before that ends a run."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> ServiceSettings | None:
        """Read the variables that begin with CONTENT_SAFETY_; None without an endpoint. Raises SettingsError."""
        endpoint = environment.get("CONTENT_SAFETY_ENDPOINT", "").strip()
        if not endpoint:
            return None
        if not _ENDPOINT.fullmatch(endpoint):
            raise SettingsError(f"CONTENT_SAFETY_ENDPOINT={endpoint}: say https://NAME.cognitiveservices.azure.com")
        thresholds = _thresholds(environment.get("CONTENT_SAFETY_THRESHOLD", ""))
        blocklists = environment.get("CONTENT_SAFETY_BLOCKLISTS", "").split(",")
        rate = environment.get("CONTENT_SAFETY_REQUESTS_PER_SECOND", "").strip() or "100"
        if not re.fullmatch(r"\d+(\.\d+)?", rate) or not float(rate):
            raise SettingsError(f"CONTENT_SAFETY_REQUESTS_PER_SECOND={rate}: say a number, such as 100")
        return cls(endpoint, thresholds, tuple(name.strip() for name in blocklists if name.strip()), float(rate))


def _thresholds(text: str) -> tuple[int, ...]:
    """Of the categories in their order: `1`, `Hate=3,Sexual=1`, or `1,Hate=3`; 1 where none is said."""
    parts = [part.rpartition("=") for part in text.split(",") if part.strip()]
    said = [(name.strip() if equals else None, number.strip()) for name, equals, number in parts]
    names = [name for name, _ in said]
    known = all(name in (None, *CATEGORIES) for name in names) and len(set(names)) == len(names)
    if not known or not all(re.fullmatch("[0-7]", number) for _, number in said):
        raise SettingsError(
            f"CONTENT_SAFETY_THRESHOLD={text}: say a number from 0 to 7, or {CATEGORIES[0]}=3,{CATEGORIES[2]}=1, each"
            f" once; the categories are {', '.join(CATEGORIES)}"
        )
    levels = {name: int(number) for name, number in said}
    return tuple(levels.get(name, levels.get(None, 1)) for name in CATEGORIES)


@dataclass(frozen=True, slots=True)
class SafetySettings:
    """Who judges prompts and images, and what becomes of an image that is flagged. `service` is asked where given."""

    mode: SafetyMode = "auto"
    on_flagged: OnFlagged = "blank"
    required: bool = False
    service: ServiceSettings | None = None

    def shared_by(self, workers: int) -> SafetySettings:
        """What one of several workers may ask of the service, which counts them together."""
        if self.service is None:
            return self
        rate = self.service.requests_per_second / max(1, workers)
        return replace(self, service=replace(self.service, requests_per_second=rate))

    def asks_checker(self, *, has_checker: bool) -> bool:
        """Whether the model's own checker judges its images."""
        return self.mode in ("auto", "checker", "checker,azure") and has_checker


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

    `folder` is where relative names start: the current folder of the command that named them.
    """

    tables: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    folder: Path = Path()


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
class ComputeSettings:
    """None: kept from run.json where the run goes on, else chosen for the device."""

    slots: int | Literal["auto"] | None = None
    threads: int | None = None
    compiled: bool | None = None
    processes: int | None = None
    """Of workers, each with a device of its own; 0: the command renders by itself. Bytes do not depend on it."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a run computes on: `cpu` or `cuda`, what its maker calls it, and how many of them there are for it."""

    kind: str
    name: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Batch sizes of an image size: row-forwards in a UNet call, images in a decoder call."""

    height: int
    width: int
    slots: int
    decode_batch: int


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and how a run computes, once that is settled. Bytes depend on all of it but the device's name.

    `by_size` has the batch sizes of image sizes that have their own.
    """

    device: str
    dtype: str
    slots: int
    decode_batch: int
    threads: int
    device_name: str = ""
    compiled: bool = False
    by_size: tuple[BatchShape, ...] = ()

    def shape_of(self, height: int, width: int) -> BatchShape:
        """The batch sizes of an image size."""
        own = (shape for shape in self.by_size if (shape.height, shape.width) == (height, width))
        return next(own, BatchShape(height, width, self.slots, self.decode_batch))

    def with_shapes(self, shapes: Iterable[BatchShape]) -> Compute:
        """With other batch sizes for these image sizes."""
        found = {(shape.height, shape.width): shape for shape in (*self.by_size, *shapes)}
        return replace(self, by_size=tuple(found.values()))


def _service(record: Mapping[str, Any] | None) -> ServiceSettings | None:
    if record is None:
        return None
    lists = {name: tuple(record[name]) for name in ("thresholds", "blocklists")}
    return ServiceSettings(**{**record, **lists})


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
    price_per_hour: float | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RunSettings:
        """The settings that `dataclasses.asdict` and JSON made this of. Raises KeyError, TypeError, ValueError."""
        record, model, table = dict(record), dict(record["model"]), dict(record["table"])
        if spec := model.pop("scheduler"):
            spec = SchedulerSpec(spec["name"], tuple((key, value) for key, value in spec["options"]))
        loras = tuple(LoraSpec(**lora) for lora in model.pop("loras"))
        output = {**record["output"], "results": tuple(record["output"]["results"])}
        table = {**table, "tables": tuple(table["tables"]), "folder": Path(table["folder"])}
        return cls(
            **{
                **record,
                "table": TableSettings(**table),
                "out": Path(record["out"]),
                "model": ModelSettings(**model, scheduler=spec, loras=loras),
                "defaults": RowDefaults(**record["defaults"]),
                "safety": SafetySettings(**{**record["safety"], "service": _service(record["safety"]["service"])}),
                "output": OutputSettings(**output),
                "compute": ComputeSettings(**record["compute"]),
                "max_failed": FailureBudget(**record["max_failed"]),
            }
        )
