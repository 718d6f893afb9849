"""Describe a checkpoint as a ModelCard without loading its weights, or load it with its family's class or AnyPipeline.

Each model family has one module, and each pipeline class of a family has one entry in the registry in families.py.
"""

from typing import TYPE_CHECKING

from batch_infer.lazy import import_on_use
from batch_infer.models.card import DEMO_MODEL, ModelCard, SamplingRules
from batch_infer.models.checkpoint import read_card
from batch_infer.models.families import load_latent_diffusion, load_solver
from batch_infer.models.lora import LoraFolder
from batch_infer.models.plain_diffusers import PlainImage, write_script
from batch_infer.models.startup import prepare_imports, skip_quantization_libraries
from batch_infer.models.tokens import TruncationCounter, load_token_counter

prepare_imports()

if TYPE_CHECKING:
    from batch_infer.models.acceleration import count_flops, decode_flops, denoise_flops, is_compiled, optimize_networks
    from batch_infer.models.any_pipeline import AnyPipeline
    from batch_infer.models.architectures import build_architecture
    from batch_infer.models.latent_diffusion import Conditioning, LatentDiffusion
    from batch_infer.models.loading import load_checker
    from batch_infer.models.pipeline_rules import inspect_pipeline
    from batch_infer.models.quantization import count_weight_bytes
else:
    __getattr__ = import_on_use(
        __name__,
        acceleration=("count_flops", "decode_flops", "denoise_flops", "is_compiled", "optimize_networks"),
        any_pipeline=("AnyPipeline",),
        architectures=("build_architecture",),
        latent_diffusion=("Conditioning", "LatentDiffusion"),
        loading=("load_checker",),
        pipeline_rules=("inspect_pipeline",),
        quantization=("count_weight_bytes",),
    )

__all__ = [
    "AnyPipeline",
    "Conditioning",
    "DEMO_MODEL",
    "LatentDiffusion",
    "LoraFolder",
    "ModelCard",
    "PlainImage",
    "SamplingRules",
    "TruncationCounter",
    "build_architecture",
    "count_flops",
    "count_weight_bytes",
    "decode_flops",
    "denoise_flops",
    "inspect_pipeline",
    "is_compiled",
    "load_checker",
    "load_latent_diffusion",
    "load_solver",
    "load_token_counter",
    "optimize_networks",
    "read_card",
    "skip_quantization_libraries",
    "write_script",
]
