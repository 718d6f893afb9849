"""The manifest: committed results in Parquet parts, the only truth about what is done.

A part is written after its images, and renamed into place last. Rows that were rendered again stand in a later part
with a higher attempt, and for one (id, image_index) the highest attempt counts.
"""

from batch_infer.manifest.index import CommittedImage, ManifestIndex
from batch_infer.manifest.manifest import Manifest
from batch_infer.manifest.parts import SCHEMA, cast_table, commit_time, read_part, run_number, to_table, write_parquet

__all__ = [
    "CommittedImage",
    "ManifestIndex",
    "Manifest",
    "SCHEMA",
    "cast_table",
    "commit_time",
    "read_part",
    "run_number",
    "to_table",
    "write_parquet",
]
