"""Where images are stored."""

from batch_infer.sinks.folder import FolderSink

__all__ = ["FolderSink"]
