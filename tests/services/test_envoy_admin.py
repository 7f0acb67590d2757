"""What an Envoy has loaded is read from several answers, none of which says by itself what is in use."""

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

from fakes.hierarchy import NOW

from sds_agent.inspection.envoy_admin import EnvoyAdmin
from sds_agent.pki.certificates import serial_hex, write_pem
from sds_agent.pki.keys import KeyType, generate
from sds_agent.signing.signer import make_root

ROOT, NEW = (make_root(generate(KeyType.EC_P256), "demo.example", NOW, timedelta(hours=9)) for _ in range(2))


@contextmanager
def admin_interface(answers: Mapping[str, Any]) -> Iterator[str]:
    """A stand-in for Envoy's admin interface, which gives these answers by path and query; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answers[self.path]).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def state(version: str, accepted: str) -> str:
    """Of a bundle whose first root is in use, sent in one version, with the version that was accepted last."""
    pem = base64.b64encode(write_pem([ROOT.certificate, NEW.certificate])).decode()
    secret = {"validation_context": {"trusted_ca": {"inline_bytes": pem}}}
    answers = {
        "/certs": {"certificates": [{"ca_cert": [{"serial_number": serial_hex(ROOT.certificate)}]}]},
        "/config_dump?resource=dynamic_active_secrets": {
            "configs": [{"name": "spiffe://a.example", "version_info": version, "secret": secret}]
        },
        "/config_dump?resource=dynamic_warming_secrets": {},
        "/stats?filter=version_text&format=json": {
            "stats": [{"name": "sds.spiffe_//a.example.version_text", "value": accepted}]
        },
    }
    with admin_interface(answers) as url:
        (found,) = EnvoyAdmin(url).secrets()
    return found.state


def test_a_refused_bundle_that_begins_like_the_one_in_use_is_not_called_active() -> None:
    assert state("v2", accepted="v1") == "REJECTED"


def test_a_bundle_is_active_by_its_accepted_version_or_by_its_root_where_there_is_no_version() -> None:
    assert state("v2", accepted="v2") == "ACTIVE"
    assert state("v2", accepted="") == "ACTIVE"
