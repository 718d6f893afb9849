"""The denoising loop of latent diffusion: many rows share a UNet call, each at a different step of its sampler.

Slots holds the rows of a batch. A Solver computes the coefficients with which a diffusers scheduler advances them.
"""

from batch_infer.diffusion.packer import Context, Denoiser, FinishedRow, Slots
from batch_infer.diffusion.solver import CoefficientTable, Solver

__all__ = ["CoefficientTable", "Context", "Denoiser", "FinishedRow", "Slots", "Solver"]
