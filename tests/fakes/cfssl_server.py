"""Stands in for CFSSL 1.6.5's API server (`cfssl serve`), over real TLS, with errors as CFSSL words them.

It was written from CFSSL's API; `scripts/ca-interop cfssl` runs the agent with the real one.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

from cryptography import x509
from fakes.https_server import Answer, HttpsServer, Reply, Request, json_reply

from sds_agent.conformance import SuiteCa
from sds_agent.pki.certificates import write_pem

KEY = bytes.fromhex("00112233445566778899aabbccddeeff")
NO_BUNDLER = "This request requires a bundler, but one is not initialized for the API server."
MESH = {"usages": ["digital signature", "server auth", "client auth"], "expiry": "1h2m"}
"""What a profile gives; the lifetime is that of SuiteCa's certificates."""


def text(words: str, status: int) -> Reply:
    """A plain answer of Go's http.Error."""
    return Reply(status, f"{words}\n".encode(), {"content-type": "text/plain; charset=utf-8"})


def refusal(code: int, words: str, status: int = 400) -> Reply:
    """A refusal of a handler: JSON as text/plain."""
    refused = {"success": False, "result": None, "errors": [{"code": code, "message": words}], "messages": []}
    return text(json.dumps(refused), status)


def success(result: object, *messages: Mapping[str, object]) -> Reply:
    return json_reply({"success": True, "result": result, "errors": [], "messages": list(messages)})


def pem(certificate: x509.Certificate) -> str:
    return write_pem([certificate]).decode().strip()


class CfsslServer:
    """Signs with `ca`, for the profiles in `profiles`; the one with the name "" is the default.

    With `auth_key` every profile has it, and there is no `sign`; without, no `authsign`. `bundles` is whether it has
    bundle files. `answers` replaces an endpoint, and `off` are endpoints that are turned off.
    """

    def __init__(self, ca: SuiteCa | None = None) -> None:
        self.ca = ca or SuiteCa()
        self.http = HttpsServer(self.answer)
        self.profiles: dict[str, Mapping[str, object]] = {"": {**MESH, "expiry": "8760h"}, "mesh": MESH}
        self.auth_key: bytes | None = KEY
        self.bundles = True
        self.signer = self.ca.intermediate
        self.off: set[str] = set()
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def answer(self, request: Request) -> Reply | bytes | None:
        endpoint = request.path.removeprefix("/api/v1/cfssl/")
        if endpoint in self.answers:
            return await self.answers[endpoint](request)
        if endpoint in self.off | {"authsign" if self.auth_key is None else "sign"}:
            return text("404 page not found", 404)
        if request.method != "POST":
            return refusal(405, f"method is not allowed:{request.method}", 405)
        handler = getattr(self, f"do_{endpoint}", None)
        return text("404 page not found", 404) if handler is None else handler(request.json)

    def do_sign(self, asked: dict[str, Any]) -> Reply:
        self.asked.append(("sign", asked))
        if not asked.get("certificate_request"):
            return refusal(400, "missing parameter 'certificate_request'")
        chain = self.ca.answer(asked["certificate_request"].encode())
        result: dict[str, object] = {"certificate": pem(chain[0]) if chain else ""}
        if not asked.get("bundle"):
            return success(result)
        if not self.bundles:
            return success(result, {"code": 5300, "message": NO_BUNDLER})
        return success(result | {"bundle": self.bundle(*chain)})

    def do_authsign(self, asked: dict[str, Any]) -> Reply:
        inner, token = (base64.b64decode(asked[name], validate=True) for name in ("request", "token"))
        assert self.auth_key is not None
        if not hmac.compare_digest(token, hmac.new(self.auth_key, inner, hashlib.sha256).digest()):
            return refusal(400, "invalid token")
        return self.do_sign(json.loads(inner))

    def do_info(self, asked: dict[str, Any]) -> Reply:
        self.asked.append(("info", asked))
        profile = self.profiles.get(asked.get("profile", ""), self.profiles[""])
        return success({"certificate": pem(self.signer), **profile})

    def do_bundle(self, asked: dict[str, Any]) -> Reply:
        self.asked.append(("bundle", asked))
        if not self.bundles:
            return text("404 page not found", 404)
        return success(self.bundle(x509.load_pem_x509_certificate(asked["certificate"].encode())))

    def bundle(self, *chain: x509.Certificate) -> dict[str, object]:
        return {
            "bundle": "\n".join(map(pem, chain)),
            "root": pem(self.ca.root),
            "crt": "" if not chain else pem(chain[0]),
            "status": {"rebundled": False, "expiring_SKIs": [], "untrusted_root_stores": [], "messages": [], "code": 0},
        }
