"""Where images are stored."""

from batch_infer.sinks.folder import FolderSink, remove_leftovers

__all__ = ["FolderSink", "remove_leftovers"]
