"""Write durable atomic files in OUT, lock OUT, and manage temporary files and log files.

Most functions raise disk errors as StorageError, which names the path or the temporary folder. Others raise OSError.
"""

from typing import TYPE_CHECKING

from batch_infer.lazy import import_on_use
from batch_infer.store.files import (
    TEMPORARY_PREFIX,
    atomic_write,
    fsync,
    fsync_folder,
    host_id,
    is_abandoned,
    is_case_sensitive,
    is_folder,
    is_link,
    is_temporary,
    list_names,
    make_folder,
    original_name,
    path_exists,
    read_errors,
    remove_unfinished,
    sweep,
    temporary_path,
    unique_name,
    unless_removed,
    write_errors,
)
from batch_infer.store.folder import PinnedFolder, find_holder, locked_folder, marker_name, remove_stale_holder
from batch_infer.store.logfile import log_handler, open_log
from batch_infer.store.temporary import (
    create_temporary,
    open_temporary_text,
    temporary_database,
    temporary_file_errors,
    temporary_folder,
)
from batch_infer.store.urls import get_protocol, is_http, redact_url, redact_urls, split_query

if TYPE_CHECKING:
    from batch_infer.store.clients import connect, describe, is_refusal, is_service_error
    from batch_infer.store.object import ObjectStore

__getattr__ = import_on_use(
    "batch_infer.store",
    clients=("connect", "describe", "is_refusal", "is_service_error"),
    object=("ObjectStore",),
)

__all__ = [
    "ObjectStore",
    "PinnedFolder",
    "TEMPORARY_PREFIX",
    "atomic_write",
    "connect",
    "create_temporary",
    "describe",
    "find_holder",
    "fsync",
    "fsync_folder",
    "get_protocol",
    "host_id",
    "is_abandoned",
    "is_case_sensitive",
    "is_folder",
    "is_http",
    "is_link",
    "is_refusal",
    "is_service_error",
    "is_temporary",
    "list_names",
    "locked_folder",
    "log_handler",
    "make_folder",
    "marker_name",
    "open_log",
    "open_temporary_text",
    "original_name",
    "path_exists",
    "read_errors",
    "redact_url",
    "redact_urls",
    "remove_stale_holder",
    "remove_unfinished",
    "split_query",
    "sweep",
    "temporary_database",
    "temporary_file_errors",
    "temporary_folder",
    "temporary_path",
    "unique_name",
    "unless_removed",
    "write_errors",
]
