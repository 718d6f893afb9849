"""Store images durably in OUT before their manifest part is committed, and read them back.

To add a sink, write a file with a class that implements `Sink`, and add the class to `sink.SINKS`.
"""

from batch_infer.sinks.folder import BACKUP_PREFIX, IMAGE_FOLDERS, original_path, resolve_path
from batch_infer.sinks.sink import Sink, make_sink

__all__ = ["BACKUP_PREFIX", "IMAGE_FOLDERS", "Sink", "make_sink", "original_path", "resolve_path"]
