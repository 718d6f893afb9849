"""The chain: requests in, judged images out (gate, encode, denoise, decode, check)."""

from batch_infer.chain.driven import DrivenChain
from batch_infer.chain.gated import GatedChain, Grace
from batch_infer.chain.outcomes import Elsewhere, Rendered, Size, Unrendered, nothing
from batch_infer.chain.packed import Chain
from batch_infer.chain.shape import ChainShape

__all__ = [
    "Chain",
    "ChainShape",
    "DrivenChain",
    "Elsewhere",
    "GatedChain",
    "Grace",
    "Rendered",
    "Size",
    "Unrendered",
    "nothing",
]
