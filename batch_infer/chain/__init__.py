"""Chains render requests on one device: they encode prompts, denoise and decode latents, and may check images.

StepLevelChain batches rows for each denoising step. GatedChain wraps it, and sends the prompts and images to a safety
service.
"""

from typing import TYPE_CHECKING

from batch_infer.chain.base import (
    BatchSizes,
    Chain,
    DeviceChain,
    NoRequest,
    RenderedImage,
    RequestSource,
    RowOutcome,
    UnrenderedRow,
)
from batch_infer.lazy import import_on_use

if TYPE_CHECKING:
    from batch_infer.chain.gated import GatedChain
    from batch_infer.chain.step_level import StepLevelChain
else:
    __getattr__ = import_on_use(__name__, gated=("GatedChain",), step_level=("StepLevelChain",))

__all__ = [
    "BatchSizes",
    "Chain",
    "DeviceChain",
    "GatedChain",
    "NoRequest",
    "RenderedImage",
    "RequestSource",
    "RowOutcome",
    "StepLevelChain",
    "UnrenderedRow",
]
