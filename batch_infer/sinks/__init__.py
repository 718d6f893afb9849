"""Where images are stored."""

from batch_infer.sinks.folder import (
    FolderSink,
    has_image,
    is_aside,
    path_aside,
    path_before_aside,
    possible_names,
    read_image,
    stored_path,
)

__all__ = [
    "FolderSink",
    "has_image",
    "is_aside",
    "path_aside",
    "path_before_aside",
    "possible_names",
    "read_image",
    "stored_path",
]
