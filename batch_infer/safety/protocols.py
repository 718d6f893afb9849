"""What a checker of images and a safety service do, and the registry that creates them.

A new one is a new module and one line of the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from batch_infer.records import Verdict
from batch_infer.settings import ServiceSettings

if TYPE_CHECKING:
    import numpy as np

IMAGE_CHECKERS: Mapping[str, tuple[str, str]] = {
    "StableDiffusionSafetyChecker": ("batch_infer.safety.checker", "StableDiffusionChecker"),
}
"""Module and class for each class of a checkpoint's safety checker. Modules load torch or libraries of an extra."""
GATES: Mapping[type, tuple[str, str]] = {
    ServiceSettings: ("batch_infer.safety.content_safety", "ContentSafety"),
}
"""Module and class for each type of service settings."""


class ImageChecker(Protocol):
    """Checks images on the device."""

    name: str

    def check(self, images: Sequence[np.ndarray]) -> list[Verdict]:
        """Return a verdict for each image (H, W, 3) uint8. All images have one size."""
        ...


class Gate(Protocol):
    """A service that checks one prompt or image per call, called by up to `concurrency` threads.

    Both checks raise FailedRowError if only this prompt or image cannot be checked, ServiceError if none can,
    SettingsError if the service refuses the credentials or settings, and StoppedError if the run stops meanwhile.
    """

    name: str
    concurrency: int

    def check_prompt(self, prompt: str) -> Verdict: ...

    def check_image(self, image: np.ndarray) -> Verdict:
        """Return the verdict on an image (H, W, 3) uint8."""
        ...

    def close(self) -> None: ...


def make_image_checker(module: Any, feature_extractor: Any, batch: int) -> ImageChecker:
    """Return the checker for a checkpoint's safety checker, which checks `batch` images per call."""
    return cast("ImageChecker", _load(IMAGE_CHECKERS[type(module).__name__])(module, feature_extractor, batch))


def make_gate(settings: ServiceSettings, stop: Callable[[], bool]) -> Gate:
    """Connect to a service. Its waits end once `stop` returns True. Raises SettingsError."""
    return cast("Gate", _load(GATES[type(settings)])(settings, stop))


def _load(entry: tuple[str, str]) -> Any:
    return getattr(import_module(entry[0]), entry[1])
