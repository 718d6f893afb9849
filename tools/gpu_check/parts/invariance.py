"""Check batch invariance of the UNet and decoder: equal bytes at every batch position and among any other rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from batch_infer.bench.subject import Subject, load_subject
from tools.gpu_check import subjects

if TYPE_CHECKING:
    from tools.gpu_check.recorder import Recorder

Inputs = dict[str, torch.Tensor]
Network = Callable[[Inputs], torch.Tensor]


def run(recorder: Recorder) -> None:
    """Compile by rendering a few rows, then compare bytes in compiled and eager mode."""
    subject = load_subject(subjects.bench_settings(recorder))
    with recorder.section("first images") as results:
        results |= subjects.render_first_images(subject)
    modes = {"compiled": "default", "eager": "force_eager"} if subject.compute.compiled else {"eager": "force_eager"}
    for mode, stance in modes.items():
        for name, make_case in (("unet", unet_case), ("decoder", decoder_case)):
            with recorder.section(f"{name}, {mode}") as results, torch.compiler.set_stance(stance):
                network, inputs, others = make_case(subject)
                results |= compare_batches(network, inputs, others)


def unet_case(subject: Subject) -> tuple[Network, Inputs, Inputs]:
    """Return the UNet and two sets of random inputs that fill its batch."""
    model, slots = subjects.family_model(subject), subject.compute.slots
    shape = model.latent_shape(*subjects.native_size(subject))
    generator = torch.Generator(model.device).manual_seed(1)

    def make_inputs() -> Inputs:
        context = {
            name: _random(value.shape, value.dtype, generator) if value.is_floating_point() else value
            for name, value in subjects.example_context(subject, slots).items()
        }
        sample = _random(torch.Size((slots, *shape)), model.dtype, generator)
        return {"sample": sample, "timestep": torch.linspace(1, 999, slots, device=model.device), **context}

    def call(inputs: Inputs) -> torch.Tensor:
        context = subjects.as_packed(inputs)
        return model.denoise(context.pop("sample"), context.pop("timestep"), context)

    return call, make_inputs(), make_inputs()


def decoder_case(subject: Subject) -> tuple[Network, Inputs, Inputs]:
    """Return the decoder and two sets of random latents that fill its batch."""
    model, size = subjects.family_model(subject), subjects.native_size(subject)
    batch = subject.compute.shape_of(*size).decode_batch
    shape = torch.Size((batch, *model.latent_shape(*size)))
    generator = torch.Generator(model.device).manual_seed(2)
    first, second = ({"latents": _random(shape, torch.float32, generator)} for _ in range(2))
    return lambda inputs: model.decode(subjects.as_packed(inputs)["latents"]), first, second


@torch.inference_mode()
def compare_batches(network: Network, inputs: Inputs, others: Inputs) -> dict[str, Any]:
    """Call a network with the same rows again, in another order and among other rows, and compare bytes."""
    count = len(next(iter(inputs.values())))
    device = next(iter(inputs.values())).device
    output, repeated = network(inputs), network(inputs)
    order = torch.roll(torch.randperm(count, generator=torch.Generator().manual_seed(3)), 1).to(device)
    permuted = network({name: value[order] for name, value in inputs.items()})
    is_kept = torch.arange(count, device=device) < max(1, count // 4)
    mixed = network({name: _mix(is_kept, value, others[name]) for name, value in inputs.items()})
    gaps = (output[order].float() - permuted.float()).abs().flatten(1).amax(1)
    return {
        "batch": count,
        "finite": bool(torch.isfinite(output).all()),
        "repeatable": torch.equal(output, repeated),
        "same_at_other_positions": torch.equal(output[order], permuted),
        "same_among_other_rows": torch.equal(output[is_kept], mixed[is_kept]),
        "largest_difference": float(gaps.max()),
        "largest_value": float(output.float().abs().max()),
        "positions_that_differ": gaps.nonzero().flatten().tolist(),
    }


def _mix(is_kept: torch.Tensor, value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Replace the rows of a batch that are not kept by those of another batch. Timesteps (N,) are unchanged."""
    if value.dim() == 1:
        return value
    return torch.where(is_kept.reshape(-1, *[1] * (value.dim() - 1)), value, other)


def _random(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, device=generator.device, generator=generator).to(dtype)
