"""What flows through a run: requests in, results out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import Any, Literal

Status = Literal["ok", "flagged", "blocked", "invalid", "failed"]
FINAL_STATUSES: frozenset[str] = frozenset({"ok", "flagged", "blocked"})
"""Statuses that a later run leaves alone."""

MAX_ATTEMPTS = 3
"""How often `run` tries a row that fails."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one image is sampled. Sizes in pixels.

    `embedded_guidance` is the model's: it takes the guidance scale as an input, and needs no second pass.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    embedded_guidance: bool = False

    @property
    def uses_guidance(self) -> bool:
        """Classifier-free guidance is on above 1, as in diffusers (Ho & Salimans, arXiv 2207.12598)."""
        return self.guidance_scale > 1.0 and not self.embedded_guidance

    @property
    def slots(self) -> int:
        """Row-forwards that one step takes: with guidance an unconditional and a conditional one."""
        return 2 if self.uses_guidance else 1


@dataclass(frozen=True, slots=True)
class SizeRules:
    """Which image sizes a model takes, in pixels. `most`: a side that the model itself cannot go beyond."""

    native_height: int
    native_width: int
    factor: int
    min_side: int
    max_side: int | None = None

    @property
    def largest(self) -> int:
        largest = 8 * max(self.native_height, self.native_width)
        return largest if self.max_side is None else min(largest, self.max_side)


COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
"""Endings of compressed tables."""
_NUMBER = re.compile(r"#\d+$")
"""Of tables of one name the second is called `t.csv#2`: no name of a table itself ends so."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row is: the file as the user named it, the row in it, from 0, and in a text format its line, from 1."""

    file: str
    row: int
    line: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        """The place as an editor shows it: `t.csv, line 5`, else `t.parquet, row 3`."""
        return f"{self.file}, row {self.row}" if self.line is None else f"{self.file}, line {self.line}"

    @property
    def stem(self) -> str:
        """The file's name without its endings, of which it has two where it is packed, and without `#2`."""
        path = PurePosixPath(_NUMBER.sub("", self.file))
        return (path.with_suffix("") if path.suffix.lower() in COMPRESSION_SUFFIXES else path).stem


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """One image to render, and all that decides its pixels beside the run's settings.

    `replaces` is the path, relative to OUT, of an image that an earlier attempt left; `attempt` counts from 1.
    `id_collides`: the id differs from that of an earlier row by case alone; `stem_collides`: so does its file's stem
    from that of an earlier file.
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
        """What rows have in common that one call of a diffusers pipeline can make together, texts and seeds apart."""
        params = self.params
        sampling = params.num_inference_steps, params.guidance_scale, params.guidance_rescale
        return params.height, params.width, *sampling, self.negative_prompt is None

    def as_attempt(self, attempt: int, replaces: str | None) -> PromptRequest:
        """The same request as a later attempt."""
        return replace(self, attempt=attempt, replaces=replaces)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a safety check said of an image, or of a prompt.

    `nsfw` is None where nobody was asked; `reason` is the sentence of one who found it unsafe.
    """

    nsfw: bool | None = None
    checker: str | None = None
    scores: Mapping[str, float] | None = None
    reason: str | None = None

    def merge(self, other: Verdict) -> Verdict:
        """What two judges say of one image: unsafe where one finds it so, and of each score the highest."""
        names = dict.fromkeys(
            name for verdict in (self, other) if verdict.checker for name in verdict.checker.split("+")
        )
        scores = dict(self.scores or {})
        for name, score in (other.scores or {}).items():
            scores[name] = max(score, scores.get(name, score))
        words = [verdict.nsfw for verdict in (self, other) if verdict.nsfw is not None]
        reasons = dict.fromkeys(verdict.reason for verdict in (self, other) if verdict.reason)
        return Verdict(
            any(words) if words else None, "+".join(names) or None, scores or None, "; ".join(reasons) or None
        )


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image file as its sink wrote it: its path relative to OUT, its sha256 and its length in bytes.

    `pixels_sha256` is that of `images.pixels_sha256`.
    """

    path: str
    sha256: str
    image_bytes: int
    pixels_sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRow:
    """One row of a manifest part and of results.*; the fields stand in the order of the columns.

    `line`, which is in no column, is that of `Source`.
    """

    id: str
    image_index: int
    prompt: str | None
    generated_image: str | None = None
    nsfw_content_detected: bool | None = None
    status: Status
    error: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    scheduler: str | None = None
    prompt_tokens: int | None = None
    prompt_truncated: bool | None = None
    safety_checker: str | None = None
    safety_scores: Mapping[str, float] | None = None
    sha256: str | None = None
    pixels_sha256: str | None = None
    image_bytes: int | None = None
    slots: int | None = None
    seconds: float | None = None
    attempt: int = 1
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


BOOKKEEPING: frozenset[str] = frozenset({"slots", "seconds", "attempt", "worker", "finished_at"})
"""The only columns in which two runs of the same work may differ."""


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON, as 32 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def utc_now() -> datetime:
    return datetime.now(timezone.utc)
