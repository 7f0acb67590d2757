"""What a real Envoy refuses: the log has its reason, it is sent what it had once more, and the next certificate goes
out.
"""

import itertools
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
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import KeyType, generate, signature_hash
from sds_agent.sds.status import NameStatus
from sds_agent.signing.signer import Signer, make_root


class MustStapleAuthority:
    """A stand-in for a CA whose template is changed for a while: its second certificate demands an OCSP staple.

    The agent serves no staple, so Envoy has to refuse that one.
    """

    def __init__(self) -> None:
        self._root = make_root(generate(KeyType.EC_P256), "demo.example", SystemClock().now(), timedelta(days=1))
        self._count = itertools.count(1)

    async def issue(self, request: IssueRequest) -> Issuance:
        """Sign, and from time to time add the extension."""
        key = x509.load_pem_x509_csr(request.csr_pem).public_key()
        leaf = self._root.sign_leaf(key, str(request.identity), SystemClock().now(), request.ttl)  # type: ignore[arg-type] # our own CSR
        if request.identity.path == "/default" and next(self._count) == 2:
            leaf = with_must_staple(leaf, self._root)
        return Issuance(write_pem([leaf]), write_pem([self._root.certificate]))


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
    settings = load(write_config(tmp_path, default="6s", client="1h"), {}).settings
    authority = MustStapleAuthority()
    with recorded() as events:
        async with (
            agent(settings, {"local": authority}, SystemClock()) as running,
            envoy(settings.sds.socket, tmp_path, api_type=api_type) as proxy,
        ):
            await proxy.ready()
            visitor, port = await client(settings.sds.socket, tmp_path), await proxy.port()
            first = await visitor.request(port)
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
            third = await events.wait("renewed", workload="default", count=2)
            pushed = await events.wait("sent", names=["default"], count=4)
            await events.wait("acked", names=["default"], nonce=pushed["nonce"])
            assert await visitor.request(port) == third["serial"]
            assert len(events.named("nacked")) == 1, "what was refused is not sent again"
            seen = of_default(running)
            assert seen.acked == seen.sent == pushed["version"][0]
            assert seen.nacked is None, "what was refused is over"
