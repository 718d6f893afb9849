"""Conditional puts to Google Cloud Storage with gcsfs."""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from typing import Any

from batch_infer.store.objects.conditional_puts import Version, get_response_time


class GooglePuts:
    """Google Cloud Storage, which has generations and not ETags.

    Follows https://cloud.google.com/storage/docs/request-preconditions, but has only been tested with a simulated
    server. gcsfs repeats requests for about 30 seconds.
    """

    def __init__(self, system: Any) -> None:
        self._system = system

    def create(self, path: str, content: bytes) -> str | None:
        return self.replace(path, content, "0")

    def replace(self, path: str, content: bytes, version: str) -> str | None:
        bucket, key, _ = self._system.split_path(path)
        url = f"{self._system.base.removesuffix('/storage/v1/')}/upload/storage/v1/b/{bucket}/o"
        options = {"uploadType": "media", "name": key, "ifGenerationMatch": version, "data": content, "json_out": True}
        try:
            response = self._system.call("POST", url, headers={"Content-Type": "application/json"}, **options)
        except FileExistsError:  # gcsfs raises it for status 412
            return None
        return str(response["generation"])

    def read(self, path: str) -> Version | None:
        try:
            headers, content = self._system.call("GET", self._system.url(path))
        except FileNotFoundError:
            return None
        modified_at = parsedate_to_datetime(headers["Last-Modified"]).timestamp()
        return Version(content, headers["x-goog-generation"], modified_at, get_response_time(headers))

    def now(self, path: str) -> float:
        bucket = self._system.split_path(path)[0]
        headers, _ = self._system.call("GET", "b/{}/o", bucket, maxResults=1, fields="kind")
        return get_response_time(headers)

    def copy(self, path: str, new_path: str) -> None:
        self._system.cp_file(path, new_path)
