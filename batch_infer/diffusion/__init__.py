"""Denoise latents: many rows share a denoiser call, and each may be at a different step of its sampler.

Slots holds the rows of a batch. Solver computes the coefficients that advance a row as its diffusers scheduler would.
"""

from batch_infer.diffusion.packer import Context, Denoiser, FinishedRow, Slots
from batch_infer.diffusion.solver import CoefficientTable, Solver

__all__ = ["CoefficientTable", "Context", "Denoiser", "FinishedRow", "Slots", "Solver"]
