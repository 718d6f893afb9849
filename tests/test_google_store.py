"""Test the store of Google Cloud Storage with a simulated server, which follows Google's documentation.

https://cloud.google.com/storage/docs/json_api/v1/objects
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest

from batch_infer.errors import LockedError, SettingsError, StorageError
from batch_infer.store import StoreAddress
from batch_infer.store.objects import ObjectStore
from batch_infer.store.objects.lease import Lease

BUCKET = "bucket"


class Handler(BaseHTTPRequestHandler):
    """Keeps the objects of one bucket in memory, with their generations and times."""

    objects: ClassVar[dict[str, tuple[bytes, int, str]]] = {}
    generations = count(1)
    lock = threading.Lock()

    def log_message(self, *rest: Any) -> None:
        pass

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)  # also sends Date
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def parse(self) -> tuple[str, dict[str, str]]:
        """Return the name of the object and the parameters, or answer that the bucket is missing or forbidden."""
        url = urlsplit(self.path)
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        if bucket != BUCKET:
            raise LookupError(403 if bucket == "forbidden" else 404)
        return unquote(name[1:]), {key: values[0] for key, values in parse_qs(url.query).items()}

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except LookupError as error:
            self.answer(error.args[0], json.dumps({"error": {"message": "refused"}}).encode())

    def describe(self, name: str) -> dict[str, object]:
        content, generation, _ = self.objects[name]
        return {"name": name, "bucket": BUCKET, "size": str(len(content)), "generation": str(generation)}

    def do_GET(self) -> None:
        name, parameters = self.parse()
        if not name:
            self.list(parameters.get("prefix", ""))
        elif name not in self.objects:
            self.answer(404)
        elif parameters.get("alt") == "media":
            content, generation, date = self.objects[name]
            headers = {"Last_Modified": date, "x_goog_generation": str(generation)}
            self.answer(200, content, **headers)
        else:
            self.answer_json(self.describe(name))

    def list(self, prefix: str) -> None:
        names = [name for name in sorted(self.objects) if name.startswith(prefix)]
        folders = {f"{prefix}{name[len(prefix) :].partition('/')[0]}/" for name in names if "/" in name[len(prefix) :]}
        items = [self.describe(name) for name in names if "/" not in name[len(prefix) :]]
        self.answer_json({"items": items, "prefixes": sorted(folders)})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        name, parameters = self.parse()
        if "/rewriteTo/" in self.path:
            paths = self.path.partition("?")[0].split("/rewriteTo/")
            source, target = (unquote(path.rpartition("/o/")[2]) for path in paths)
            if source not in self.objects:
                raise LookupError(404)
            self.put(target, self.objects[source][0], {})
            self.answer_json({"done": True})
            return
        if parameters["uploadType"] == "multipart":
            message = Message()
            message["Content-Type"] = self.headers["Content-Type"]
            mark = f"--{message.get_param('boundary')}".encode()
            description, content = (part.partition(b"\n\n")[2] for part in body.split(mark)[1:3])
            name, body = json.loads(description)["name"], content.removesuffix(b"\n")
        else:
            name = parameters["name"]
        if self.put(name, body, parameters):
            self.answer_json(self.describe(name))
        else:
            self.answer(412)

    def put(self, name: str, content: bytes, parameters: dict[str, str]) -> bool:
        with self.lock:
            current = self.objects[name][1] if name in self.objects else 0
            if parameters.get("ifGenerationMatch", str(current)) != str(current):
                return False
            self.objects[name] = (content, next(self.generations), formatdate(usegmt=True))
            return True

    def do_DELETE(self) -> None:
        name, _ = self.parse()
        self.answer(404 if self.objects.pop(name, None) is None else 204)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    async def return_unknown(*_: object) -> None:
        """Replace the question for the type of a bucket, which gcsfs sends to another server."""

    Handler.objects.clear()
    gcsfs = pytest.importorskip("gcsfs")
    monkeypatch.setattr(gcsfs.GCSFileSystem, "_lookup_bucket_type", return_unknown, raising=False)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("server")
def test_files_and_images() -> None:
    store = ObjectStore(StoreAddress("gs://bucket/out"))
    assert (store.read("run.json"), store.exists("run.json"), store.list_folder("")) == (None, False, [])
    assert [store.create("run.json", content) for content in (b"1", b"2")] == [True, False]
    assert (store.read("run.json"), store.exists("run.json")) == (b"1", True)
    store.stage("images/t/a.png", b"old")
    store.publish(["images/t/a.png"])
    store.back_up({"images/t/a.png": "images/t/b.png", "images/missing": "images/t/c.png"})
    assert list(store.find(["images"], lambda name: True)) == ["images/t/a.png", "images/t/b.png"]
    assert store.read_image("images/t/b.png", 3) == b"old"
    store.rename("images/t/b.png", "images/t/c.png")
    with store.open_file("images/t/c.png") as file:
        assert file.read() == b"old"
    store.remove(["images/t/a.png", "images/missing"])
    store.remove_folder("images", lambda: False)
    assert store.list_folder("") == ["run.json"]


@pytest.mark.usefixtures("server")
def test_the_lock() -> None:
    store = ObjectStore(StoreAddress("gs://bucket/out"))
    with store.locked() as locked:
        with pytest.raises(LockedError, match="gs://bucket/out is locked by another command"), store.locked():
            pass
        assert isinstance(locked._lock, Lease)
        generation = locked._lock._version
        locked._lock.renew()
        assert locked._lock._version != generation
        locked.check()
        ObjectStore(locked.address).check()
        Handler.objects["out/.lease"] = (b"{}", 10**6, formatdate(usegmt=True))
        locked._lock.renew()
        with pytest.raises(StorageError, match="another run has taken over"):
            locked.check()
    assert store.now() <= store.now()


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(("bucket", "reason"), [("missing", "does not exist"), ("forbidden", "Forbidden")])
def test_refusals_are_settings_errors(bucket: str, reason: str) -> None:
    store = ObjectStore(StoreAddress(f"gs://{bucket}/out"))
    store.stage("images/a.png", b"")
    for call in (lambda: store.publish(["images/a.png"]), lambda: store.create("a", b"")):
        with pytest.raises(SettingsError, match=reason):
            call()
