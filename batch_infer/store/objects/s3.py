"""Conditional puts to S3 with s3fs."""

from __future__ import annotations

from typing import Any

from batch_infer.store.clients import CONFLICT, READ_TIMEOUT_SECONDS, get_http_status, is_bucket_missing
from batch_infer.store.objects.conditional_puts import REFUSALS, Version, get_response_time

MAX_CONNECTIONS = 64
ATTEMPTS = 12
"""Number of attempts of s3fs, whose pauses of 0.1 to 15 seconds add up to 43 seconds before the last attempt."""
CONNECT_SECONDS = 10
_CONFLICT_ATTEMPTS = 3
_READ_ATTEMPTS = 3
_TRANSIENT = {429, 500, 502, 503, 504}


class S3Puts:
    """S3 and services with its API. https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html

    Before it connects, the file system is set to survive an outage of half a minute. By default, s3fs does not repeat
    a request after a refused connection or a response with status 5xx. botocore does, but its pauses are random, and
    its newer retry modes allow about 100 retries for all requests together, so that it gives up early if 32 threads
    wait. The error handler of s3fs is global: all of its file systems in this process then repeat such requests.
    """

    def __init__(self, system: Any) -> None:
        import s3fs.core

        s3fs.core.set_custom_error_handler(_is_transient)
        self._system = system
        system.retries = ATTEMPTS
        system.config_kwargs = {
            **{"max_pool_connections": MAX_CONNECTIONS, "retries": {"total_max_attempts": 1}},
            **{"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_TIMEOUT_SECONDS},
            **system.config_kwargs,
        }

    def create(self, path: str, content: bytes) -> str | None:
        return self._put(path, content, IfNoneMatch="*")

    def replace(self, path: str, content: bytes, version: str) -> str | None:
        return self._put(path, content, IfMatch=version)

    def _put(self, path: str, content: bytes, **condition: str) -> str | None:
        for attempt in range(1, _CONFLICT_ATTEMPTS + 1):
            try:
                return str(self._call("put_object", path, Body=content, **condition)["ETag"])
            except OSError as error:
                status = get_http_status(error)
                if status == CONFLICT and attempt < _CONFLICT_ATTEMPTS:  # another put of the object has not ended
                    continue
                if status not in REFUSALS or is_bucket_missing(error):
                    raise
                return None
        raise AssertionError("unreachable")

    def read(self, path: str) -> Version | None:
        """Return an object, or None if it is missing. A body that is cut off is requested again."""
        import s3fs.core
        from fsspec.asyn import sync

        for attempt in range(1, _READ_ATTEMPTS + 1):
            try:
                response = self._call("get_object", path)
            except FileNotFoundError as error:
                if is_bucket_missing(error):
                    raise
                return None
            try:
                content = sync(self._system.loop, response["Body"].read)
            except s3fs.core.S3_RETRYABLE_ERRORS:
                if attempt == _READ_ATTEMPTS:
                    raise
                continue
            read_at = get_response_time(response["ResponseMetadata"]["HTTPHeaders"])
            return Version(content, response["ETag"], response["LastModified"].timestamp(), read_at)
        raise AssertionError("unreachable")

    def now(self, path: str) -> float:
        try:
            response = self._call("head_object", path)
        except FileNotFoundError as error:
            response = getattr(error.__cause__, "response", {})
        return get_response_time(response.get("ResponseMetadata", {}).get("HTTPHeaders", {}))

    def copy(self, path: str, new_path: str) -> None:
        """Copy an object of up to 5 GB. Unlike cp_file of s3fs, this needs no HEAD request."""
        bucket, key, _ = self._system.split_path(path)
        self._call("copy_object", new_path, CopySource={"Bucket": bucket, "Key": key})

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        bucket, key, _ = self._system.split_path(path)
        return dict(self._system.call_s3(method, Bucket=bucket, Key=key, **arguments))


def _is_transient(error: Exception) -> bool:
    """Return whether to repeat a request after this error: no connection, or a status that may be temporary."""
    bases = {(base.__module__, base.__name__) for base in type(error).__mro__}
    return ("botocore.exceptions", "ConnectionError") in bases or get_http_status(error) in _TRANSIENT
