"""Define the settings for safety checks of prompts and images, and for flagged images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType, structs

from batch_infer.errors import SettingsError

SafetyMode = Literal["auto", "checker", "azure", "checker,azure", "none"]
OnFlagged = Literal["blank", "keep", "blur", "quarantine", "drop"]
_ENDPOINT = re.compile(r"https://[^/\s@?#]+/?|http://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?/?")
"""http is allowed only for this machine, because the key must not leave it without TLS."""
_API_VERSION = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(-preview)?")
DEFAULT_API_VERSION = "2024-09-01"
"""Oldest version that the service supports since March 2025, and its only stable one:
https://learn.microsoft.com/azure/ai-services/content-safety/whats-new#october-2024."""
CATEGORIES = ("Hate", "SelfHarm", "Sexual", "Violence")
"""Categories of Azure AI Content Safety. Severities are 0, 2, 4 or 6."""


class ServiceSettings(msgspec.Struct, frozen=True, rename={"timeout_seconds": "patience"}):
    """Settings for Azure AI Content Safety.

    A severity above its category's threshold blocks a prompt or flags an image. A match in a blocklist of the Azure
    resource blocks a prompt. Thresholds are in the order of CATEGORIES. The API key is not a setting: it is read from
    the environment.
    """

    endpoint: str
    thresholds: tuple[int, ...] = (1, 1, 1, 1)
    blocklists: tuple[str, ...] = ()
    requests_per_second: float = 100.0
    """Maximum rate of all workers together, which `split_among` divides. The service accepts 1,000 requests in 10 s."""
    timeout_seconds: float = 120.0
    """Seconds without an answer after which a row fails, or the run ends if the service answers no row.

    The key in run.json is `patience`.
    """
    api_version: str | UnsetType = UNSET
    """Version of the service's API. UNSET means DEFAULT_API_VERSION, and run.json then has no such key."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> ServiceSettings | None:
        """Read the CONTENT_SAFETY_* variables, or return None if no endpoint is set. Raises SettingsError."""
        endpoint = environment.get("CONTENT_SAFETY_ENDPOINT", "").strip()
        if not endpoint:
            return None
        if not _ENDPOINT.fullmatch(endpoint):
            redacted = re.sub(r"(?<=://)[^/]*@|[?#].*", "", endpoint)  # user info and query may be secrets
            raise SettingsError(
                f"CONTENT_SAFETY_ENDPOINT={redacted}: expected https://NAME.cognitiveservices.azure.com"
            )
        thresholds = _parse_thresholds(environment.get("CONTENT_SAFETY_THRESHOLD", ""))
        blocklists = environment.get("CONTENT_SAFETY_BLOCKLISTS", "").split(",")
        rate = environment.get("CONTENT_SAFETY_REQUESTS_PER_SECOND", "").strip() or "100"
        if not re.fullmatch(r"\d+(\.\d+)?", rate) or not float(rate):
            raise SettingsError(f"CONTENT_SAFETY_REQUESTS_PER_SECOND={rate}: expected a number, such as 100")
        names = tuple(name.strip() for name in blocklists if name.strip())
        version = _parse_api_version(environment.get("CONTENT_SAFETY_API_VERSION", ""))
        return cls(endpoint, thresholds, names, float(rate), api_version=version)


def _parse_api_version(text: str) -> str | UnsetType:
    """Return the version, or UNSET for the default version. Raises SettingsError."""
    version = text.strip() or DEFAULT_API_VERSION
    if not _API_VERSION.fullmatch(version):
        raise SettingsError(f"CONTENT_SAFETY_API_VERSION={text}: expected YYYY-MM-DD or YYYY-MM-DD-preview")
    return UNSET if version == DEFAULT_API_VERSION else version


def _parse_thresholds(text: str) -> tuple[int, ...]:
    """Parse `1`, `Hate=3,Sexual=1` or `1,Hate=3` into one threshold per category, by default 1.

    Raises SettingsError.
    """
    parts = [part.rpartition("=") for part in text.split(",") if part.strip()]
    pairs = [(name.strip() if equals else None, number.strip()) for name, equals, number in parts]
    names = [name for name, _ in pairs]
    is_valid = all(name in (None, *CATEGORIES) for name in names) and len(set(names)) == len(names)
    if not is_valid or not all(re.fullmatch("[0-7]", number) for _, number in pairs):
        raise SettingsError(
            f"CONTENT_SAFETY_THRESHOLD={text}: expected a number from 0 to 7, or {CATEGORIES[0]}=3,{CATEGORIES[2]}=1,"
            f" each once; the categories are {', '.join(CATEGORIES)}"
        )
    levels = {name: int(number) for name, number in pairs}
    return tuple(levels.get(name, levels.get(None, 1)) for name in CATEGORIES)


@dataclass(frozen=True, slots=True)
class SafetySettings:
    """Safety checks, and how to store flagged images.

    If `service` is set, Azure AI Content Safety checks prompts and images. If `on_flagged` is None, the policy of the
    earlier run in OUT applies, or `blank` if there is none.
    """

    mode: SafetyMode = "auto"
    on_flagged: OnFlagged | None = None
    required: bool = False
    service: ServiceSettings | None = None

    @property
    def policy(self) -> OnFlagged:
        """How to store a flagged image."""
        return self.on_flagged or "blank"

    def with_policy_of(self, earlier: SafetySettings | None) -> SafetySettings:
        """Return a copy with the requested policy, else the earlier run's policy, else `blank`."""
        return replace(self, on_flagged=self.on_flagged or (earlier or self).policy)

    def split_among(self, workers: int) -> SafetySettings:
        """Return the settings for one of several workers, which share the service's request rate."""
        if self.service is None:
            return self
        rate = self.service.requests_per_second / max(1, workers)
        return replace(self, service=structs.replace(self.service, requests_per_second=rate))

    def uses_checker(self, *, has_checker: bool) -> bool:
        """Return whether the model's own checker checks its images."""
        return self.mode in ("auto", "checker", "checker,azure") and has_checker
