"""Conditional puts to Azure Blob Storage with adlfs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batch_infer.store.clients import is_bucket_missing
from batch_infer.store.objects.conditional_puts import REFUSALS, Version, get_response_time

COPY_POLL_SECONDS = 0.1


class AzurePuts:
    """Azure Blob Storage. https://learn.microsoft.com/rest/api/storageservices/specifying-conditional-headers

    The SDK repeats requests after 15, 18 and 24 seconds.
    """

    def __init__(self, system: Any) -> None:
        self._system = system

    def create(self, path: str, content: bytes) -> str | None:
        return self._put(path, content, overwrite=False)

    def replace(self, path: str, content: bytes, version: str) -> str | None:
        from azure.core import MatchConditions

        return self._put(path, content, overwrite=True, etag=version, match_condition=MatchConditions.IfNotModified)

    def _put(self, path: str, content: bytes, **options: Any) -> str | None:
        from azure.core.exceptions import HttpResponseError

        async def put(blob: Any) -> str:
            return str((await blob.upload_blob(content, metadata={"is_directory": "false"}, **options))["etag"])

        try:
            return str(self._run(path, put))
        except HttpResponseError as error:
            status = error.status_code
            if status not in REFUSALS or is_bucket_missing(error):
                raise
            return None

    def read(self, path: str) -> Version | None:
        from azure.core.exceptions import ResourceNotFoundError

        times: list[float] = []

        async def read(blob: Any) -> Version:
            stream = await blob.download_blob(raw_response_hook=_make_time_hook(times))
            properties = stream.properties
            content = await stream.readall()
            return Version(content, properties.etag, properties.last_modified.timestamp(), times[-1])

        try:
            version: Version = self._run(path, read)
        except ResourceNotFoundError as error:
            if is_bucket_missing(error):
                raise
            return None
        return version

    def now(self, path: str) -> float:
        from azure.core.exceptions import ResourceNotFoundError

        async def read_properties(blob: Any) -> None:
            await blob.get_blob_properties(raw_response_hook=_make_time_hook(times))

        times: list[float] = []
        try:
            self._run(path, read_properties)
        except ResourceNotFoundError as error:
            times.append(get_response_time(getattr(error.response, "headers", {})))
        return times[-1]

    def copy(self, path: str, new_path: str) -> None:
        """Copy a blob. The service copies small blobs of one account at once, but does not promise it."""
        import asyncio

        from azure.core.exceptions import ResourceNotFoundError

        source = self._system.service_client.get_blob_client(*self._system.split_path(path)[:2])

        async def copy(blob: Any) -> None:
            status = (await blob.start_copy_from_url(source.url))["copy_status"]
            while status == "pending":
                await asyncio.sleep(COPY_POLL_SECONDS)
                status = (await blob.get_blob_properties()).copy.status
            if status != "success":
                raise OSError(f"the copy has ended with status {status}")

        try:
            self._run(new_path, copy)
        except ResourceNotFoundError as error:
            raise FileNotFoundError(path) from error

    def _run(self, path: str, call: Callable[[Any], Any]) -> Any:
        """Run a coroutine function that takes a blob client, on fsspec's event loop."""
        from fsspec.asyn import sync

        container, name, _ = self._system.split_path(path)

        async def run() -> Any:
            async with self._system.service_client.get_blob_client(container, name) as blob:
                return await call(blob)

        return sync(self._system.loop, run)


def _make_time_hook(times: list[float]) -> Callable[[Any], None]:
    return lambda response: times.append(get_response_time(response.http_response.headers))
