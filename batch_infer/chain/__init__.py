"""The chain: requests in, judged images out (encode, denoise, decode, check)."""

from batch_infer.chain.driven import DrivenChain
from batch_infer.chain.outcomes import Rendered, Size, Unrendered
from batch_infer.chain.packed import Chain
from batch_infer.chain.shape import ChainShape

__all__ = ["Chain", "ChainShape", "DrivenChain", "Rendered", "Size", "Unrendered"]
