"""Build requests to Azure AI Content Safety within its limits, and parse its responses strictly."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from batch_infer.records import Verdict, utc_now
from batch_infer.settings import CATEGORIES, ServiceSettings

SERVICE = "Azure AI Content Safety"
CHECKER_NAME = "azure_content_safety"
Kind = Literal["prompt", "image"]
"""Kind of content. The service has a model for each kind, so outages are detected separately for each."""
MAX_SEVERITY = 7
UNREADABLE = "a response that cannot be parsed"

MAX_TEXT_LENGTH = 10_000
"""Maximum length of the text in one request, in Unicode code points as Python counts them."""
OVERLAP = 200
"""Number of code points that adjacent pieces of a text share: more than a phrase has, and cheap to send twice."""
MIN_SIDE, MAX_SIDE = 50, 2048
"""Minimum and maximum side of an image in pixels."""
MAX_IMAGE_BYTES = 4 * 1024 * 1024
"""Maximum size of an image file in bytes, before base64 makes it a third larger."""
ENCODINGS: tuple[tuple[str, dict[str, int]], ...] = (
    ("PNG", {"compress_level": 1}),
    *(("JPEG", {"quality": quality}) for quality in (95, 90, 80, 65, 50, 30)),
)
"""Encodings to try in order until a file is small enough. The last suffices even for noise of the maximum size."""


class NoAnswerError(Exception):
    """A request failed with a temporary error. `retry_after` is the service's advice in seconds, or None."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Analysis:
    """The severity of each category, from 0 to 7, and the names of matching blocklists."""

    severities: Mapping[str, int]
    blocklists: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, body: Any, *, with_blocklists: bool = False) -> Analysis:
        """Parse the JSON of a response.

        Raises NoAnswerError if it is malformed, or if a category or the requested blocklists are missing.
        """
        try:
            entries = [(entry["category"], entry["severity"]) for entry in body["categoriesAnalysis"]]
            matches = body["blocklistsMatch"] if with_blocklists else body.get("blocklistsMatch") or []
            if not isinstance(matches, list):
                raise NoAnswerError(UNREADABLE)
            blocklists = frozenset(match["blocklistName"] for match in matches)
        except (KeyError, TypeError, AttributeError):
            raise NoAnswerError(UNREADABLE) from None
        severities = {name: _highest_severity(name, entries) for name in CATEGORIES}
        if not all(isinstance(name, str) for name in blocklists):
            raise NoAnswerError("a response with a blocklist without a name")
        return cls(severities, blocklists)


def _highest_severity(category: str, entries: Iterable[tuple[Any, Any]]) -> int:
    severities = [severity for name, severity in entries if name == category]
    if not severities:
        raise NoAnswerError(f"a response without the category {category}")
    # Not isinstance: a bool is an int, but not a severity.
    if any(type(severity) is not int or not 0 <= severity <= MAX_SEVERITY for severity in severities):
        raise NoAnswerError(f"a response without a severity for the category {category}")
    return int(max(severities))


def make_verdict(kind: Kind, analyses: Iterable[Analysis], settings: ServiceSettings) -> Verdict:
    """Return the verdict on one prompt or image: the highest severities and all blocklist matches of its pieces."""
    pieces = list(analyses)
    severities = {name: max(piece.severities[name] for piece in pieces) for name in CATEGORIES}
    matches = [f"blocklist {name}" for name in sorted(frozenset().union(*(piece.blocklists for piece in pieces)))]
    thresholds = zip(severities.items(), settings.thresholds, strict=True)
    reasons = [f"{name} {severity}" for (name, severity), threshold in thresholds if severity > threshold] + matches
    scores = {**{name: float(severity) for name, severity in severities.items()}, **dict.fromkeys(matches, 1.0)}
    action = "refused the prompt" if kind == "prompt" else "flagged the image"
    reason = f"{SERVICE} {action} ({', '.join(reasons)})" if reasons else None
    return Verdict(bool(reasons), CHECKER_NAME, scores, reason)


def parse_retry_after(header: str | None) -> float | None:
    """Convert a Retry-After header, a number or a date, to seconds. Returns None if it is absent or neither."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return None
        # Python returns no time zone for -0000, but all dates in HTTP are UTC.
        seconds = (date.replace(tzinfo=date.tzinfo or timezone.utc) - utc_now()).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def split_text(text: str) -> Iterator[str]:
    """Yield pieces of up to 10,000 code points. Each later piece begins with the last 200 of the previous one.

    A phrase of up to 200 code points is therefore complete in at least one piece. An empty text is one empty piece.
    """
    for start in range(0, max(len(text) - OVERLAP, 1), MAX_TEXT_LENGTH - OVERLAP):
        yield text[start : start + MAX_TEXT_LENGTH]


def encode_image(pixels: np.ndarray) -> bytes:
    """Fit an image (H, W, 3) uint8, and encode it as PNG, or as JPEG if the PNG exceeds the size limit."""
    image = fit_image(Image.fromarray(pixels))
    for file_format, options in ENCODINGS:
        stream = io.BytesIO()
        image.save(stream, file_format, **options)
        if stream.tell() <= MAX_IMAGE_BYTES:
            break
    return stream.getvalue()


def fit_image(image: Image.Image) -> Image.Image:
    """Scale an image, if necessary, to sides of 50 to 2048 pixels. If it is too narrow for both, add black borders."""
    scale = min(max(MIN_SIDE / min(image.size), 1), MAX_SIDE / max(image.size))
    width, height = (min(max(round(side * scale), 1), MAX_SIDE) for side in image.size)
    x, y = max(MIN_SIDE - width, 0), max(MIN_SIDE - height, 0)
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return ImageOps.expand(resized, (x // 2, y // 2, x - x // 2, y - y // 2))
