"""Build released architectures at full size with random weights, for benchmarks without downloads."""

from batch_infer.models.architectures.pipelines import PIPELINES, build_architecture, build_pipeline

__all__ = ["PIPELINES", "build_architecture", "build_pipeline"]
