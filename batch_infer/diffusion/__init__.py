"""The latent diffusion loop: many rows share a UNet call, each at a different step of its sampler.

Slots hold the rows of a batch, and a Solver computes the coefficients by which a diffusers scheduler advances them.
"""

from typing import TYPE_CHECKING

from batch_infer.lazy import import_on_use

if TYPE_CHECKING:
    from batch_infer.diffusion.packer import Context, Denoiser, FinishedRow, Slots
    from batch_infer.diffusion.solver import CoefficientTable, Solver
else:
    __getattr__ = import_on_use(
        __name__,
        packer=(
            "Context",
            "Denoiser",
            "FinishedRow",
            "Slots",
        ),
        solver=(
            "CoefficientTable",
            "Solver",
        ),
    )

__all__ = ["CoefficientTable", "Context", "Denoiser", "FinishedRow", "Slots", "Solver"]
