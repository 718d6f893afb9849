"""Check prompts before rendering and images afterwards.

An ImageChecker calls a model on the device, and a Gate calls a service. `protocols` has a registry for each kind.
"""

from typing import TYPE_CHECKING

from batch_infer.lazy import import_on_use
from batch_infer.safety.protocols import Gate, ImageChecker, make_gate, make_image_checker

if TYPE_CHECKING:
    from batch_infer.safety.content_safety import check_credentials
else:
    __getattr__ = import_on_use(__name__, content_safety=("check_credentials",))

__all__ = ["Gate", "ImageChecker", "check_credentials", "make_gate", "make_image_checker"]
