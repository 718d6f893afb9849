"""Compare the images and weights of a quantized model with those of the same model without quantization."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from batch_infer.bench.renderers import BatchInfer
from batch_infer.bench.report import Quality
from batch_infer.bench.settings import BenchSettings
from batch_infer.bench.subject import Subject, load_subject
from batch_infer.bench.workload import make_rows, sample_evenly
from batch_infer.images import compute_psnr
from batch_infer.models import count_weight_bytes


@dataclass(frozen=True, slots=True)
class Unquantized:
    """Images of the unquantized model by row id, the bytes of its weights, and the parameters of its denoiser."""

    images: Mapping[str, np.ndarray]
    weight_bytes: int
    denoiser_parameters: int


def render_unquantized(settings: BenchSettings, max_count: int) -> Unquantized:
    """Load the model without quantization, render up to `max_count` evenly spaced rows, and free its memory.

    Raises ModelError, SettingsError.
    """
    compute = replace(settings.compute, compiled=False)  # compiling would take longer than rendering a few rows
    plain = replace(settings, model=replace(settings.model, quantize=None), compute=compute)
    unquantized = _render(load_subject(plain, can_quantize=False), settings, max_count)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return unquantized


def _render(subject: Subject, settings: BenchSettings, max_count: int) -> Unquantized:
    rows = make_rows(settings.workload, settings.workload.sizes_of(subject.sizes), subject.defaults)
    rendered = BatchInfer(subject.model, subject.compute).render(sample_evenly(rows, max_count))
    parameters = sum(weight.numel() for weight in subject.probe.denoiser.parameters())
    return Unquantized({row.id: pixels for row, pixels in rendered}, _count_bytes(subject), parameters)


def compare_quality(subject: Subject, images: Mapping[str, np.ndarray], unquantized: Unquantized) -> Quality:
    """Compare a quantized model, and its images by row id, with the unquantized model."""
    psnr = [compute_psnr(image, images[name]) for name, image in unquantized.images.items()]
    sizes = _count_bytes(subject), unquantized.weight_bytes
    return Quality(len(psnr), statistics.mean(psnr), min(psnr), *sizes)


def _count_bytes(subject: Subject) -> int:
    model = subject.model
    return count_weight_bytes([*model.pipeline.components.values(), model.denoiser])
