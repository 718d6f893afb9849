"""HTTP and FTP servers on the loopback interface, which refuse requests and cut responses short on request."""

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


class FolderHandler(SimpleHTTPRequestHandler):
    """Serves the files of a folder without logging. A path that starts with an error status gets that error."""

    def do_GET(self) -> None:
        if match := re.match("/([45][0-9][0-9])/", self.path):
            self.send_error(int(match[1]))
        elif self.path.startswith("/short/"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"prompt\nx\n")
            self.close_connection = True
        else:
            super().do_GET()

    def send_head(self) -> Any:
        """Serve `/in/t.csv` for `/t.csv?in=in`, like a server that selects files by query."""
        if match := re.search(r"[?&]in=(\w+)", self.path):
            self.path = f"/{match[1]}{self.path}"
        return super().send_head()

    def log_message(self, *rest: Any) -> None:
        pass


@contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """Serve a folder's files and yield the server's URL."""
    handler: Any = functools.partial(FolderHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{served.server_port}"
        finally:
            served.shutdown()
            thread.join()


@contextmanager
def answer_ftp(answers: Mapping[str, str]) -> Iterator[str]:
    """Answer FTP commands ('' is the connection itself) with these lines, and disconnect at any other command."""

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
            for connection in (listener, *clients):
                with suppress(OSError):  # already closed
                    connection.shutdown(socket.SHUT_RDWR)
            thread.join()
