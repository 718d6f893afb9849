"""Test that a URL of OUT that cannot be used is refused with one sentence that says why, and that shows no secret."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.object_servers import ObjectServer, serve_objects
from tests.runs import CommandResult, command, run
from tests.tables import write_csv

AZURE = "AZURE_STORAGE_CONNECTION_STRING"


@pytest.fixture(scope="module", params=["s3", "azure"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    with serve_objects(request.param, tmp_path_factory.mktemp("objects")) as server:
        yield server


@pytest.fixture
def environment(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]])


def assert_refused(done: CommandResult, code: int, *texts: str) -> None:
    """Check the exit code, and that stderr ends with one line that contains these texts."""
    assert done.code == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for text in texts:
        assert text in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.usefixtures("environment")
def test_a_missing_bucket_is_refused(server: ObjectServer, table: Path) -> None:
    url = f"{server.make_bucket().url}-missing/out"
    for done in (run(table, url), command("status", url), command("merge", url)):
        assert_refused(done, 2, url)
    assert "bucket or container does not exist" in run(table, url).stderr


def test_wrong_credentials_are_refused(server: ObjectServer, environment: pytest.MonkeyPatch, table: Path) -> None:
    url = f"{server.make_bucket().url}/out"
    if AZURE in server.environment:
        environment.setenv(AZURE, server.environment[AZURE].replace("AccountKey=", "AccountKey=AAAA"))
    else:
        environment.setenv("AWS_ACCESS_KEY_ID", "wrong")
    assert_refused(run(table, url), 2, url, "403")


@pytest.mark.promises
def test_a_service_that_refuses_connections_is_tried_again_later(
    server: ObjectServer, environment: pytest.MonkeyPatch, table: Path
) -> None:
    url = f"{server.make_bucket().url}/out"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        unused = listener.getsockname()[1]
    for name, value in server.environment.items():
        environment.setenv(name, value.replace(f":{server.port}", f":{unused}"))
    assert_refused(command("status", url), 75, url)


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/out", "s3fs"), ("abfs://bucket/out", "adlfs"),
                                              ("gs://bucket/out", "gcsfs")])  # fmt: skip
def test_a_missing_package_is_named(table: Path, monkeypatch: pytest.MonkeyPatch, url: str, package: str) -> None:
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr("batch_infer.store.clients.find_spec", lambda name: None)
    assert_refused(run(table, url), 2, url, f"needs {package}: pip install {package}")


@pytest.mark.parametrize(
    "url", ["sftp://host/out", "memory://out", "https://host/out", "ftp://host/out", "file:///out"]
)
def test_other_protocols_are_refused(table: Path, url: str) -> None:
    assert_refused(run(table, url), 2, url.partition("://")[0], "s3://")


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:sesame@bucket/out",
        "s3://bucket/out?token=sesame",
        "abfs://container:sesame@account.dfs.core.windows.net/out",
        "s3://bucket/../out",
        "s3://",
        "s3://bucket//out",
        "simplecache::s3://bucket/out",
    ],
)
def test_urls_with_secrets_or_without_a_bucket_are_refused(table: Path, url: str) -> None:
    done = run(table, url)
    assert_refused(done, 2)
    assert "sesame" not in done.stderr
