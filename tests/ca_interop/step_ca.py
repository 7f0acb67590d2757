"""A real step-ca on loopback: its ca.json and its keys are made here, so nothing of step is needed but the server."""

import hashlib
import json
import os
import secrets
import signal
import ssl
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import httpx
import jwt
from ca_interop.driver import TIMEOUT, Server, free_port, program, server
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from fakes.hierarchy import Ca, make_ca
from fakes.step_ca_server import KID, jwe_of, jwk_of

from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import PrivateKey, to_pkcs8_pem

DAY = timedelta(days=1)
SERVING = "Serving HTTPS on"
ROUNDS = 600_000
"""With which step derives the key that encrypts a provisioner's."""
PURE_SVID = """{
  "sans": {{ toJson .SANs }},
  "keyUsage": ["digitalSignature"],
  "extKeyUsage": ["serverAuth", "clientAuth"],
  "basicConstraints": {"isCA": false}
}"""
"""The template of docs/authorities/step-ca.md: no subject, so that the SAN is critical."""


POINT = "https://127.0.0.1/1.0/crl"
LISTS: dict[str, object] = {"enabled": True, "generateOnRevoke": True, "cacheDuration": "24h", "idpURL": POINT}
LISTED_SVID = PURE_SVID.replace('"sans"', f'"crlDistributionPoints": ["{POINT}"],\n  "sans"')
"""The same with the address of the revocation list, as docs/authorities/step-ca.md has it."""


@dataclass(frozen=True)
class Hierarchy:
    """What step-ca signs with."""

    root: Ca
    signer: Ca


class RealStepCa:
    """A step-ca in a directory of its own, with a JWK provisioner `sds` and an X5C provisioner `devices`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        now = datetime.now(UTC)
        self.validity: dict[str, Any] = {"not_before": now - DAY, "not_after": now + 30 * DAY}
        self.root = make_ca("step root", **self.validity)
        self.signer = make_ca("step intermediate", self.root, **self.validity)
        self.devices = make_ca("devices", **self.validity)
        self.roots = [self.root]
        self.federated: list[Ca] = []
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.claims: dict[str, object] = {"minTLSCertDuration": "1s", "maxTLSCertDuration": "24h"}
        self.options: dict[str, object] = {}
        self.authority: dict[str, object] = {}
        self.lists: dict[str, object] | None = None
        """The `crl` of its ca.json."""
        self.names = ["127.0.0.1"]
        self.server = Server(
            folder / "ca.log",
            [program("step-ca"), str(folder / "ca.json")],
            says=SERVING,
            environment={"STEPPATH": str(folder)},
        )

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def fingerprint(self) -> str:
        """Of the root that vouches for the server now."""
        return hashlib.sha256(self.root.certificate.public_bytes(Encoding.DER)).hexdigest()

    def make_signer(self, root: str, signer: str) -> "Hierarchy":
        """A new root with an intermediate, of these names."""
        made = make_ca(root, **self.validity)
        return Hierarchy(made, make_ca(signer, made, **self.validity))

    def write(self) -> Path:
        """The configuration and all that it names, as the attributes say."""
        paths = {name: self.folder / name for name in ("signer.crt", "signer.key", "ca.json")}
        paths["signer.crt"].write_bytes(write_pem([self.signer.certificate]))
        assert isinstance(self.signer.key, PrivateKey)
        paths["signer.key"].write_bytes(to_pkcs8_pem(self.signer.key))
        roots = [self._certificate(f"root-{n}.crt", ca) for n, ca in enumerate(self.roots)]
        federated = [self._certificate(f"federated-{n}.crt", ca) for n, ca in enumerate(self.federated)]
        devices = Path(self._certificate("devices.crt", self.devices)).read_bytes()
        provisioners = [
            {"type": "JWK", "name": "sds", "key": jwk_of(self.key, private=False), "options": self.options},
            {"type": "X5C", "name": "devices", "roots": _base64(devices)},
        ]
        config = {
            "root": roots,
            "federatedRoots": federated,
            "crt": str(paths["signer.crt"]),
            "key": str(paths["signer.key"]),
            "address": f"127.0.0.1:{self.port}",
            "dnsNames": self.names,
            "logger": {"format": "json"},
            "authority": {"claims": self.claims, "provisioners": provisioners, **self.authority},
        }
        if self.lists is not None:
            config["crl"] = self.lists
            config["db"] = {"type": "badgerv2", "dataSource": str(self.folder / "db")}
        paths["ca.json"].write_text(json.dumps(config))
        return paths["ca.json"]

    def _certificate(self, name: str, ca: Ca) -> str:
        path = self.folder / name
        path.write_bytes(write_pem([ca.certificate]))
        return str(path)

    def jwk_files(self, folder: Path, password: bytes = b"a long passphrase") -> dict[str, str]:
        """The provisioner's key as step writes it, and its password; the keys of a configuration that name them."""
        (folder / "sds.jwe").write_text(jwe_of(json.dumps(jwk_of(self.key)).encode(), password, rounds=ROUNDS))
        (folder / "password").write_bytes(password + b"\n")
        for name in ("sds.jwe", "password"):
            (folder / name).chmod(0o600)
        return {"jwk_file": str(folder / "sds.jwe"), "password_file": str(folder / "password")}

    async def reload(self) -> None:
        """Write the configuration anew and have the running server read it."""
        before = self.server.output.count(SERVING)
        self.write()
        os.kill(self.server.pid, signal.SIGHUP)
        with anyio.fail_after(TIMEOUT):
            while self.server.output.count(SERVING) == before:  # noqa: ASYNC110 - the writing of a file wakes no task
                await anyio.sleep(0.05)

    async def restart(self) -> None:
        """Stop it, and start it with what the attributes say now."""
        await self.server.stop()
        self.write()
        await self.server.start()

    async def revoke(self, leaf: x509.Certificate) -> None:
        """Revoke it as `step ca revoke` does, with a token for its serial number."""
        serial, now = str(leaf.serial_number), datetime.now(UTC)
        claims = {
            "iss": "sds",
            "aud": f"{self.url}/1.0/revoke",
            "sub": serial,
            "jti": secrets.token_hex(16),
            "nbf": now - timedelta(seconds=1),
            "exp": now + timedelta(minutes=5),
        }
        token = jwt.encode(claims, self.key, "ES256", {"kid": KID})
        roots = ssl.create_default_context(cadata=write_pem([self.root.certificate]).decode())
        async with httpx.AsyncClient(verify=roots) as client:
            answer = await client.post(
                f"{self.url}/1.0/revoke", json={"serial": serial, "ott": token, "reasonCode": 1, "passive": True}
            )
        assert answer.status_code == 200, answer.text

    def requests(self, path: str, status: int = 201) -> list[dict[str, Any]]:
        """The requests for a path that its log says it answered so."""
        logged = (json.loads(line) for line in self.server.output.splitlines() if line.startswith("{"))
        return [each for each in logged if each.get("path") == path and each.get("status") == status]


@asynccontextmanager
async def serving(ca: RealStepCa) -> AsyncIterator[RealStepCa]:
    """Run it inside this context, with what its attributes say."""
    ca.write()
    async with server(ca.server):
        yield ca


def _base64(data: bytes) -> str:
    return b64encode(data).decode()
