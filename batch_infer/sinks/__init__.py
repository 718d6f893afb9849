"""Where images are stored."""

from batch_infer.sinks.folder import FolderSink, path_aside, possible_names, stored_path

__all__ = ["FolderSink", "path_aside", "possible_names", "stored_path"]
