"""The arithmetic of a model: what one row of a UNet call and one decoded image cost at least.

Counted, not timed: the networks are walked through with tensors that have a shape and no content. One multiply-add is
two FLOP, and the products of attention are among them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from batch_infer.models.family import LatentDiffusion
from batch_infer.records import PromptRequest, SamplingParams, Source

LatentShape = tuple[int, int, int]


def denoise_flops(model: LatentDiffusion, latent_shape: LatentShape) -> int:
    """FLOP of one row of one UNet call on latents (C, h, w). Encodes a prompt, and computes nothing else."""
    params = SamplingParams(8 * latent_shape[1], 8 * latent_shape[2], 1, 1.0, 0.0)
    (conditioning,) = model.condition([PromptRequest("flops", 0, "", None, 0, params, Source("", 0), "")])
    parts = {name: (part.shape, part.dtype) for name, part in conditioning.context[0].items()}

    def call() -> None:
        sample = torch.empty(1, *latent_shape, dtype=model.dtype, device=model.device)
        context = {name: torch.empty(1, *shape, dtype=of, device=model.device) for name, (shape, of) in parts.items()}
        model.denoise(sample, torch.empty(1, device=model.device), context)

    return _count(call)


def decode_flops(model: LatentDiffusion, latent_shape: LatentShape) -> int:
    """FLOP of decoding one image from latents (C, h, w). Computes nothing."""
    return _count(lambda: model.decode(torch.empty(1, *latent_shape, device=model.device)))


def _count(call: Callable[[], object]) -> int:
    # Attention as plain products: the counter does not know all of the fused kernels. Compiled code would hide its
    # operations altogether.
    with (
        torch.compiler.set_stance("force_eager"),
        sdpa_kernel(SDPBackend.MATH),
        FakeTensorMode(allow_non_fake_inputs=True),
        FlopCounterMode(display=False) as counter,
    ):
        call()
    return int(counter.get_total_flops())
