"""The small HTTP server behind Envoy B: it answers with what Envoy says of the caller."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body leave in two writes; the second must not wait for an acknowledgement

    def do_GET(self) -> None:
        caller = {
            "certificate": self.headers.get("x-forwarded-client-cert", ""),
            "serial": self.headers.get("x-client-serial", ""),
        }
        body = json.dumps(caller).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: the demonstration counts requests itself."""


@contextmanager
def listening() -> Iterator[int]:
    """Serve for the length of the block, on a free port of the loopback address; the block gets the port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
