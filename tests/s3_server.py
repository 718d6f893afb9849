"""An S3 server on the loopback interface, which can go down and come back: `python -m tests.s3_server`.

It is moto's server. moto keeps its objects in memory, so that a new process would have lost them. Instead, this process
closes its listening socket and cuts all connections when it reads the line `stop` from standard input, and listens on
the same port again at the line `start`. To its clients, this is a server that has crashed and restarted. It answers
each line with its port, and ends with its input.

No server with disk storage was an alternative: of those that PyPI, npm and Debian offer, `rclone serve s3` ignores
If-Match and If-None-Match in a PUT, and `localbucket` and `s3rver` do not support If-Match there.

moto differs from S3 in two ways that matter here: it checks conditions and stores objects in two steps, so writes are
serialized, and it accepts any credentials, so the access key is checked here.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import ThreadedWSGIServer

ACCESS_KEY = "batch-infer-test"
REFUSAL = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>InvalidAccessKeyId</Code><Message>The AWS Access Key Id you provided does not exist in our records.
</Message></Error>"""
Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class QuietHandler(MotoRequestHandler):
    """Handles requests without logging them."""

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


class Server(ThreadedWSGIServer):
    """A server that can cut its connections."""

    daemon_threads = True

    def __init__(self, application: Application, port: int) -> None:
        self._connections: set[socket.socket] = set()
        super().__init__("127.0.0.1", port, application, QuietHandler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a cut connection."""

    def cut(self) -> None:
        """Stop listening, and cut all connections."""
        self.shutdown()
        self.socket.close()
        for connection in tuple(self._connections):
            with suppress(OSError):  # the client has closed it
                connection.shutdown(socket.SHUT_RDWR)


def guard(application: Application) -> Application:
    """Check the access key of each request, and serialize requests that write."""
    lock = threading.Lock()

    def call(environ: dict[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
        if f"Credential={ACCESS_KEY}/" not in environ.get("HTTP_AUTHORIZATION", ""):
            respond("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(REFUSAL)))])
            return [REFUSAL]
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return application(environ, respond)
        with lock:
            return list(application(environ, respond))

    return call


def serve(application: Application, port: int = 0) -> Server:
    """Start a server on a thread. Port 0 is any free port."""
    server = Server(application, port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main() -> None:
    application = guard(DomainDispatcherApplication(create_backend_app))
    server = serve(application)
    port = server.port
    print(port, flush=True)
    for line in sys.stdin:
        if line.strip() == "stop":
            server.cut()
        else:
            server = serve(application, port)
        print(port, flush=True)


if __name__ == "__main__":
    main()
