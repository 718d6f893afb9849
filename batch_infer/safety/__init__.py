"""Safety checks: of images once they are rendered, and of prompts before."""

from typing import TYPE_CHECKING

from batch_infer.lazy import import_on_use
from batch_infer.safety.protocols import Gate, ImageChecker, make_gate

if TYPE_CHECKING:
    from batch_infer.safety.checker import StableDiffusionChecker
    from batch_infer.safety.content_safety import check_credentials
else:
    __getattr__ = import_on_use(
        __name__,
        checker=("StableDiffusionChecker",),
        content_safety=("check_credentials",),
    )

__all__ = ["Gate", "ImageChecker", "StableDiffusionChecker", "check_credentials", "make_gate"]
