"""Chains render requests on one device, up to checked images: gate, encode, denoise, decode, check.

StepLevelChain batches single steps of many rows, PipelineCallChain calls of a diffusers pipeline, and GatedChain has
the prompts and images of one of them checked by a safety service.
"""

from typing import TYPE_CHECKING

from batch_infer.chain.base import BatchSizes, Chain, DeviceChain, RenderedImage, RowOutcome, UnrenderedRow
from batch_infer.chain.sources import NoRequest, RequestSource
from batch_infer.lazy import import_on_use

if TYPE_CHECKING:
    from batch_infer.chain.gated import GatedChain, GracePeriod
    from batch_infer.chain.pipeline_call import PipelineCallChain
    from batch_infer.chain.step_level import StepLevelChain
else:
    __getattr__ = import_on_use(
        __name__,
        gated=("GatedChain", "GracePeriod"),
        pipeline_call=("PipelineCallChain",),
        step_level=("StepLevelChain",),
    )

__all__ = [
    "BatchSizes",
    "Chain",
    "DeviceChain",
    "GatedChain",
    "GracePeriod",
    "NoRequest",
    "RowOutcome",
    "PipelineCallChain",
    "RenderedImage",
    "RequestSource",
    "StepLevelChain",
    "UnrenderedRow",
]
