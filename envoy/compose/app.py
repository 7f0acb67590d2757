"""A small application. Alone it answers with what its Envoy says of the call; with $UPSTREAM it makes the call.

A browser gets page.html, which asks again every second and shows the answer; other clients get JSON.
"""

import json
import os
import re
import ssl
import urllib.error
import urllib.request
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

UPSTREAM = os.environ.get("UPSTREAM")
PAGE = Path(__file__).with_name("page.html")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Calls the Envoy beside us past the proxy that the environment may name."""


class Handler(BaseHTTPRequestHandler):
    """Answers every GET."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer."""
        if UPSTREAM and "text/html" in self.headers.get("accept", ""):
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", PAGE.read_bytes())
            return
        try:
            call = called(UPSTREAM) if UPSTREAM else self._caller()
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            self._send_json(HTTPStatus.BAD_GATEWAY, {"error": f"{UPSTREAM} answered {error.code}: {said}"})
        except (OSError, ValueError, IndexError) as error:
            self._send_json(HTTPStatus.BAD_GATEWAY, {"error": f"no answer from {UPSTREAM}: {error}"})
        else:
            self._send_json(HTTPStatus.OK, call)

    def _caller(self) -> dict[str, str | None]:
        """Who called, as our own Envoy saw it in the handshake: backend-envoy.yaml adds these headers."""
        certificates = dict(re.findall(r"(By|URI)=([^;,]+)", self.headers.get("x-forwarded-client-cert", "")))
        return {
            "caller": certificates.get("URI"),
            "caller_serial": self.headers.get("x-client-serial"),
            "caller_until": self.headers.get("x-client-until"),
            "called": certificates.get("By"),
        }

    def _send_json(self, status: HTTPStatus, content: dict[str, str | None]) -> None:
        self._send(status, "application/json", json.dumps(content).encode() + b"\n")

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        with suppress(ConnectionError):  # the client has left
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: the demo makes many requests."""


def called(url: str) -> dict[str, str | None]:
    """Call the service behind our Envoy, which adds the other side's certificate: web-envoy.yaml has these headers."""
    with DIRECT.open(url, timeout=5) as answer:
        call: dict[str, str | None] = json.load(answer)
        certificate = ssl.PEM_cert_to_DER_cert(unquote(answer.headers.get("x-server-cert", "")))
        return call | {"called_serial": serial(certificate), "called_until": answer.headers.get("x-server-until")}


def serial(certificate: bytes) -> str:
    """The serial number of a certificate in DER, in hexadecimal.

    Two headers and the version (five octets) come before it; it has 20 octets at most (RFC 5280, section 4.1).
    """
    at = 0
    for _ in ("Certificate", "TBSCertificate"):
        octets_of_length = certificate[at + 1] - 0x80
        at += 2 + max(octets_of_length, 0)
    at += 5
    return f"{int.from_bytes(certificate[at + 2 : at + 2 + certificate[at + 1]], 'big'):x}"


ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()  # noqa: S104 - inside its container
