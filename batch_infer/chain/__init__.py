"""The chain: requests in, judged images out (gate, encode, denoise, decode, check)."""

from typing import TYPE_CHECKING

from batch_infer.lazy import import_on_use

if TYPE_CHECKING:
    from batch_infer.chain.gated import GatedChain, GracePeriod
    from batch_infer.chain.outcomes import Elsewhere, Rendered, Size, Unrendered, nothing
    from batch_infer.chain.pipeline_call import PipelineCallChain
    from batch_infer.chain.shape import BatchSizes
    from batch_infer.chain.step_level import StepLevelChain
else:
    __getattr__ = import_on_use(
        __name__,
        gated=(
            "GatedChain",
            "GracePeriod",
        ),
        outcomes=(
            "Elsewhere",
            "Rendered",
            "Size",
            "Unrendered",
            "nothing",
        ),
        pipeline_call=("PipelineCallChain",),
        shape=("BatchSizes",),
        step_level=("StepLevelChain",),
    )

__all__ = [
    "BatchSizes",
    "Elsewhere",
    "GatedChain",
    "GracePeriod",
    "PipelineCallChain",
    "Rendered",
    "Size",
    "StepLevelChain",
    "Unrendered",
    "nothing",
]
