"""Models: what a checkpoint is, read without loading it, and the families that can run it."""

import os

# Before either is imported: their advice (which image processor, which flag) is not addressed to the user of a table.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
# transformers would fetch and run kernels from the Hub for some networks.
os.environ.setdefault("USE_HUB_KERNELS", "NO")

from typing import TYPE_CHECKING

from batch_infer.lazy import import_on_use
from batch_infer.models.card import DEMO_MODEL, ModelCard, read_card
from batch_infer.models.families import (
    inspect_pipeline,
    load_any_pipeline,
    load_checker,
    load_latent_diffusion,
    load_solver,
    load_token_counter,
)
from batch_infer.models.layouts import SamplingRules
from batch_infer.models.tokens import TokenCounter, TruncationCounter

if TYPE_CHECKING:
    from batch_infer.models.acceleration import is_compiled, optimize_networks
    from batch_infer.models.any_pipeline import AnyPipeline
    from batch_infer.models.architectures import build_architecture
    from batch_infer.models.family import Conditioning, LatentDiffusion
    from batch_infer.models.flops import decode_flops, denoise_flops
else:
    __getattr__ = import_on_use(
        __name__,
        acceleration=(
            "is_compiled",
            "optimize_networks",
        ),
        any_pipeline=("AnyPipeline",),
        architectures=("build_architecture",),
        family=(
            "Conditioning",
            "LatentDiffusion",
        ),
        flops=(
            "decode_flops",
            "denoise_flops",
        ),
    )

__all__ = [
    "AnyPipeline",
    "Conditioning",
    "DEMO_MODEL",
    "LatentDiffusion",
    "ModelCard",
    "SamplingRules",
    "TokenCounter",
    "TruncationCounter",
    "build_architecture",
    "decode_flops",
    "is_compiled",
    "load_latent_diffusion",
    "load_checker",
    "load_any_pipeline",
    "load_solver",
    "load_token_counter",
    "read_card",
    "inspect_pipeline",
    "denoise_flops",
    "optimize_networks",
]
