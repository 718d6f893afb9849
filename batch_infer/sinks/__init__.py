"""Where images are stored."""

from batch_infer.sinks.folder import (
    ASIDE,
    FolderSink,
    has_image,
    path_aside,
    path_before_aside,
    possible_names,
    read_image,
    stored_path,
)

__all__ = [
    "ASIDE",
    "FolderSink",
    "has_image",
    "path_aside",
    "path_before_aside",
    "possible_names",
    "read_image",
    "stored_path",
]
