"""Where images are stored."""

from batch_infer.sinks.folder import FolderSink, path_aside, plain_name, stored_path

__all__ = ["FolderSink", "path_aside", "plain_name", "stored_path"]
