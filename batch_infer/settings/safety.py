"""Who judges prompts and images, and what becomes of what they find unsafe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from batch_infer.errors import SettingsError

SafetyMode = Literal["auto", "checker", "azure", "checker,azure", "none"]
OnFlagged = Literal["blank", "keep", "blur", "quarantine", "drop"]
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
            redacted = re.sub(r"(?<=://)[^/]*@|[?#].*", "", endpoint)  # either may be a secret
            raise SettingsError(f"CONTENT_SAFETY_ENDPOINT={redacted}: say https://NAME.cognitiveservices.azure.com")
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
    """Who judges prompts and images, and what becomes of an image that is flagged. `service` is asked where given.

    `on_flagged` None: as in the run that OUT holds, else `blank`.
    """

    mode: SafetyMode = "auto"
    on_flagged: OnFlagged | None = None
    required: bool = False
    service: ServiceSettings | None = None

    @property
    def policy(self) -> OnFlagged:
        """What is stored of a flagged image."""
        return self.on_flagged or "blank"

    def continuing(self, earlier: SafetySettings | None) -> SafetySettings:
        """Return these settings with a policy: the one requested, else that of the earlier run, else `blank`."""
        return replace(self, on_flagged=self.on_flagged or (earlier or self).policy)

    def shared_by(self, workers: int) -> SafetySettings:
        """What one of several workers may ask of the service, which counts them together."""
        if self.service is None:
            return self
        rate = self.service.requests_per_second / max(1, workers)
        return replace(self, service=replace(self.service, requests_per_second=rate))

    def asks_checker(self, *, has_checker: bool) -> bool:
        """Whether the model's own checker judges its images."""
        return self.mode in ("auto", "checker", "checker,azure") and has_checker
