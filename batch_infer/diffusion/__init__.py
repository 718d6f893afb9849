"""The latent diffusion loop: many rows, each at its own step of its own sampler, in one UNet call."""

from batch_infer.diffusion.packer import Context, Denoiser, Finished, Slots
from batch_infer.diffusion.solver import CoefficientTable, Solver

__all__ = ["CoefficientTable", "Context", "Denoiser", "Finished", "Slots", "Solver"]
