"""Istio's pilot-agent and its Envoy, unchanged, with our CA server."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from fakes.ca_servers import WEB, Identity, Served, served
from fakes.envoys import Client
from fakes.hierarchy import HOUR, make_leaf, new_key
from fakes.istio_parts import PilotAgent, add_root, free_port, intermediate, pilot_agent, plugged, replace, signer_of
from fakes.peers import SotwStream, connected

from sds_agent.authority.protocol import Issuance
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import accept
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.keys import PrivateKey, to_pkcs8_pem

SHORT = {"SECRET_TTL": "4s"}
GENERATED = "generated new workload certificate"
NODE = "an-envoy"
"""Istio's SDS server ends a stream whose first request has no node."""


@dataclass(frozen=True)
class Received:
    """What an Envoy gets as `default`."""

    chain: tuple[x509.Certificate, ...]
    key: object = field(repr=False)


async def certificate_of(stream: SotwStream) -> Received:
    """The next `default` on a stream."""
    secret = (await stream.read())["default"].tls_certificate
    assert secret is not None
    assert secret.certificate_chain is not None
    assert secret.private_key is not None
    key = load_pem_private_key(secret.private_key.inline_bytes or b"", None)
    await stream.ack("default")
    return Received(read_pem(secret.certificate_chain.inline_bytes or b""), key)


async def trusted(stream: SotwStream) -> tuple[x509.Certificate, ...]:
    """The next `ROOTCA` on a stream."""
    context = (await stream.read())["ROOTCA"].validation_context
    assert context is not None
    assert context.trusted_ca is not None
    await stream.ack("ROOTCA")
    return read_pem(context.trusted_ca.inline_bytes or b"")


def client(identity: Identity, folder: Path) -> Client:
    """A TLS client with a certificate of the CA, for a server that has a SPIFFE ID and no host name."""
    context = identity.context(folder)
    context.check_hostname = False
    return Client(context)


def provision(place: Path, identity: Identity) -> dict[str, str]:
    """The way of Istio's virtual machines: a certificate in a directory, which the renewals replace."""
    directory = place / "provisioned"
    directory.mkdir()
    (directory / "key.pem").write_bytes(to_pkcs8_pem(identity.key))
    (directory / "cert-chain.pem").write_text("".join(identity.elements[:-1]))
    (directory / "root-cert.pem").write_text(identity.elements[-1])
    return {"PROV_CERT": str(directory), "OUTPUT_CERTS": str(directory)}


def expired(directory: Path) -> Identity:
    """A certificate that this CA once issued."""
    signer = signer_of(directory)
    own, now = new_key(), datetime.now(UTC)
    leaf = make_leaf(signer, WEB, key=own, not_before=now - 2 * HOUR, not_after=now - HOUR)
    elements = (write_pem([leaf]), write_pem([signer.certificate]), (directory / "root-cert.pem").read_bytes())
    return Identity(own, tuple(element.decode() for element in elements))


def proofs(ca: Served) -> list[str]:
    return [line["proof"] for line in ca.audit if line["outcome"] == "issued"]


def check(got: Received, roots: tuple[x509.Certificate, ...]) -> None:
    """What pilot-agent serves passes every check of ours: key, identity, times, usages and the path to the roots."""
    assert isinstance(got.key, PrivateKey)
    issuance = Issuance(write_pem(got.chain), write_pem(roots))
    identity, public_key = SpiffeId.parse(WEB), got.key.public_key()
    now = got.chain[0].not_valid_before_utc + timedelta(minutes=2)
    accept(issuance, identity=identity, public_key=public_key, anchors=(), now=now)


async def seen(agent: PilotAgent, roots: bytes, kind: type, *, renewals: int = 2) -> None:
    """A certificate and its renewals."""
    async with connected(agent.socket) as peer:
        anchors = await trusted(await peer.stream().ask("ROOTCA", node=NODE))
        assert set(anchors) == set(read_pem(roots)), "pilot-agent sorts them as text"
        stream = await peer.stream().ask("default", node=NODE)
        certificates = [await certificate_of(stream) for _ in range(1 + renewals)]
    for got in certificates:
        check(got, anchors)
        assert isinstance(got.key, kind)
    assert len({got.chain[0].serial_number for got in certificates}) == 1 + renewals


async def test_pilot_agent_gets_and_renews_its_certificate_by_token(tmp_path: Path, place: Path) -> None:
    """Also over connections that the CA asks to replace by new ones."""
    roots = (plugged(tmp_path) / "root-cert.pem").read_bytes()
    async with (
        served(tmp_path, signer="{cacerts: cluster1}", roots=roots, more="limits: {connection_age: 1s}") as ca,
        pilot_agent(place, ca.address, roots, ca.issuer.token(), SHORT) as agent,
    ):
        await agent.envoy.ready()
        await seen(agent, roots, rsa.RSAPrivateKey)
    assert {(line["outcome"], line["proof"]) for line in ca.audit} == {("issued", "jwt")}
    assert len({line["address"] for line in ca.audit}) > 1


async def test_pilot_agent_takes_the_root_of_a_self_signed_ca(tmp_path: Path, place: Path) -> None:
    more = {
        "ECC_SIGNATURE_ALGORITHM": "ECDSA",
        "ECC_CURVE": "P384",
        "ISTIO_META_CLUSTER_ID": "Kubernetes",
        "ISTIO_META_CERT_SIGNER": "any",
    }
    async with served(tmp_path) as ca:
        address = ca.address.replace("127.0.0.1", "localhost")  # for which it wants istiod's name in the certificate
        async with pilot_agent(place, address, ca.roots, ca.issuer.token("RS256"), {**SHORT, **more}) as agent:
            await agent.envoy.ready()
            await seen(agent, ca.roots, ec.EllipticCurvePrivateKey)


async def test_pilot_agent_takes_two_roots_of_an_rsa_signer(tmp_path: Path, place: Path) -> None:
    roots = add_root(tmp_path, plugged(tmp_path, "rsa-2048"))
    async with (
        served(tmp_path, signer="{cacerts: cluster1}", roots=roots) as ca,
        pilot_agent(place, ca.address, roots, ca.issuer.token("EdDSA"), SHORT) as agent,
    ):
        await agent.envoy.ready()
        await seen(agent, roots, rsa.RSAPrivateKey)


async def test_pilot_agent_renews_by_its_current_certificate(tmp_path: Path, place: Path) -> None:
    """pilot-agent leaves its connection open, so the CA has to close it when the certificate shown there expires."""
    roots = (plugged(tmp_path) / "root-cert.pem").read_bytes()
    async with served(tmp_path, signer="{cacerts: cluster1}", roots=roots) as ca:
        machine = provision(place, await ca.ask(ca.join_token(), seconds=5))
        async with pilot_agent(place, ca.address, roots, None, {**SHORT, **machine}) as agent:
            await agent.envoy.ready()
            await seen(agent, roots, rsa.RSAPrivateKey, renewals=3)
    first, *renewals = ca.audit
    assert first["proof"] == "join-token"
    assert {line["outcome"] for line in renewals} == {"issued"}
    assert {line["proof"] for line in renewals} == {"certificate"}
    shown = {line["proof_detail"] for line in renewals}
    assert len(shown) > 1, "no connection was made with a renewed certificate"


async def test_pilot_agent_goes_on_after_a_restart_of_our_ca(tmp_path: Path, place: Path) -> None:
    roots = (plugged(tmp_path) / "root-cert.pem").read_bytes()
    address = f"127.0.0.1:{free_port()}"
    ca = partial(served, tmp_path, signer="{cacerts: cluster1}", roots=roots, listen=address)
    async with ca() as running:
        machine = provision(place, await running.ask(running.join_token()))
    async with pilot_agent(place, address, roots, None, {**SHORT, **machine}) as agent:
        async with ca():
            await agent.envoy.ready()
        before = len([line for line in agent.program.lines if GENERATED in line])
        async with ca() as again, connected(agent.socket) as peer:
            await agent.program.line(GENERATED, count=before + 1)
            check(await certificate_of(await peer.stream().ask("default", node=NODE)), read_pem(roots))
            assert proofs(again)[before + 1] == "certificate"


async def test_a_machine_joins_with_pilot_agent_by_a_token_that_is_good_once(tmp_path: Path, place: Path) -> None:
    """Its first connection stays one without a certificate, so one renewal is refused if it comes on that."""
    roots = (plugged(tmp_path) / "root-cert.pem").read_bytes()
    (place / "machine").mkdir()
    (place / "machine/root-cert.pem").write_bytes(roots)
    machine = {"PROV_CERT": str(place / "machine"), "OUTPUT_CERTS": str(place / "machine")}
    async with (
        served(tmp_path, signer="{cacerts: cluster1}", roots=roots) as ca,
        pilot_agent(place, ca.address, roots, ca.join_token(), {**SHORT, **machine}) as agent,
    ):
        await agent.envoy.ready()
        await agent.program.line(GENERATED, count=4)
    assert proofs(ca)[:4] == ["join-token", "certificate", "certificate", "certificate"]
    assert len([line for line in ca.audit if line["outcome"] != "issued"]) <= 1


async def test_pilot_agent_comes_back_by_token_when_its_certificate_has_expired(tmp_path: Path, place: Path) -> None:
    directory = plugged(tmp_path)
    roots = (directory / "root-cert.pem").read_bytes()
    machine = provision(place, expired(directory))
    async with (
        served(tmp_path, signer="{cacerts: cluster1}", roots=roots) as ca,
        pilot_agent(place, ca.address, roots, ca.issuer.token(), machine) as agent,
    ):
        await agent.envoy.ready()
    assert proofs(ca) == ["jwt"]


async def test_the_envoy_of_pilot_agent_and_a_certificate_of_our_ca_trust_each_other(
    tmp_path: Path, place: Path
) -> None:
    roots = (plugged(tmp_path) / "root-cert.pem").read_bytes()
    async with (
        served(tmp_path, signer="{cacerts: cluster1}", roots=roots) as ca,
        pilot_agent(place, ca.address, roots, ca.issuer.token(), SHORT) as agent,
    ):
        visitor = client(await ca.ask(ca.join_token()), tmp_path)
        await agent.envoy.ready()
        port = await agent.envoy.port()
        async with connected(agent.socket) as peer:
            stream = await peer.stream().ask("default", node=NODE)
            await certificate_of(stream)
            first = await visitor.request(port)
            await certificate_of(stream)
            await certificate_of(stream)
        assert await visitor.request(port) != first


async def test_pilot_agent_follows_new_roots_and_a_new_signer(tmp_path: Path, place: Path) -> None:
    directory = plugged(tmp_path)
    roots = (directory / "root-cert.pem").read_bytes()
    async with (
        served(tmp_path, signer="{cacerts: cluster1}", roots=roots) as ca,
        pilot_agent(place, ca.address, roots, ca.issuer.token(), SHORT) as agent,
    ):
        await agent.envoy.ready()
        async with connected(agent.socket) as peer:
            stream = await peer.stream().ask("ROOTCA", node=NODE)
            assert await trusted(stream) == read_pem(roots)
            both = add_root(tmp_path, intermediate(tmp_path, "again"))
            replace(directory, tmp_path / "again")
            assert set(await trusted(stream)) == set(read_pem(both))
            certificate = await certificate_of(await peer.stream().ask("default", node=NODE))
    assert certificate.chain[1] == read_pem((directory / "ca-cert.pem").read_bytes())[0]
    assert {line["outcome"] for line in ca.audit} == {"issued"}


async def test_pilot_agent_logs_that_its_token_is_wrong_and_goes_on_with_a_good_one(
    tmp_path: Path, place: Path
) -> None:
    async with served(tmp_path) as ca:
        wrong = ca.issuer.token(aud=["another"])
        async with pilot_agent(place, ca.address, ca.roots, wrong, {}) as agent:
            line = await agent.program.line("failed to sign CSR")
            assert "Unauthenticated" in line
            assert "its audience must be 'istio-ca'" in line
            (place / "var/run/secrets/tokens/istio-token").write_text(ca.issuer.token())
            await agent.envoy.ready()
