"""What flows through a run: requests in, results out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

Status = Literal["ok", "flagged", "blocked", "invalid", "failed"]
FINAL_STATUSES: frozenset[str] = frozenset({"ok", "flagged", "blocked"})
"""Statuses that a later `run` skips."""

MAX_ATTEMPTS = 3
"""How often `run` tries a row that fails."""

COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of compressed tables."""
_DUPLICATE_SUFFIX = re.compile(r"#\d+$")
"""The second table of one name is called `t.csv#2`; no table's own name ends like that."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one image is sampled. Sizes in pixels.

    `embedded_guidance`: the model takes the guidance scale as an input and needs no second evaluation.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    embedded_guidance: bool = False

    @property
    def uses_guidance(self) -> bool:
        """Whether classifier-free guidance is on: above 1, as in diffusers (Ho & Salimans, arXiv 2207.12598)."""
        return self.guidance_scale > 1.0 and not self.embedded_guidance

    @property
    def slots(self) -> int:
        """Batch elements of one denoiser call: guidance needs an unconditional and a conditional one."""
        return 2 if self.uses_guidance else 1


@dataclass(frozen=True, slots=True)
class SizeRules:
    """Image sizes that a model accepts, in pixels. `most` is a limit of the model itself. run.json has these fields."""

    native_height: int
    native_width: int
    factor: int
    smallest: int
    most: int | None = None

    @property
    def largest(self) -> int:
        """The longest side that is accepted."""
        largest = 8 * max(self.native_height, self.native_width)
        return largest if self.most is None else min(largest, self.most)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row is: its file as the user named it, its number from 0, and in text formats its line from 1."""

    file: str
    row: int
    line: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        """Return the position as an editor shows it: `t.csv, line 5`, else `t.parquet, row 3`."""
        return f"{self.file}, row {self.row}" if self.line is None else f"{self.file}, line {self.line}"

    @property
    def stem(self) -> str:
        """The file's name without folder, `#2`, compression suffix and suffix."""
        path = PurePosixPath(_DUPLICATE_SUFFIX.sub("", self.file))
        return (path.with_suffix("") if path.suffix.lower() in COMPRESSION_SUFFIXES else path).stem


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """One image to render: everything that decides its pixels except the run's settings.

    `attempt` counts from 1; `replaces` is the path, relative to OUT, of the image of an earlier attempt.
    `id_collides`: the id equals that of an earlier row when case is ignored, but is not the same. `stem_collides`: so
    does the stem of its file.
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

    @property
    def key(self) -> tuple[str, int]:
        return self.id, self.image_index

    @property
    def batch_key(self) -> tuple[object, ...]:
        """What requests must have in common to be rendered by one call of a diffusers pipeline."""
        params = self.params
        sampling = params.num_inference_steps, params.guidance_scale, params.guidance_rescale
        return params.height, params.width, *sampling, self.negative_prompt is None

    def as_attempt(self, attempt: int, replaces: str | None) -> PromptRequest:
        """Return the same request as a later attempt."""
        return replace(self, attempt=attempt, replaces=replaces)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of a safety check of an image or a prompt.

    `nsfw` is None where nothing was checked; `reason` is one sentence that says why it is unsafe.
    """

    nsfw: bool | None = None
    checker: str | None = None
    scores: Mapping[str, float] | None = None
    reason: str | None = None

    def merge(self, other: Verdict) -> Verdict:
        """Return the verdict of both checks: unsafe where one says so, with the higher of each score."""
        both = self, other
        checkers = dict.fromkeys(name for verdict in both if verdict.checker for name in verdict.checker.split("+"))
        scores = dict(self.scores or {})
        for name, score in (other.scores or {}).items():
            scores[name] = max(score, scores.get(name, score))
        answers = [verdict.nsfw for verdict in both if verdict.nsfw is not None]
        reasons = dict.fromkeys(verdict.reason for verdict in both if verdict.reason)
        nsfw = any(answers) if answers else None
        return Verdict(nsfw, "+".join(checkers) or None, scores or None, "; ".join(reasons) or None)


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image file as its sink wrote it: path relative to OUT, sha256 and length in bytes.

    `pixels_sha256` is that of `images.pixels_sha256`.
    """

    path: str
    sha256: str
    image_bytes: int
    pixels_sha256: str | None = None


Int32 = Annotated[int, "int32"]
"""Result columns of int are int64, those of Int32 are int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRow:
    """One row of a manifest part and of results.*: the declaration of the result columns, in their order.

    The manifest derives the Arrow schema from it. A new column needs `metadata={"since": VERSION}`, with the next
    version of the manifest's format. `carried` and `line`, that of `Source`, are not result columns.
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
    safety_scores: Mapping[str, float] | None = None
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
"""The only columns in which two runs of the same work may differ."""


def digest(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON, cut to 32 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def utc_now() -> datetime:
    return datetime.now(timezone.utc)
