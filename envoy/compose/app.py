"""A small application: answers with the certificates of a call, its own or, with $UPSTREAM, those of the one behind."""

import json
import os
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

UPSTREAM = os.environ.get("UPSTREAM")


class Handler(BaseHTTPRequestHandler):
    """Answers every GET with JSON."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer."""
        if UPSTREAM:
            with urllib.request.urlopen(UPSTREAM, timeout=5) as answer:  # noqa: S310 - the Envoy beside us
                body = answer.read()
        else:
            names = {"caller": "x-forwarded-client-cert", "caller_serial": "x-client-serial"}
            body = json.dumps({key: self.headers.get(name) for key, name in names.items()}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: the demo makes many requests."""


ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()  # noqa: S104 - inside its container
