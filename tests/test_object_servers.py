"""Test that the object stores of the tests behave like those of the clouds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from azure.core import MatchConditions
from azure.core.exceptions import HttpResponseError, ServiceRequestError, ServiceResponseError
from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError

from tests.object_servers import AzureContainer, Bucket, ObjectServer, S3Bucket, serve_objects

DOWN = (EndpointConnectionError, ConnectionClosedError, ServiceRequestError, ServiceResponseError)
"""Errors of the clients while a server is down. A client may notice the end of a connection only when it uses it."""


@pytest.fixture(scope="module", params=["s3", "azure"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    with serve_objects(request.param, tmp_path_factory.mktemp("objects")) as server:
        yield server


def create(bucket: Bucket, name: str, content: bytes) -> bool:
    """Store an object unless it exists."""
    return _succeeds(bucket, name, content, {"IfNoneMatch": "*"}, {})


def replace(bucket: Bucket, name: str, content: bytes, tag: str) -> bool:
    """Replace an object if it has this ETag."""
    azure = {"overwrite": True, "etag": tag, "match_condition": MatchConditions.IfNotModified}
    return _succeeds(bucket, name, content, {"IfMatch": tag}, azure)


def _succeeds(bucket: Any, name: str, content: bytes, s3: dict[str, Any], azure: dict[str, Any]) -> bool:
    try:
        if isinstance(bucket, S3Bucket):
            bucket.client.put_object(Bucket=bucket.url[5:], Key=name, Body=content, **s3)
        else:
            assert isinstance(bucket, AzureContainer)
            bucket.client.upload_blob(name, content, **azure)
    except ClientError as error:
        assert error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412)
        return False
    except HttpResponseError as error:
        assert error.status_code in (409, 412)
        return False
    return True


def tag_of(bucket: Any, name: str) -> str:
    if isinstance(bucket, S3Bucket):
        return str(bucket.client.head_object(Bucket=bucket.url[5:], Key=name)["ETag"])
    return str(bucket.client.get_blob_client(name).get_blob_properties().etag)


def winners(write: Callable[[int], bool]) -> list[int]:
    with ThreadPoolExecutor(16) as pool:
        return [number for number, done in enumerate(pool.map(write, range(16))) if done]


def test_of_several_writers_one_creates_and_one_replaces_an_object(server: ObjectServer) -> None:
    bucket = server.make_bucket()
    (first,) = winners(lambda number: create(bucket, "x/.lease", b"%d" % number))
    assert bucket.read("x/.lease") == b"%d" % first
    tag = tag_of(bucket, "x/.lease")
    (second,) = winners(lambda number: replace(bucket, "x/.lease", b"new %d" % number, tag))
    assert bucket.read("x/.lease") == b"new %d" % second
    assert bucket.names() == ["x/.lease"]
    bucket.remove("x/.lease")
    assert bucket.names() == []


def test_objects_outlive_a_restart(server: ObjectServer) -> None:
    bucket = server.make_bucket()
    bucket.write("a/b", b"content")
    tag = tag_of(bucket, "a/b")
    server.stop()
    try:
        with pytest.raises(DOWN):
            bucket.read("a/b")
    finally:
        server.start()
    assert bucket.read("a/b") == b"content"
    assert replace(bucket, "a/b", b"more", tag)


def test_wrong_credentials_are_refused(server: ObjectServer) -> None:
    environment = dict(server.environment)
    if "AWS_ACCESS_KEY_ID" in environment:
        with pytest.raises(ClientError, match="InvalidAccessKeyId"):
            S3Bucket("some-bucket", environment | {"AWS_ACCESS_KEY_ID": "wrong"})
        return
    text = environment["AZURE_STORAGE_CONNECTION_STRING"].replace("AccountKey=", "AccountKey=AAAA")
    with pytest.raises(HttpResponseError, match="AuthorizationFailure"):
        AzureContainer("some-container", {"AZURE_STORAGE_CONNECTION_STRING": text})
