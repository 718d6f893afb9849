"""The chain: requests in, judged images out (gate, encode, denoise, decode, check)."""

from batch_infer.chain.gated import GatedChain, Grace
from batch_infer.chain.outcomes import Elsewhere, Rendered, Size, Unrendered, nothing
from batch_infer.chain.pipeline_call import PipelineCallChain
from batch_infer.chain.shape import ChainShape
from batch_infer.chain.step_level import StepLevelChain

__all__ = [
    "StepLevelChain",
    "ChainShape",
    "PipelineCallChain",
    "Elsewhere",
    "GatedChain",
    "Grace",
    "Rendered",
    "Size",
    "Unrendered",
    "nothing",
]
