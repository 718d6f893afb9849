"""What Azure AI Content Safety answers, read strictly: what does not say all that was asked is no answer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from batch_infer.records import Verdict, utc_now
from batch_infer.settings import CATEGORIES, ServiceSettings

SERVICE, NAME = "Azure AI Content Safety", "azure_content_safety"
HIGHEST_SEVERITY = 7
Kind = Literal["prompt", "image"]
"""The service judges these by different models, and one of them can be down alone."""
UNREADABLE = "an answer that cannot be read"


class NoAnswer(Exception):
    """An attempt brought no answer, and the same question is to be asked again, not before `retry_after` seconds."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Answer:
    """The severity of each category, from 0 to 7, and the names of the blocklists that were hit."""

    severities: Mapping[str, int]
    blocklists: frozenset[str] = frozenset()

    @classmethod
    def read(cls, body: Any, *, with_blocklists: bool = False) -> Answer:
        """Read the JSON of an answer. Raises NoAnswer where it is not the documented shape with all that was asked."""
        try:
            found = [(entry["category"], entry["severity"]) for entry in body["categoriesAnalysis"]]
            matches = body["blocklistsMatch"] if with_blocklists else body.get("blocklistsMatch") or []
            if not isinstance(matches, list):
                raise NoAnswer(UNREADABLE)
            hits = frozenset(match["blocklistName"] for match in matches)
        except (KeyError, TypeError, AttributeError):
            raise NoAnswer(UNREADABLE) from None
        severities = {name: _highest(name, found) for name in CATEGORIES}
        if not all(isinstance(name, str) for name in hits):
            raise NoAnswer("an answer with a blocklist that has no name")
        return cls(severities, hits)


def _highest(category: str, found: Iterable[tuple[Any, Any]]) -> int:
    severities = [severity for name, severity in found if name == category]
    if not severities:
        raise NoAnswer(f"an answer without the category {category}")
    # Not isinstance: a bool is an int, and no severity.
    if any(type(severity) is not int or not 0 <= severity <= HIGHEST_SEVERITY for severity in severities):
        raise NoAnswer(f"an answer without a severity for the category {category}")
    highest: int = max(severities)
    return highest


def verdict_of(kind: Kind, answers: Iterable[Answer], settings: ServiceSettings) -> Verdict:
    """What the answers on all pieces of one prompt, or on one image, come to: the highest severities, and all hits."""
    found = list(answers)
    severities = {name: max(answer.severities[name] for answer in found) for name in CATEGORIES}
    hits = [f"blocklist {name}" for name in sorted(frozenset().union(*(answer.blocklists for answer in found)))]
    limits = zip(severities.items(), settings.thresholds, strict=True)
    over = [*(f"{name} {severity}" for (name, severity), limit in limits if severity > limit), *hits]
    scores = {**{name: float(severity) for name, severity in severities.items()}, **dict.fromkeys(hits, 1.0)}
    done = "refused the prompt" if kind == "prompt" else "flagged the image"
    return Verdict(bool(over), NAME, scores, f"{SERVICE} {done} ({', '.join(over)})" if over else None)


def retry_after(header: str | None) -> float | None:
    """Seconds from now that a Retry-After header says, as a number or as a date; None where it says neither."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return None
        # A date of -0000 comes without a zone, and is UTC like all others in HTTP.
        seconds = (date.replace(tzinfo=date.tzinfo or timezone.utc) - utc_now()).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None
