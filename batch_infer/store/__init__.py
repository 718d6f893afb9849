"""Read, write and lock OUT, in a local folder or an object store, and manage temporary files and log files.

Most functions raise disk errors as StorageError, which names the path or the temporary folder. Others raise OSError.
"""

from typing import TYPE_CHECKING

from batch_infer.lazy import import_on_use
from batch_infer.store.files import (
    TEMPORARY_PREFIX,
    atomic_write,
    fsync,
    hash_file,
    hash_stream,
    host_id,
    is_abandoned,
    is_temporary,
    list_names,
    original_name,
    read_errors,
    remove_unfinished,
    temporary_path,
    unique_name,
    write_errors,
)
from batch_infer.store.folder import marker_name
from batch_infer.store.local import LocalStore
from batch_infer.store.logfile import log_handler
from batch_infer.store.opening import (
    Out,
    is_url,
    open_store,
    prefetch,
    refuse_unprintable,
    to_absolute,
    to_stored_file,
    unless_removed,
)
from batch_infer.store.protocol import (
    IMAGE_FOLDERS,
    NOT_A_FILE,
    FileDigest,
    PrivateFile,
    Store,
    StoreAddress,
    StoredFile,
    is_inside,
)
from batch_infer.store.temporary import (
    create_temporary,
    insert_rows,
    open_temporary_text,
    temporary_database,
    temporary_file_errors,
    temporary_folder,
)
from batch_infer.store.urls import get_protocol, is_http, redact_url, redact_urls, split_query

if TYPE_CHECKING:
    from batch_infer.store.clients import connect, describe, is_refusal, is_service_error
else:
    __getattr__ = import_on_use(__name__, clients=("connect", "describe", "is_refusal", "is_service_error"))

__all__ = [
    "FileDigest",
    "IMAGE_FOLDERS",
    "LocalStore",
    "NOT_A_FILE",
    "Out",
    "PrivateFile",
    "Store",
    "StoreAddress",
    "StoredFile",
    "TEMPORARY_PREFIX",
    "atomic_write",
    "connect",
    "create_temporary",
    "describe",
    "fsync",
    "get_protocol",
    "hash_file",
    "hash_stream",
    "host_id",
    "is_abandoned",
    "is_http",
    "is_inside",
    "is_refusal",
    "is_service_error",
    "insert_rows",
    "is_temporary",
    "is_url",
    "list_names",
    "log_handler",
    "marker_name",
    "open_store",
    "open_temporary_text",
    "original_name",
    "prefetch",
    "read_errors",
    "redact_url",
    "redact_urls",
    "refuse_unprintable",
    "remove_unfinished",
    "split_query",
    "temporary_database",
    "temporary_file_errors",
    "temporary_folder",
    "temporary_path",
    "to_absolute",
    "to_stored_file",
    "unique_name",
    "unless_removed",
    "write_errors",
]
