"""The chain: requests in, judged images out (gate, encode, denoise, decode, check)."""

from batch_infer.chain.driven import DrivenChain
from batch_infer.chain.gated import GatedChain
from batch_infer.chain.outcomes import Rendered, Size, Unrendered
from batch_infer.chain.packed import Chain
from batch_infer.chain.shape import ChainShape

__all__ = ["Chain", "ChainShape", "DrivenChain", "GatedChain", "Rendered", "Size", "Unrendered"]
