"""Compare two runs: their settings, results and images.

`diff_runs` compares whole runs. `verify` uses the other functions to compare images and devices.
"""

from batch_infer.jobs.diff.comparison import Diff, diff_runs
from batch_infer.jobs.diff.images import ImageComparison, compare_images
from batch_infer.jobs.diff.settings import compare_environments

__all__ = ["Diff", "ImageComparison", "compare_environments", "compare_images", "diff_runs"]
