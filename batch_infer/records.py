"""Define the records that all packages share, from requests to results."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

Status = Literal["ok", "flagged", "blocked", "invalid", "failed"]
FINAL_STATUSES: frozenset[str] = frozenset({"ok", "flagged", "blocked"})
"""Later runs skip unchanged rows with these statuses."""

MAX_ATTEMPTS = 3
"""Maximum number of attempts that `run` makes for a failing row."""

COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_FORMAT_SUFFIX = re.compile(r"(?<!^)(\.prompts\.txt|\.[^.]+)\Z", re.IGNORECASE)
"""Suffix of the format. Unlike PurePosixPath.stem, it also matches the two parts of `.prompts.txt`."""
_DUPLICATE_SUFFIX = re.compile(r"#\d+$")
"""Suffix that distinguishes tables with the same name, as in `t.csv#2`. No table's own name ends this way."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one image. Sizes are in pixels.

    With `embedded_guidance`, the model takes the guidance scale as an input and needs no second evaluation.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    embedded_guidance: bool = False

    @property
    def uses_guidance(self) -> bool:
        """Whether classifier-free guidance (Ho & Salimans, arXiv 2207.12598) is used.

        As in diffusers, a guidance scale of at most 1 disables it.
        """
        return self.guidance_scale > 1.0 and not self.embedded_guidance

    @property
    def slots(self) -> int:
        """Number of batch elements per denoiser call. Guidance needs an unconditional and a conditional element."""
        return 2 if self.uses_guidance else 1


@dataclass(frozen=True, slots=True)
class RowCost:
    """Number of a row's denoiser calls, and of its batch elements in each. With `is_alone`, it shares none of them."""

    evaluations: int
    slots: int
    is_alone: bool = False


class SizeRules(
    msgspec.Struct, frozen=True, rename={"side_multiple": "factor", "min_side": "smallest", "model_max_side": "most"}
):
    """Image sizes that a model accepts, in pixels. `model_max_side` is the model's own limit, if any.

    run.json stores these fields, some of them under an older name.
    """

    native_height: int
    native_width: int
    side_multiple: int
    min_side: int
    model_max_side: int | None = None

    @property
    def max_side(self) -> int:
        """Longest accepted side in pixels."""
        limit = 8 * max(self.native_height, self.native_width)
        return limit if self.model_max_side is None else min(limit, self.model_max_side)


@dataclass(frozen=True, slots=True)
class Source:
    """Location of a row: its file, its row number from 0 and, in text formats, its line number from 1."""

    file: str
    row: int
    line: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        """Format the location as `t.csv, line 5` if the line is known, otherwise as `t.parquet, row 3`."""
        return f"{self.file}, row {self.row}" if self.line is None else f"{self.file}, line {self.line}"

    @property
    def stem(self) -> str:
        """File name without its folder, and without the suffixes for duplicates (`#2`), compression and format."""
        path = PurePosixPath(_DUPLICATE_SUFFIX.sub("", self.file))
        name = path.stem if path.suffix.lower() in COMPRESSION_SUFFIXES else path.name
        return _FORMAT_SUFFIX.sub("", name) or name


@dataclass(frozen=True, slots=True)
class Lora:
    """A local LoRA file, the weight with which it is added to the model, and a digest of its bytes."""

    path: Path
    weight: float
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.path.stem}:{self.weight:g}"


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """Request for one image, with everything that determines its pixels except the run's settings.

    `lora` is the row's own, which is added to the model on top of those of --lora. `attempt` counts from 1. `replaces`
    is the path, relative to OUT, of the image from an earlier attempt.
    `id_collides` and `stem_collides` say whether the id or file stem of an earlier row or of a committed image differs
    from this row's only by case.
    """

    id: str
    image_index: int
    prompt: str
    negative_prompt: str | None
    seed: int
    params: SamplingParams
    source: Source
    fingerprint: str
    carried: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 1
    replaces: str | None = None
    id_collides: bool = False
    stem_collides: bool = False
    lora: Lora | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.id, self.image_index

    @property
    def group_key(self) -> tuple[int, int, Lora | None]:
        """Key shared by all requests that can share a denoiser call: the height, the width and the row's LoRA."""
        return self.params.height, self.params.width, self.lora


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of a safety check of an image or prompt.

    `nsfw` is None if nothing was checked. `reason` explains why the content is unsafe.
    """

    nsfw: bool | None = None
    checker: str | None = None
    scores: Mapping[str, float] | None = None
    reason: str | None = None

    def merge(self, other: Verdict) -> Verdict:
        """Combine two verdicts: unsafe if either is unsafe, with the maximum of each score."""
        verdicts = self, other
        checkers = dict.fromkeys(name for verdict in verdicts if verdict.checker for name in verdict.checker.split("+"))
        scores = dict(self.scores or {})
        for name, score in (other.scores or {}).items():
            scores[name] = max(score, scores.get(name, score))
        answers = [verdict.nsfw for verdict in verdicts if verdict.nsfw is not None]
        reasons = dict.fromkeys(verdict.reason for verdict in verdicts if verdict.reason)
        nsfw = any(answers) if answers else None
        return Verdict(nsfw, "+".join(checkers) or None, scores or None, "; ".join(reasons) or None)


@dataclass(frozen=True, slots=True)
class StoredImage:
    """Stored image file, with its path relative to OUT. `pixels_sha256` comes from `images.hash_pixels`."""

    path: str
    sha256: str
    image_bytes: int
    pixels_sha256: str | None = None


Int32 = Annotated[int, "int32"]
"""Type of int32 result columns. A column of type int is int64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRow:
    """One row of a manifest part and of results.*. The fields declare the result columns in order.

    The manifest derives its Arrow schema from the fields. A new column needs `metadata={"since": VERSION}` with the
    next version of the manifest format. A new type of a column needs `metadata={"retyped": VERSION}`, and the earlier
    type in `manifest.columns`. Two fields are not result columns: `line`, the source's line number, and `carried`,
    whose cells are separate columns of results.*.
    """

    id: str
    image_index: Int32
    prompt: str | None
    generated_image: str | None = None
    nsfw_content_detected: bool | None = None
    status: Status
    error: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    height: Int32 | None = None
    width: Int32 | None = None
    num_inference_steps: Int32 | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    scheduler: str | None = None
    prompt_tokens: Int32 | None = None
    prompt_truncated: bool | None = None
    safety_checker: str | None = None
    safety_scores: Mapping[str, float] | None = field(default=None, metadata={"retyped": 3})
    sha256: str | None = None
    pixels_sha256: str | None = field(default=None, metadata={"since": 2})
    image_bytes: int | None = None
    slots: Int32 | None = None
    seconds: float | None = None
    attempt: Int32 = 1
    worker: str | None = None
    finished_at: datetime
    source_file: str
    source_row: int
    fingerprint: str
    carried: Mapping[str, Any] = field(default_factory=dict)
    line: int | None = field(default=None, compare=False)

    @property
    def key(self) -> tuple[str, int]:
        return self.id, self.image_index

    @property
    def source(self) -> Source:
        return Source(self.source_file, self.source_row, self.line)


RESULT_COLUMNS = tuple(column for column in fields(ResultRow) if column.name not in ("carried", "line"))
BOOKKEEPING: frozenset[str] = frozenset({"slots", "seconds", "attempt", "worker", "finished_at"})
"""The only columns that may differ between two runs with the same input and settings on one machine."""


def digest(value: Any) -> str:
    """Return the first 32 hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def utc_now() -> datetime:
    return datetime.now(timezone.utc)
