"""Describe a checkpoint and its sampling parameters for commands, engines and workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_infer.models.textual_inversion import Embedding
from batch_infer.records import Lora, SizeRules
from batch_infer.settings import Quantization, SchedulerSpec

DEMO_MODEL = Path(__file__).parent.parent / "demo_model"
ANY_PIPELINE = "any_pipeline"
"""Family name of checkpoints without a model family, which are rendered by calling their diffusers pipeline."""


@dataclass(frozen=True, slots=True)
class SamplingRules:
    """A model's limits and defaults for sampling parameters.

    `unsupported_fields` pairs each row field that the model does not support with its only valid value. With
    `embedded_guidance`, the guidance scale is a model input (Meng et al., arXiv 2210.03142), and each step needs one
    pass instead of two. `supports_lora` and `supports_embeddings` say whether diffusers can load LoRAs and textual
    inversion embeddings into the pipeline.
    """

    sizes: SizeRules
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float = 0.0
    embedded_guidance: bool = False
    unsupported_fields: tuple[tuple[str, Any], ...] = ()
    supports_lora: bool = False
    supports_embeddings: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard(SamplingRules):
    """A local checkpoint and its sampling rules.

    `name` is the Hub id, the name of the folder, the name of the file without its suffix, or "built-in demo model".
    `revision` is the commit of a Hub checkpoint, otherwise None. `pipeline` is the class in model_index.json.
    `scheduler` is the requested scheduler, or None for the checkpoint's default. `windows` is the maximum number of
    windows of 77 tokens per prompt with --long-prompts, and 1 without. `quantize` is the form of quantized weights.
    """

    name: str
    path: Path
    revision: str | None
    variant: str | None
    family: str
    pipeline: str
    fingerprint: str
    scheduler: SchedulerSpec | None
    scheduler_name: str
    scheduler_fingerprint: str
    checker_fingerprint: str | None
    loras: tuple[Lora, ...] = ()
    windows: int = 1
    quantize: Quantization | None = None
    embeddings: tuple[Embedding, ...] = ()

    @property
    def title(self) -> str:
        """The model's name followed by its LoRAs, its embeddings and the form of quantized weights."""
        name = " + ".join((self.name, *map(str, self.loras), *map(str, self.embeddings)))
        return f"{name} in {self.quantize}" if self.quantize else name

    @property
    def uses_pipeline_call(self) -> bool:
        """Whether each row runs its pipeline's own call, instead of the denoising loop of this package."""
        return self.family == ANY_PIPELINE

    @property
    def has_checker(self) -> bool:
        return self.checker_fingerprint is not None
