"""A web server on a folder, with the failures of real ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Web:
    """The running server.

    Attributes:
        url: of the folder.
        requests: paths asked for so far.
        failures: {path: how the next answers to it fail, one after another}, either a status such as 503 or
            "cut" (the connection closes in the middle of the body).
        plain: leaves out Content-Length.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.requests: list[str] = []
        self.failures: dict[str, list[int | str]] = {}
        self.plain = False


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, web: Web, *args: Any, **options: Any) -> None:
        self._web = web
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        self._web.requests.append(self.path)
        failure = next(iter(self._web.failures.get(self.path, ())), None)
        if failure is not None:
            self._web.failures[self.path].pop(0)
        if isinstance(failure, int):
            self.send_error(failure)
        elif failure == "cut" or self._web.plain:
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            if not self._web.plain:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if failure == "cut" else content)
        else:
            super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def serve(folder: Path) -> Iterator[Web]:
    """Serves ``folder`` on a free port of this machine."""
    # The handler has to know the Web, and the Web the port.
    web = Web(0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, web, directory=str(folder)))
    web.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
