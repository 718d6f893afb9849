"""Tiny random pipelines of diffusers' text-to-image classes.

`every` contains a builder for each class. `saved` saves checkpoints for tests of loading and of runs.
"""

from tests.pipelines.saved import SAVE_FUNCTIONS, save_flux, save_perturbed, save_pixart, save_sd3, save_z_image

__all__ = ["SAVE_FUNCTIONS", "save_flux", "save_perturbed", "save_pixart", "save_sd3", "save_z_image"]
