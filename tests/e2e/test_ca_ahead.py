"""A CA whose clock is ahead, as its callers see it: a real agent and a real Envoy, asked without a pause."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

from cryptography import x509
from fakes.agents import agent
from fakes.envoys import client, envoy
from fakes.hierarchy import Key, make_leaf
from fakes.istio_ca import Asked, IstioCa
from sds_agent_proto.istio_pb2 import CertificateResponse

from sds_agent.pki.certificates import serial_hex, write_pem

WEB, CLIENT = "spiffe://demo.example/web", "spiffe://demo.example/client"
SECOND = timedelta(seconds=1)


class Ahead:
    """Answers with what is valid for some seconds: the first at once, the others not before two seconds have passed."""

    def __init__(self, ca: IstioCa) -> None:
        self.leaves: list[x509.Certificate] = []
        self._ca = ca

    def __call__(self, asked: Asked) -> CertificateResponse:
        csr = x509.load_pem_x509_csr(asked.message.csr.encode())
        (uri,) = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        now = datetime.now(UTC)
        begin, end = now - 60 * SECOND, now + 3600 * SECOND
        if uri.value == WEB:
            begin, end = (now + 2 * SECOND if self.leaves else begin), now + 7 * SECOND
        leaf = make_leaf(self._ca.signer, uri.value, key=cast("Key", csr), not_before=begin, not_after=end)
        if uri.value == WEB:
            self.leaves.append(leaf)
        chain = [leaf, self._ca.signer.certificate, self._ca.root.certificate]
        return CertificateResponse(cert_chain=[write_pem([each]).decode() for each in chain])


async def test_no_request_meets_a_certificate_that_is_not_valid_yet(tmp_path: Path) -> None:
    """From the renewal to its NotBefore every handshake failed."""
    ca = IstioCa()
    ca.answer = ahead = Ahead(ca)
    (tmp_path / "token").write_text("a-token")
    async with ca.serving(plaintext=True) as address:
        config = {
            "trust_domain": "demo.example",
            "state_dir": str(tmp_path / "state"),
            "sds": {"socket": str(tmp_path / "sds.sock")},
            "authorities": {
                "ca": {
                    "type": "istio",
                    "address": address,
                    "token_file": str(tmp_path / "token"),
                    "plaintext_loopback": True,
                    "impersonate": True,
                }
            },
            "workloads": [
                {"name": "default", "spiffe_id": WEB, "ttl": "7s"},
                {"name": "client", "spiffe_id": CLIENT},
            ],
        }
        file = tmp_path / "sds-agent.yaml"
        file.write_text(json.dumps(config))
        async with agent(file) as running, envoy(running.socket, tmp_path) as proxy:
            await proxy.ready()
            visitor, port = await client(running.socket, tmp_path), await proxy.port()
            first = await visitor.request(port)
            while (presented := await visitor.request(port)) == first:
                pass
            held_back = running.events("held_back", workload="default")
    assert presented in {serial_hex(leaf) for leaf in ahead.leaves[1:]}
    assert held_back[0]["serving"] == "the certificate before it"
