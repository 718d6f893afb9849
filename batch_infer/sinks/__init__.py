"""Where images are stored."""

from batch_infer.sinks.folder import FolderSink, plain_name

__all__ = ["FolderSink", "plain_name"]
