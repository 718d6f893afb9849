"""Store committed results in Parquet parts, the only source of truth about finished rows.

A part is written after its images. A row that is rendered again is added to a later part with a higher attempt. For
each (id, image_index), the highest attempt counts and, among equal attempts, the one that finished last.
"""

from batch_infer.manifest.columns import EARLIER_TYPES, SCHEMA, cast_table, to_arguments, to_table
from batch_infer.manifest.index import IS_LATEST, CommittedImage, ManifestIndex
from batch_infer.manifest.manifest import FOLDER, Manifest
from batch_infer.manifest.parts import commit_time, read_carried_fields, read_part, read_part_in_batches, run_number

__all__ = [
    "CommittedImage",
    "EARLIER_TYPES",
    "FOLDER",
    "IS_LATEST",
    "Manifest",
    "ManifestIndex",
    "SCHEMA",
    "cast_table",
    "commit_time",
    "read_carried_fields",
    "read_part",
    "read_part_in_batches",
    "run_number",
    "to_arguments",
    "to_table",
]
