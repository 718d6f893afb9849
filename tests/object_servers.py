"""Object stores for tests: an S3 server and Azure's storage emulator, as processes that can go down and come back.

Buckets are read and changed by the clients of the clouds, not by the code under test.
"""

from __future__ import annotations

import base64
import shutil
import signal
import subprocess
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from azure.storage.blob import BlobServiceClient, ContainerClient
from botocore.config import Config

from tests.s3_server import ACCESS_KEY

ROOT = Path(__file__).parent.parent
AZURITE = Path(sys.prefix) / "azurite" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
"""Where `make azurite` installs it."""
ACCOUNT, ACCOUNT_KEY = "tester", base64.b64encode(b"0123456789abcdef").decode()
ClientEnvironment = Mapping[str, str]


class Bucket(ABC):
    """A bucket, which a test reads and changes, and the environment with which a command finds its server."""

    def __init__(self, url: str, environment: ClientEnvironment) -> None:
        self.url, self.environment = url, environment

    @abstractmethod
    def names(self) -> list[str]:
        """Return the sorted names of all objects."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return an object. Raises an error of the client if it is missing."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Store an object, replacing any other."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove an object, which must exist."""


class S3Bucket(Bucket):
    def __init__(self, name: str, environment: ClientEnvironment) -> None:
        super().__init__(f"s3://{name}", environment)
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            region_name=environment["AWS_DEFAULT_REGION"],
            config=Config(retries={"total_max_attempts": 1}),
        )
        self._name = name
        self.client.create_bucket(Bucket=name)

    def names(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self._name)
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", ()))

    def read(self, name: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self._name, Key=name)["Body"].read())

    def write(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=self._name, Key=name, Body=content)

    def remove(self, name: str) -> None:
        self.read(name)
        self.client.delete_object(Bucket=self._name, Key=name)


class AzureContainer(Bucket):
    def __init__(self, name: str, environment: ClientEnvironment) -> None:
        super().__init__(f"abfs://{name}", environment)
        service = BlobServiceClient.from_connection_string(
            environment["AZURE_STORAGE_CONNECTION_STRING"], retry_total=0
        )
        self.client: ContainerClient = service.create_container(name)

    def names(self) -> list[str]:
        return sorted(self.client.list_blob_names())

    def read(self, name: str) -> bytes:
        return bytes(self.client.download_blob(name).readall())

    def write(self, name: str, content: bytes) -> None:
        self.client.upload_blob(name, content, overwrite=True)

    def remove(self, name: str) -> None:
        self.client.delete_blob(name)


class ObjectServer(ABC):
    """A server process of an object store."""

    environment: ClientEnvironment
    """Variables with which the command finds the server, and its credentials."""
    port: int

    @abstractmethod
    def make_bucket(self) -> Bucket:
        """Create an empty bucket."""

    @abstractmethod
    def start(self) -> None:
        """Start the server, with the objects and the address that it had."""

    @abstractmethod
    def stop(self) -> None:
        """Stop the server. Its address then refuses connections."""

    @abstractmethod
    def close(self) -> None:
        """End the server's process."""


class S3Server(ObjectServer):
    """The server of `tests.s3_server`, which crashes and restarts."""

    def __init__(self) -> None:
        line = [sys.executable, "-m", "tests.s3_server"]
        self._process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.port = self._read_port()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def make_bucket(self) -> Bucket:
        return S3Bucket(f"bucket-{uuid.uuid4().hex}", self.environment)

    def start(self) -> None:
        self._send("start")

    def stop(self) -> None:
        self._send("stop")

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def _send(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        self._read_port()

    def _read_port(self) -> int:
        assert self._process.stdout
        return int(self._process.stdout.readline())


class AzureServer(ObjectServer):
    """Azurite, which keeps its objects on disk. `stop` lets it finish its requests, because a kill loses metadata."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = 0
        self.start()
        self.environment = {
            "AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};"
            f"AccountKey={ACCOUNT_KEY};BlobEndpoint=http://127.0.0.1:{self.port}/{ACCOUNT};"
        }

    def make_bucket(self) -> Bucket:
        return AzureContainer(f"container-{uuid.uuid4().hex}", self.environment)

    def start(self) -> None:
        options = ["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--location", str(self._folder)]
        self._process = subprocess.Popen(
            ["node", str(AZURITE), *options, "--blobPort", str(self.port)],
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": str(Path(shutil.which("node") or "").parent), "AZURITE_ACCOUNTS": f"{ACCOUNT}:{ACCOUNT_KEY}"},
        )
        assert self._process.stdout
        for line in self._process.stdout:
            if "successfully listens on" in line:
                self.port = int(line.rsplit(":", 1)[1])
                return
        raise AssertionError(f"Azurite ended with {self._process.wait()}")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate(timeout=60)

    def close(self) -> None:
        if self._process.poll() is None:
            self.stop()


@contextmanager
def serve_objects(kind: str, folder: Path) -> Iterator[ObjectServer]:
    """Run an S3 server (`s3`) or Azurite (`azure`), which keeps its files in a folder."""
    if kind == "azure" and not (shutil.which("node") and AZURITE.exists()):
        pytest.skip("Azurite is not installed; install Node.js and npm, then run `make azurite`")
    server = S3Server() if kind == "s3" else AzureServer(folder)
    try:
        yield server
    finally:
        server.close()
