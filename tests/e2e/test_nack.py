"""What a real Envoy refuses: the log has its reason, it is sent what it had once more, and the next certificate goes
out.
"""

from datetime import timedelta
from pathlib import Path

import pytest
from anyio import to_thread
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from fakes.agents import write_config
from fakes.envoys import client, envoy
from fakes.events import recorded

from sds_agent.app import agent
from sds_agent.authority.protocol import Issuance, IssueRequest
from sds_agent.clock import SystemClock
from sds_agent.config.loading import load
from sds_agent.inspection.envoy_admin import EnvoyAdmin
from sds_agent.live.agent import Agent
from sds_agent.pki.certificates import read_pem, serial_hex, write_pem
from sds_agent.pki.keys import KeyType, generate, signature_hash, to_pkcs8_pem
from sds_agent.sds.status import NameStatus
from sds_agent.secrets.model import CertificateSecret
from sds_agent.signing.signer import Signer, make_root


class GoodAuthority:
    """A stand-in for a CA, whose root can sign more than it is asked for."""

    def __init__(self) -> None:
        self.root = make_root(generate(KeyType.EC_P256), "demo.example", SystemClock().now(), timedelta(days=1))

    async def issue(self, request: IssueRequest) -> Issuance:
        key = x509.load_pem_x509_csr(request.csr_pem).public_key()
        leaf = self.root.sign_leaf(key, str(request.identity), SystemClock().now(), request.ttl)  # type: ignore[arg-type] # our own CSR
        return Issuance(write_pem([leaf]), write_pem([self.root.certificate]))

    def secret(self, *, must_staple: bool) -> CertificateSecret:
        """One for the workload "default". The agent has no OCSP staple, so Envoy has to refuse one that demands it."""
        key = generate(KeyType.EC_P256)
        leaf = self.root.sign_leaf(
            key.public_key(), "spiffe://demo.example/default", SystemClock().now(), timedelta(hours=1)
        )
        leaf = with_must_staple(leaf, self.root) if must_staple else leaf
        return CertificateSecret(write_pem([leaf]), to_pkcs8_pem(key), leaf.not_valid_after_utc)


def with_must_staple(leaf: x509.Certificate, signer: Signer) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(leaf.subject)
        .issuer_name(leaf.issuer)
        .public_key(leaf.public_key())
        .serial_number(leaf.serial_number)
        .not_valid_before(leaf.not_valid_before_utc)
        .not_valid_after(leaf.not_valid_after_utc)
        .add_extension(x509.TLSFeature([x509.TLSFeatureType.status_request]), critical=False)
    )
    for extension in leaf.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    signed = builder.sign(signer.key, signature_hash(signer.key))
    return x509.load_der_x509_certificate(signed.public_bytes(Encoding.DER))


def of_default(running: Agent) -> NameStatus:
    """How far the name "default" is on the Envoy's stream."""
    names = [name for stream in running.streams if stream.node == "envoy-under-test" for name in stream.names]
    (found,) = (name for name in names if name.name == "default")
    return found


@pytest.mark.parametrize("api_type", ["GRPC", "DELTA_GRPC"])
async def test_refused_certificate_is_reported_and_the_next_one_goes_out(tmp_path: Path, api_type: str) -> None:
    """No answer of a CA is known that the agent takes and an Envoy refuses. Such a one is put into the store here."""
    settings = load(write_config(tmp_path, default="1h", client="1h"), {}).settings
    authority = GoodAuthority()
    with recorded() as events:
        async with (
            agent(settings, {"local": authority}, SystemClock()) as running,
            envoy(settings.sds.socket, tmp_path, api_type=api_type) as proxy,
        ):
            await proxy.ready()
            visitor, port = await client(settings.sds.socket, tmp_path), await proxy.port()
            first = await visitor.request(port)
            running.store.publish({"default": authority.secret(must_staple=True)})
            refused = await events.wait("nacked", node="envoy-under-test")
            again = await events.wait("taken_back", node="envoy-under-test")
            await events.wait("acked", names=["default"], count=2)
            seen = of_default(running)
            assert seen.nacked is not None
            assert seen.sent == seen.acked == again["version"] != seen.nacked.version == again["refused"]
            assert "staple" in seen.nacked.reason
            assert (refused["names"], refused["version"]) == (["default"], [seen.nacked.version])
            assert refused["reason"] == seen.nacked.reason
            assert await visitor.request(port) == first, "Envoy goes on with what it had"
            loaded = {each.name: each for each in await to_thread.run_sync(EnvoyAdmin(str(proxy.place)).secrets)}
            assert (loaded["default"].state, loaded["ROOTCA"].state) == ("ACTIVE", "ACTIVE")
            third = authority.secret(must_staple=False)
            running.store.publish({"default": third})
            pushed = await events.wait("sent", names=["default"], count=4)
            await events.wait("acked", names=["default"], nonce=pushed["nonce"])
            assert await visitor.request(port) == serial_hex(read_pem(third.chain_pem)[0])
            assert len(events.named("nacked")) == 1, "what was refused is not sent again"
            seen = of_default(running)
            assert seen.acked == seen.sent == pushed["version"][0]
            assert seen.nacked is None, "what was refused is over"
