"""A real HTTP server on loopback, which also refuses and breaks off where it is asked to."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()
