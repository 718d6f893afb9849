"""Sinks store images in OUT, durable before their manifest part is committed, and find them again.

A new sink is one file with a class that has the methods of `Sink`, and one line in `sink.SINKS`.
"""

from batch_infer.sinks.folder import BACKUP_PREFIX, IMAGE_FOLDERS, original_path, resolve_path
from batch_infer.sinks.sink import Sink, make_sink

__all__ = ["BACKUP_PREFIX", "IMAGE_FOLDERS", "Sink", "make_sink", "original_path", "resolve_path"]
