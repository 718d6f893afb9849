"""Define the protocols of image checkers and safety services, and create them from registries.

A new checker needs a module and one line in a registry. A new service also needs a class of settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol

from batch_infer.records import Verdict
from batch_infer.settings import ServiceSettings

if TYPE_CHECKING:
    import numpy as np

IMAGE_CHECKERS: Mapping[str, str] = {
    "StableDiffusionSafetyChecker": "batch_infer.safety.checker:StableDiffusionChecker",
}
"""Import paths of image checkers, by class name of a checkpoint's safety checker. Importing one loads torch."""
GATES: Mapping[type, str] = {ServiceSettings: "batch_infer.safety.content_safety:ContentSafety"}
"""Import paths of gates, by type of service settings. Importing one loads NumPy and Pillow."""


class ImageChecker(Protocol):
    """Checks images on the device."""

    name: str

    def check(self, images: Sequence[np.ndarray]) -> list[Verdict]:
        """Return a verdict for each image (H, W, 3) uint8. All images have the same size."""
        ...


class Gate(Protocol):
    """A service that checks one prompt or image per call. Up to `concurrency` threads may call it.

    Both checks raise FailedRowError if only this prompt or image cannot be checked, ServiceError if none can,
    SettingsError if the service rejects the credentials or settings, and StoppedError if the run stops.
    """

    name: str
    concurrency: int

    def check_prompt(self, prompt: str) -> Verdict: ...

    def check_image(self, image: np.ndarray) -> Verdict:
        """Return the verdict on an image (H, W, 3) uint8."""
        ...

    def close(self) -> None: ...


def make_image_checker(module: Any, feature_extractor: Any, batch: int) -> ImageChecker:
    """Create the image checker that calls `module`, a checkpoint's safety checker, with `batch` inputs at a time."""
    checker: ImageChecker = resolve_name(IMAGE_CHECKERS[type(module).__name__])(module, feature_extractor, batch)
    return checker


def make_gate(settings: ServiceSettings, stop: Callable[[], bool]) -> Gate:
    """Create the gate for a service. Its waits between requests end when `stop` returns True. Raises SettingsError."""
    gate: Gate = resolve_name(GATES[type(settings)])(settings, stop)
    return gate
