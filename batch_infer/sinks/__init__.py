"""Where images are stored."""

from batch_infer.sinks.folder import (
    BACKUP_PREFIX,
    FolderSink,
    backup_path,
    has_image,
    original_path,
    possible_names,
    read_image,
    resolve_path,
)

__all__ = [
    "BACKUP_PREFIX",
    "FolderSink",
    "has_image",
    "backup_path",
    "original_path",
    "possible_names",
    "read_image",
    "resolve_path",
]
