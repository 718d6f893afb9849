"""Real servers of HTTP and FTP on loopback, which refuse requests and break off answers on request."""

from __future__ import annotations

import functools
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Quiet(SimpleHTTPRequestHandler):
    """Serves the files of a folder; what lies in a folder named as a status is refused with it."""

    def do_GET(self) -> None:
        if found := re.match("/([45][0-9][0-9])/", self.path):
            self.send_error(int(found[1]))
        elif self.path.startswith("/short/"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"prompt\nx\n")
            self.close_connection = True
        else:
            super().do_GET()

    def send_head(self) -> Any:
        """Serve `/in/t.csv` for `/t.csv?in=in`, as a server whose files are told apart by the query."""
        if found := re.search(r"[?&]in=(\w+)", self.path):
            self.path = f"/{found[1]}{self.path}"
        return super().send_head()

    def log_message(self, *rest: Any) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder's files; gives the server's address."""
    handler: Any = functools.partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{served.server_port}"
        finally:
            served.shutdown()
            thread.join()


@contextmanager
def answering_ftp(answers: Mapping[str, str]) -> Iterator[str]:
    """Answer FTP commands, and the connection itself under '', with these lines, and hang up at any other command."""

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                clients.append(client)
                with client, client.makefile("rw", newline="\r\n") as stream:
                    command = ""
                    while answer := answers.get(command):
                        stream.write(f"{answer}\n")
                        stream.flush()
                        command = stream.readline().partition(" ")[0].strip()

    clients: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for each in (listener, *clients):
                with suppress(OSError):  # one that is closed
                    each.shutdown(socket.SHUT_RDWR)
            thread.join()
