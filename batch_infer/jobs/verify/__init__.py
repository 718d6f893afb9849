"""Check that every row of a run is accounted for, that its files are whole, and that its images can be made again.

`verify_run` makes all checks, and `find_damaged_images` only that of the images.
"""

from batch_infer.jobs.verify.image_check import find_damaged_images
from batch_infer.jobs.verify.image_records import ImageRecords
from batch_infer.jobs.verify.problems import Problem
from batch_infer.jobs.verify.reproduce import Sample
from batch_infer.jobs.verify.verification import Verification, VerifyOptions, verify_run

__all__ = ["ImageRecords", "Problem", "Sample", "Verification", "VerifyOptions", "find_damaged_images", "verify_run"]
