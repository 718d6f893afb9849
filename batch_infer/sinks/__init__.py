"""Store images durably in OUT before their manifest part is committed, and read them back.

To add a sink, write a file with a class that implements `Sink`, and add the class to `sink.SINKS`.
"""

from batch_infer.sinks.folder import BACKUP_PREFIX, is_image_path, original_path
from batch_infer.sinks.shards import SHARD_FOLDER, CommitLimits, parse_member
from batch_infer.sinks.sink import Sink, make_sink

__all__ = [
    "BACKUP_PREFIX",
    "CommitLimits",
    "SHARD_FOLDER",
    "Sink",
    "is_image_path",
    "make_sink",
    "original_path",
    "parse_member",
]
