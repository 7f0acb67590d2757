"""The agent with CFSSL 1.6.5 as its CA."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ca_interop.driver import URI, Server, agent, free_port, program, server
from cryptography import x509
from fakes.hierarchy import Ca, make_ca, make_leaf, new_key

from sds_agent.pki.certificates import subject_alternative_uris, write_pem
from sds_agent.pki.keys import to_pkcs8_pem

DAY = timedelta(days=1)
KEY = "0123456789abcdef0123456789abcdef"
USAGES = ["digital signature", "server auth", "client auth"]
MESH = {"usages": USAGES, "expiry": "75s", "backdate": "30s", "auth_key": "mesh"}
"""CFSSL rounds NotBefore to a whole minute: such a certificate is valid for 15 to 75 s from its issue."""


def ca(name: str, issuer: Ca | None = None) -> Ca:
    now = datetime.now(UTC)
    return make_ca(name, issuer, not_before=now - DAY, not_after=now + DAY)


class Cfssl:
    """What a CFSSL is started with: its CA, its TLS, its profiles."""

    def __init__(self, place: Path, version: str = "cfssl") -> None:
        self.place = place
        self.port = free_port()
        self.tls = ca("tls root")
        self.version = version
        now = datetime.now(UTC)
        key, names = new_key(), [x509.DNSName("localhost")]
        leaf = make_leaf(self.tls, None, key=key, names=names, not_before=now - DAY, not_after=now + DAY)
        self.write("tls.pem", write_pem([leaf]))
        self.write("tls-key.pem", to_pkcs8_pem(key))
        self.write("tls-root.pem", write_pem([self.tls.certificate]))
        self.write("hmac", KEY.encode())
        self.options: list[str] = []
        self.profiles(mesh=MESH)

    def write(self, name: str, content: bytes) -> Path:
        (self.place / name).write_bytes(content)
        return self.place / name

    def profiles(self, default: Mapping[str, object] = MESH, **profiles: Mapping[str, object]) -> None:
        """Its signing policy."""
        policy = {"signing": {"default": default, "profiles": profiles}}
        keys = {"auth_keys": {"mesh": {"type": "standard", "key": KEY}}}
        self.write("config.json", json.dumps(policy | keys).encode())

    def sign_with(self, signer: Ca) -> None:
        """The CA's certificate and key from the next start on."""
        self.write("ca.pem", write_pem([signer.certificate]))
        self.write("ca-key.pem", to_pkcs8_pem(signer.key))  # type: ignore[arg-type]  # of a kind that is ours

    def server(self) -> Server:
        options = [
            "-address=127.0.0.1",
            f"-port={self.port}",
            "-ca=ca.pem",
            "-ca-key=ca-key.pem",
            "-config=config.json",
        ]
        tls = ["-tls-cert=tls.pem", "-tls-key=tls-key.pem"]
        command = [program(self.version), "serve", *options, *tls, *self.options]
        return Server(self.place / "cfssl.log", command, port=self.port, directory=self.place)

    def settings(self, **more: object) -> dict[str, object]:
        """The authority that leads to it."""
        return {
            "type": "cfssl",
            "url": f"https://localhost:{self.port}",
            "ca_file": self.place / "tls-root.pem",
            "auth_key_file": self.place / "hmac",
            "profile": "mesh",
            "refresh_every": "1s",
            **more,
        }


async def test_first_certificate_and_three_renewals_by_authsign(place: Path) -> None:
    cfssl, root = Cfssl(place), ca("root")
    cfssl.sign_with(root)
    async with server(cfssl.server()), agent(place, cfssl.settings(), ttl="1m", fraction=0.2) as running:
        first = await running.first()
        newest = await running.renewed(3)
        assert subject_alternative_uris(first) == subject_alternative_uris(newest) == (URI,)
        assert first.public_key() != newest.public_key()
        assert running.bundle == (root.certificate,)
