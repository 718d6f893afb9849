"""Requests to and responses from Azure AI Content Safety: within its limits, and parsed strictly."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import numpy as np
from PIL import Image

from batch_infer.records import Verdict, utc_now
from batch_infer.settings import CATEGORIES, ServiceSettings

SERVICE, NAME = "Azure AI Content Safety", "azure_content_safety"
Kind = Literal["prompt", "image"]
"""The service checks these with different models, and one of them can be down alone."""
HIGHEST_SEVERITY = 7
UNREADABLE = "a response that cannot be parsed"

TEXT_LENGTH = 10_000
"""Limit of one request in Unicode code points, as Python counts them."""
OVERLAP = 200
"""Code points that two pieces of a text share: longer than a phrase, and cheap to send twice."""
SHORTEST_SIDE, LONGEST_SIDE = 50, 2048
IMAGE_BYTES = 4 * 1024 * 1024
"""Limit of the file: the service counts it before base64 makes it a third longer."""
PNG_LEVEL = 1
JPEG_QUALITIES = (95, 90, 80, 65, 50, 30)
"""Noise of the largest size is far below the limit at the last one."""


class NoAnswerError(Exception):
    """A request failed with an error that may pass, and may be sent again after `retry_after` seconds."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Analysis:
    """The severity of each category, from 0 to 7, and the names of the blocklists that were hit."""

    severities: Mapping[str, int]
    blocklists: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, body: Any, *, with_blocklists: bool = False) -> Analysis:
        """Parse the JSON of a response. Raises NoAnswerError if a category or the requested blocklists are missing."""
        try:
            entries = [(entry["category"], entry["severity"]) for entry in body["categoriesAnalysis"]]
            matches = body["blocklistsMatch"] if with_blocklists else body.get("blocklistsMatch") or []
            if not isinstance(matches, list):
                raise NoAnswerError(UNREADABLE)
            hits = frozenset(match["blocklistName"] for match in matches)
        except (KeyError, TypeError, AttributeError):
            raise NoAnswerError(UNREADABLE) from None
        severities = {name: _highest(name, entries) for name in CATEGORIES}
        if not all(isinstance(name, str) for name in hits):
            raise NoAnswerError("a response with a blocklist without a name")
        return cls(severities, hits)


def _highest(category: str, entries: Iterable[tuple[Any, Any]]) -> int:
    severities = [severity for name, severity in entries if name == category]
    if not severities:
        raise NoAnswerError(f"a response without the category {category}")
    # Not isinstance: a bool is an int, but not a severity.
    if any(type(severity) is not int or not 0 <= severity <= HIGHEST_SEVERITY for severity in severities):
        raise NoAnswerError(f"a response without a severity for the category {category}")
    highest: int = max(severities)
    return highest


def make_verdict(kind: Kind, analyses: Iterable[Analysis], settings: ServiceSettings) -> Verdict:
    """Return the verdict on one prompt or image: the highest severities and all blocklist hits of its pieces."""
    pieces = list(analyses)
    severities = {name: max(piece.severities[name] for piece in pieces) for name in CATEGORIES}
    hits = [f"blocklist {name}" for name in sorted(frozenset().union(*(piece.blocklists for piece in pieces)))]
    limits = zip(severities.items(), settings.thresholds, strict=True)
    over = [*(f"{name} {severity}" for (name, severity), limit in limits if severity > limit), *hits]
    scores = {**{name: float(severity) for name, severity in severities.items()}, **dict.fromkeys(hits, 1.0)}
    action = "refused the prompt" if kind == "prompt" else "flagged the image"
    return Verdict(bool(over), NAME, scores, f"{SERVICE} {action} ({', '.join(over)})" if over else None)


def parse_retry_after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which is a number or a date, or None if it is neither."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return None
        # A date of -0000 has no time zone here, and is UTC as all dates in HTTP.
        seconds = (date.replace(tzinfo=date.tzinfo or timezone.utc) - utc_now()).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def split_text(text: str) -> Iterator[str]:
    """Yield pieces of at most 10,000 code points. Each begins with the last 200 of the piece before.

    So a phrase of up to 200 code points is whole in one piece. An empty text is one empty piece.
    """
    for start in range(0, max(len(text) - OVERLAP, 1), TEXT_LENGTH - OVERLAP):
        yield text[start : start + TEXT_LENGTH]


def encode_image(pixels: np.ndarray) -> bytes:
    """Return an image (H, W, 3) uint8 as a PNG, or as a JPEG if the PNG is above the size limit."""
    image = fit_image(Image.fromarray(pixels))
    content = _save(image, "PNG", compress_level=PNG_LEVEL)
    qualities = iter(JPEG_QUALITIES)
    while len(content) > IMAGE_BYTES:
        content = _save(image, "JPEG", quality=next(qualities))
    return content


def fit_image(image: Image.Image) -> Image.Image:
    """Scale the image to sides of 50 to 2048 pixels, and add black borders if it is too narrow for that."""
    scale = max(SHORTEST_SIDE / min(image.size), 1)
    scale = min(scale, LONGEST_SIDE / max(image.size))
    width, height = (min(max(round(side * scale), 1), LONGEST_SIDE) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    frame = max(width, SHORTEST_SIDE), max(height, SHORTEST_SIDE)
    if frame == image.size:
        return image
    framed = Image.new(image.mode, frame)
    framed.paste(image, ((frame[0] - width) // 2, (frame[1] - height) // 2))
    return framed


def _save(image: Image.Image, file_format: str, **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()
