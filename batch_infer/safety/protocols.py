"""What a checker of images and a safety service do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from batch_infer.records import Verdict
from batch_infer.settings import ServiceSettings

if TYPE_CHECKING:
    import numpy as np


class ImageChecker(Protocol):
    """Says of images what it thinks of them; `images` are (H, W, 3) uint8, all of one size."""

    name: str

    def check(self, images: Sequence[np.ndarray]) -> list[Verdict]: ...


class Gate(Protocol):
    """A service that is asked about one prompt or one image at a time, by up to `at_once` threads.

    Both raise RowBroken where it has no word on this one alone, ServiceError where it has none on any, SettingsError
    where it does not take who asks, and Interrupted where the run stops meanwhile.
    """

    name: str
    at_once: int

    def check_prompt(self, prompt: str) -> Verdict:
        """What it says of a prompt; one that it finds unsafe is not rendered."""
        ...

    def check_image(self, image: np.ndarray) -> Verdict:
        """What it says of an image (H, W, 3) uint8."""
        ...

    def close(self) -> None: ...


def make_gate(settings: ServiceSettings | None, stop: Callable[[], bool]) -> Gate | None:
    """The service that is to be asked, where one is; `stop` ends every wait for it. Raises SettingsError."""
    if settings is None:
        return None
    from batch_infer.safety.content_safety import ContentSafety  # imports Azure's libraries

    return ContentSafety(settings, stop)
