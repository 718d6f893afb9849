"""A local Hugging Face Hub with the endpoints that fetch checkpoints, and a record of its requests."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by id, each a folder at one commit. `fetched` lists the files that were sent, as REPO/FILE."""

    repositories: dict[str, Path]
    address: str = ""
    fetched: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Status and error code of the response for each refused repository."""
    slow: str | None = None
    """Name of a file of which only the first byte is sent."""
    over: threading.Event = field(default_factory=threading.Event)

    def files(self, repository: str) -> list[str]:
        """Return the files of a repository that were sent, sorted."""
        return sorted(file.removeprefix(f"{repository}/") for file in self.fetched if file.startswith(repository))


@contextmanager
def hub(**repositories: Path) -> Iterator[Hub]:
    """Serve folders as repositories of `owner`."""
    served = Hub({f"owner/{name}": folder for name, folder in repositories.items()})
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Endpoints,), {"hub": served})) as server:
        served.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield served
        finally:
            served.over.set()
            server.shutdown()
            thread.join()


class _Endpoints(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(self.path)
        match = re.match(r"/(?:api/models/)?([^/]+/[^/]+)/(resolve|tree|revision)/([^/?]+)/?([^?]*)", self.path)
        repository, endpoint, revision, file = match.groups() if match else ("", "", "", "")
        if repository in self.hub.refusals:
            self._refuse(*self.hub.refusals[repository])
        elif repository not in self.hub.repositories:
            self._refuse(404, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        else:
            self._answer(repository, endpoint, file)

    def _answer(self, repository: str, endpoint: str, file: str) -> None:
        folder = self.hub.repositories[repository]
        if endpoint == "tree":
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            self._send(json.dumps([_describe(path, folder) for path in files]).encode(), "application/json")
        elif endpoint == "revision":
            self._send(json.dumps({"id": repository, "sha": COMMIT, "siblings": []}).encode(), "application/json")
        elif (folder / file).is_file():
            if self.command == "GET":
                self.hub.fetched.append(f"{repository}/{file}")
            self._send((folder / file).read_bytes(), "application/octet-stream")
        else:
            self._refuse(404, "EntryNotFound")

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            if self.hub.slow is not None and self.path.endswith(self.hub.slow):
                self.wfile.write(content[:1])
                self.hub.over.wait()
            else:
                self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *rest: Any) -> None:
        pass


def _describe(path: Path, folder: Path) -> dict[str, Any]:
    content = path.read_bytes()
    name = path.relative_to(folder).as_posix()
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
