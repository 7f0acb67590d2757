"""What signs while the CA serves: its answers, other signers and roots, what is revoked and what has expired."""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from fakes import der
from fakes.ca_servers import WEB, Identity, Served, Shifted, ask, fresh, plug, served, soon
from fakes.clocks import HandClock
from fakes.der import Entity
from fakes.events import recorded
from fakes.hierarchy import NOW, Ca, make_ca, make_crl, make_leaf, new_key
from msgspec import structs

from sds_agent.ca.lists import SETTLE
from sds_agent.ca.source import CHECK_EVERY, PluggedSource, SelfSignedSource
from sds_agent.ca.tls import ServerTls, sign_server
from sds_agent.errors import ConfigurationError, ProblemsError
from sds_agent.pki.certificates import (
    extended_key_usages,
    is_ca,
    is_self_signed,
    read_pem,
    san_values,
    serial_hex,
    write_pem,
)
from sds_agent.pki.keys import KeyType, generate, to_pkcs8_pem
from sds_agent.signing.self_signed import SelfSignedCa
from sds_agent.signing.signer import Signer, SignerError
from sds_agent.signing.signing_set import SigningSet

UNLIMITED = "limits: {per_caller: 1000000}"


@pytest.fixture
async def ca(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as it:
        yield it


async def test_a_self_signed_answer_is_the_leaf_and_the_root(ca: Served) -> None:
    got = await ca.ask(ca.issuer.token())
    assert len(got.elements) == 2
    assert all(element.endswith("-----END CERTIFICATE-----\n") for element in got.elements)
    assert got.roots == ca.roots


async def test_no_certificate_outlives_its_signer(tmp_path: Path) -> None:
    root = fresh("root")
    end = soon(timedelta(hours=3))
    signer = make_ca("short", root, not_before=soon(-timedelta(hours=1)), not_after=end)
    plug(tmp_path / "cacerts", signer, [signer], [root])
    async with served(tmp_path, signer="{cacerts: cacerts}", roots=write_pem([root.certificate])) as ca:
        got = await ca.ask(ca.issuer.token(), seconds=86400)
        assert got.leaf.not_valid_after_utc == end
        assert (await ca.ask(ca.issuer.token(), seconds=60)).leaf.not_valid_after_utc < soon(timedelta(minutes=2))


def test_a_server_whose_signer_expired_keeps_its_certificate_and_says_why() -> None:
    root = fresh("root")
    signer = make_ca("short", root, not_before=soon(-timedelta(hours=1)), not_after=soon(timedelta(hours=1)))
    assert isinstance(signer.key, ec.EllipticCurvePrivateKey)
    signing = SigningSet(Signer(signer.certificate, signer.key), (signer.certificate,), (root.certificate,))
    now = datetime.now(UTC)
    tls = ServerTls(lambda: signing, ["localhost"], lambda: now, ask_client=True)
    first = tls.context()
    now += timedelta(hours=2)
    with recorded() as events:
        assert tls.context() is first
        assert "renew it" in events.named("server_certificate_not_renewed")[0]["cause"]
    with pytest.raises(SignerError):
        ServerTls(lambda: signing, ["localhost"], lambda: now, ask_client=True).context()


def test_the_servers_certificate_is_for_its_names_and_for_servers_alone() -> None:
    """Shown by a client, it must not pass for a workload's, which the same CA signs."""
    signer, now = signing_set(fresh("signer"), fresh("root")).signer, datetime.now(UTC)
    leaf = sign_server(signer, generate(KeyType.EC_P256).public_key(), ["ca.example", "::1"], now, timedelta(hours=1))
    assert [name.value for name in san_values(leaf)] == ["ca.example", ip_address("::1")]
    assert extended_key_usages(leaf) == {ExtendedKeyUsageOID.SERVER_AUTH}
    assert not is_ca(leaf)
    assert now < leaf.not_valid_after_utc <= now + timedelta(hours=1)


def test_a_server_certificate_that_cannot_be_renewed_is_logged_once_and_again_when_the_cause_changes() -> None:
    """Or else each connection writes a line to the log, for as long as the signer stays expired."""
    root, now = fresh("root"), datetime.now(UTC)
    first, second, good = (
        signing_set(
            make_ca(name, root, not_before=soon(-timedelta(hours=1)), not_after=soon(timedelta(hours=hours))), root
        )
        for name, hours in (("first", 1), ("second", 2), ("good", 9))
    )
    current = first
    tls = ServerTls(lambda: current, ["localhost"], lambda: now, ask_client=True)
    tls.context()
    now += timedelta(hours=3)
    with recorded() as events:
        for reported, signing in ((1, first), (2, second), (2, good), (3, second)):
            current = signing
            for _ in range(3):
                tls.context()
            assert len(events.named("server_certificate_not_renewed")) == reported


@pytest.mark.parametrize("where", ["signer", "root"])
def test_a_server_whose_name_no_client_would_take_does_not_start(where: str) -> None:
    """It would say that it listens and is ready, and be reached by nobody."""
    constraints = x509.NameConstraints([x509.DNSName("corp.example")], None)
    of = {"signer": None, "root": None, where: constraints}
    begin, end = soon(-timedelta(hours=1)), soon(timedelta(hours=9))
    root = make_ca("root", constraints=of["root"], not_before=begin, not_after=end)
    signer = make_ca("signer", root, constraints=of["signer"], not_before=begin, not_after=end)
    signing, now = signing_set(signer, root), datetime.now(UTC)
    names = ["ca.corp.example", "192.0.2.1"]
    ServerTls(lambda: signing, names, lambda: now, ask_client=True).context()
    words = f"the name constraints of 'CN={where}' permit 'corp.example', but not 'localhost', so clients would refuse"
    with pytest.raises(SignerError, match=words):
        ServerTls(lambda: signing, [*names, "localhost"], lambda: now, ask_client=True).context()


def test_a_signer_that_may_not_sign_for_the_server_leaves_it_the_certificate_that_it_has() -> None:
    root, now = fresh("root"), datetime.now(UTC)
    constraints = x509.NameConstraints(None, [x509.DNSName("localhost")])
    begin, end = soon(-timedelta(hours=1)), soon(timedelta(hours=9))
    narrow = make_ca("narrow", root, constraints=constraints, not_before=begin, not_after=end)
    current = signing_set(fresh("first", root), root)
    tls = ServerTls(lambda: current, ["localhost"], lambda: now, ask_client=True)
    first = tls.context()
    current = signing_set(narrow, root)
    with recorded() as events:
        assert tls.context() is first
        (reported,) = events.named("server_certificate_not_renewed")
    assert "exclude 'localhost'" in reported["cause"]


def test_a_cross_signed_root_without_constraints_is_enough_for_a_servers_name() -> None:
    key, begin, end = new_key(), soon(-timedelta(hours=1)), soon(timedelta(hours=9))
    constraints = x509.NameConstraints([x509.DNSName("corp.example")], None)
    narrow = make_ca("root", key=key, constraints=constraints, not_before=begin, not_after=end)
    wide = make_ca("root", key=key, not_before=begin, not_after=end)
    signing, now = signing_set(fresh("signer", wide), narrow), datetime.now(UTC)
    both = structs.replace(signing, roots=(*signing.roots, wide.certificate))
    ServerTls(lambda: both, ["localhost"], lambda: now, ask_client=True).context()


def test_an_anchor_that_is_no_root_vouches_for_callers_too(tmp_path: Path) -> None:
    """A cluster may trust its own CA and nothing above it, and its workloads renew without a token all the same."""
    anchor = fresh("cluster1", fresh("a root that is not trusted here"))
    signer, key, now = fresh("region", anchor), generate(KeyType.EC_P256), datetime.now(UTC)
    signing = signing_set(signer, anchor)
    chain = signing.issue(key.public_key(), WEB, now, timedelta(hours=1))
    (tmp_path / "identity.pem").write_bytes(write_pem(chain) + to_pkcs8_pem(key))
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cadata=write_pem([anchor.certificate]).decode())
    client.load_cert_chain(tmp_path / "identity.pem")
    shown = handshake(client, ServerTls(lambda: signing, ["localhost"], lambda: now, ask_client=True).context())
    assert shown is not None
    assert x509.load_der_x509_certificate(shown) == chain[0]


def of_openssls_distaste(issuer: Ca | None = None) -> Ca:
    """A CA with a name in a string type that Envoy loads and OpenSSL does not."""
    own = Entity(der.name(der.attribute(der.ORGANIZATION, "Visible", der.VISIBLE)), generate(KeyType.EC_P256))
    if issuer is None:
        return Ca(der.loaded(der.certificate(own)), own.key)
    above = Entity(issuer.certificate.subject.public_bytes(), issuer.key)  # type: ignore[arg-type]  # an EC key
    return Ca(der.loaded(der.certificate(own, above)), own.key)


def test_an_anchor_that_openssl_does_not_load_costs_no_other(tmp_path: Path) -> None:
    """Envoys take it, so it stays among the roots that are handed out."""
    odd, root, key, now = of_openssls_distaste(), fresh("root"), generate(KeyType.EC_P256), datetime.now(UTC)
    signer = fresh("cluster1", root)
    own = signing_set(signer, root)
    signing = SigningSet(own.signer, own.intermediates, (odd.certificate, root.certificate))
    chain = signing.issue(key.public_key(), WEB, now, timedelta(hours=1))
    (tmp_path / "identity.pem").write_bytes(write_pem(chain) + to_pkcs8_pem(key))
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(cadata=write_pem([root.certificate]).decode())
    client.load_cert_chain(tmp_path / "identity.pem")
    tls = ServerTls(lambda: signing, ["localhost"], lambda: now, ask_client=True)
    with recorded() as events:
        shown = handshake(client, tls.context())
    assert shown is not None
    assert x509.load_der_x509_certificate(shown) == chain[0]
    assert events.named("anchors_left_out")[0]["causes"] == ["OpenSSL does not load 'O=Visible'"]


def test_a_signer_that_openssl_does_not_load_is_refused_and_takes_no_good_ones_place() -> None:
    root, now = fresh("root"), datetime.now(UTC)
    good, bad = signing_set(fresh("good", root), root), signing_set(of_openssls_distaste(root), root)
    with pytest.raises(SignerError, match="OpenSSL does not load the certificate that 'O=Visible' signs"):
        ServerTls(lambda: bad, ["localhost"], lambda: now, ask_client=True).context()
    current = good
    tls = ServerTls(lambda: current, ["localhost"], lambda: now, ask_client=True)
    first, current = tls.context(), bad
    with recorded() as events:
        assert {tls.context() for _ in range(3)} == {first}
    assert len(events.named("server_certificate_not_renewed")) == 1


async def test_a_certificate_that_python_cannot_read_is_its_callers_fault(tmp_path: Path) -> None:
    """Another CA below the same root signed a name that is no text: no bug of this CA, and not logged as one."""
    root = fresh("root")
    signer, key, now = fresh("cluster1", root), generate(KeyType.EC_P256), soon(timedelta())
    plug(tmp_path / "cacerts", signer, [signer], [root])
    name = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, b"\x30\x0c\x86\x0aspiffe://\xff")
    hour = timedelta(hours=1)
    leaf = make_leaf(signer, None, key=key, extra=[(name, True)], not_before=now - hour, not_after=now + hour)
    odd = Identity(key, tuple(write_pem([each]).decode() for each in (leaf, signer.certificate, root.certificate)))
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # in asyncio's own log, which is off
    with recorded() as events:
        async with served(tmp_path, signer="{cacerts: cacerts}", roots=write_pem([root.certificate])) as ca:
            with pytest.raises(grpc.aio.AioRpcError):
                await ca.ask(identity=odd)
            await events.wait("connection_failed")
            assert not events.named("bug")


def test_every_handshake_goes_by_the_signer_and_the_roots_of_the_moment(tmp_path: Path) -> None:
    """Callers may have been given the new root alone, and must be able to come with what the new signer gave them."""
    roots = [fresh("root"), fresh("new root")]
    signers = [fresh("signer", root) for root in roots]
    key, now, client = generate(KeyType.EC_P256), datetime.now(UTC), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old, new = (signing_set(signer, root) for signer, root in zip(signers, roots, strict=True))
    current = old
    tls = ServerTls(lambda: current, ["localhost"], lambda: now, ask_client=True)
    chain = new.issue(key.public_key(), WEB, now, timedelta(hours=1))
    (tmp_path / "identity.pem").write_bytes(write_pem(chain) + to_pkcs8_pem(key))
    client.load_cert_chain(tmp_path / "identity.pem")
    client.load_verify_locations(cadata=write_pem([roots[0].certificate]).decode())
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(client, tls.context())
    current = SigningSet(old.signer, old.intermediates, (*old.roots, *new.roots))
    assert handshake(client, tls.context())
    current = new
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(cadata=write_pem([roots[1].certificate]).decode())
    assert handshake(client, tls.context()) is None, "it shows no certificate, and takes the server's"


def test_the_servers_chain_follows_a_ca_above_the_signer_that_was_issued_anew() -> None:
    """Such a CA is renewed under the same signer. Callers would get the one that ends, past its end."""
    root, hour = fresh("root"), timedelta(hours=1)
    ended = make_ca("region", root, not_before=soon(-2 * hour), not_after=soon(-hour))
    renewed = fresh("region", root, key=ended.key)
    signer = fresh("signer", ended)
    own = signing_set(signer, root)
    before, after = (
        SigningSet(own.signer, (signer.certificate, above.certificate), own.roots) for above in (ended, renewed)
    )
    current = before
    tls = ServerTls(lambda: current, ["localhost"], lambda: datetime.now(UTC), ask_client=True)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(cadata=write_pem([root.certificate]).decode())
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
        handshake(client, tls.context())
    current = after
    handshake(client, tls.context())


@pytest.mark.parametrize("intermediates", [False, True])
def test_a_handshake_sends_the_chain_that_was_loaded_and_searches_for_none(*, intermediates: bool) -> None:
    """OpenSSL would look for the issuer of a certificate that stands alone, and verify it, in every handshake."""
    root = fresh("root")
    above = make_ca("above", root, not_before=soon(-timedelta(hours=1)), not_after=soon(timedelta(hours=1)))
    signing = signing_set(above, root)
    if not intermediates:
        signing = structs.replace(signing_set(root, root), intermediates=())
    server = ServerTls(lambda: signing, ["localhost"], lambda: datetime.now(UTC), ask_client=False).context()
    server.maximum_version = ssl.TLSVersion.TLSv1_2  # in which certificates are sent as they are
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context()
    client.set_alpn_protocols(["h2"])
    greeting = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        client.wrap_bio(ssl.MemoryBIO(), greeting, server_hostname="localhost").do_handshake()
    incoming.write(greeting.read())
    with suppress(ssl.SSLWantReadError):
        server.wrap_bio(incoming, outgoing, server_side=True).do_handshake()
    sent = outgoing.read()
    issuer = signing.signer.certificate
    assert issuer.public_bytes(Encoding.DER) in sent, "with no anchors to search in, it came from the loaded chain"


def signing_set(signer: Ca, root: Ca) -> SigningSet:
    assert isinstance(signer.key, ec.EllipticCurvePrivateKey)
    return SigningSet(Signer(signer.certificate, signer.key), (signer.certificate,), (root.certificate,))


def handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> bytes | None:
    """The certificate that the server saw. Raises SSLError where one refuses the other."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    caller = client.wrap_bio(back, there, server_hostname="localhost")
    answering = server.wrap_bio(there, back, server_side=True)
    for side in (caller, answering) * 3:
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    assert caller.version()
    assert answering.version()
    return answering.getpeercert(binary_form=True)


async def test_a_revoked_certificate_renews_nothing(tmp_path: Path) -> None:
    root = fresh("root")
    signer = fresh("cluster1", root)
    plug(tmp_path / "cacerts", signer, [signer], [root])
    async with served(tmp_path, signer="{cacerts: cacerts}", roots=write_pem([root.certificate])) as ca:
        got = await ca.ask(ca.issuer.token())
        with recorded() as events:
            write_crl(tmp_path / "cacerts", current_crl(signer, got.leaf))
            await events.wait("signer", revocation_lists=1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ca.ask(identity=got)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "the client certificate with serial number" in ca.audit[-1]["reason"]
        await ca.ask(ca.issuer.token())


async def test_no_certificate_of_a_revoked_intermediate_renews_anything(tmp_path: Path) -> None:
    """A stolen intermediate is what a root's revocation list is for; its leaves are unknown and cannot be listed."""
    root = fresh("root")
    stolen, signer = fresh("stolen", root), fresh("cluster1", root)
    plug(tmp_path / "cacerts", stolen, [stolen], [root])
    async with served(tmp_path, signer="{cacerts: cacerts}", roots=write_pem([root.certificate])) as ca:
        old = await ca.ask(ca.issuer.token())
        async with ca.connected(old) as channel:
            await ask(channel)
            with recorded() as events:
                plug(tmp_path / "cacerts", signer, [signer], [root])
                write_crl(tmp_path / "cacerts", current_crl(root, stolen.certificate))
                await events.wait("signer", revocation_lists=1)
            for attempt in (ask(channel), ca.ask(identity=old)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await attempt
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert "the CA 'CN=stolen' above the client's" in ca.audit[-1]["reason"]
        await ca.ask(identity=await ca.ask(ca.issuer.token()))


async def test_a_revocation_list_of_another_key_is_refused_in_words(tmp_path: Path) -> None:
    root = fresh("root")
    signer = fresh("cluster1", root)
    plug(tmp_path / "cacerts", signer, [signer], [root])
    with recorded() as events:
        async with served(tmp_path, signer="{cacerts: cacerts}", roots=write_pem([root.certificate])) as ca:
            write_crl(tmp_path / "cacerts", current_crl(fresh("cluster1", root)))
            reported = await events.wait("signer_not_taken")
            assert "not signed with that CA's key" in reported["causes"][0]
            await ca.ask(ca.issuer.token())
    with pytest.raises(ConfigurationError, match="not signed with that CA's key"):
        async with served(tmp_path, signer="{cacerts: cacerts}"):
            raise AssertionError


async def test_an_overdue_revocation_list_is_logged_once_and_locks_no_caller_out(tmp_path: Path) -> None:
    root, clock = fresh("root"), Shifted()
    signer = fresh("cluster1", root)
    roots = write_pem([root.certificate])
    plug(tmp_path / "cacerts", signer, [signer], [root])
    past = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
    write_crl(tmp_path / "cacerts", make_crl(root, last_update=past - timedelta(days=1), next_update=past))
    with recorded() as events:
        async with served(tmp_path, signer="{cacerts: cacerts}", roots=roots, clock=clock) as ca:
            (reported,) = events.named("revocation_list_overdue")
            assert (reported["level"], reported["issuer"]) == ("error", "'CN=root'")
            await ca.ask(identity=await ca.ask(ca.issuer.token()))
            write_crl(tmp_path / "cacerts", current_crl(signer))
            await events.wait("signer", count=2)
            clock.ahead = timedelta(days=2)
            await events.wait("revocation_list_overdue", issuer="'CN=cluster1'")
            (tmp_path / "cacerts" / "root-cert.pem").write_bytes(roots + b"\n")
            await events.wait("signer", count=3)
            assert len(events.named("revocation_list_overdue")) == 2


async def test_no_way_of_losing_a_revocation_list_lets_in_whom_it_keeps_out(tmp_path: Path) -> None:
    """A file that is cut off, removed or put back from a copy: no caller that was shut out gets in again."""
    root, clock = fresh("root"), Shifted()
    signer, directory = fresh("cluster1", root), tmp_path / "cacerts"
    plug(directory, signer, [signer], [root])
    past = datetime.now(UTC).replace(microsecond=0) - timedelta(days=2)
    older = make_crl(signer, last_update=past, next_update=past + timedelta(days=9))
    roots = write_pem([root.certificate])
    with recorded() as events:
        async with served(tmp_path, signer="{cacerts: cacerts}", roots=roots, clock=clock) as ca:
            caller = await ca.ask(ca.issuer.token())
            write_crl(directory, current_crl(signer, caller.leaf))
            await events.wait("signer", revocation_lists=1)
            async with ca.connected(caller) as channel:
                (directory / "ca-crl.pem").write_bytes(b"")
                assert "ca-crl.pem: is empty" in (await events.wait("signer_not_taken"))["causes"][0]
                await still_revoked(channel)
                (directory / "ca-crl.pem").unlink()
                reported = await events.wait("revocation_list_gone", level="error", issuer="'CN=cluster1'")
                assert "for an hour" in reported["effect"]
                await still_revoked(channel)
                write_crl(directory, older)
                assert (await events.wait("revocation_list_older"))["found_last_update"].startswith(f"{past:%Y-%m-%d}")
                await still_revoked(channel)
                (directory / "ca-crl.pem").unlink()
                await events.wait("revocation_list_gone", count=2)
                clock.lasted = SETTLE
                await events.wait("revocation_list_dropped")
    (directory / "ca-crl.pem").write_bytes(b"\n")
    with pytest.raises(ConfigurationError, match=r"ca-crl\.pem: is empty"):
        async with served(tmp_path, signer="{cacerts: cacerts}"):
            raise AssertionError


async def test_a_clock_that_is_set_neither_shortens_nor_lengthens_the_hour_of_a_list_that_is_gone(
    tmp_path: Path,
) -> None:
    """Set ahead, as by the network after a boot, it would let in at once what was revoked."""
    root, clock = make_ca("root"), HandClock()
    plug(tmp_path, root, [root], [root])
    write_crl(tmp_path, make_crl(root, last_update=NOW, next_update=NOW + timedelta(days=1)))
    source = await PluggedSource.open(tmp_path, trust_domain="demo.example", passphrase_file=None, clock=clock)
    (tmp_path / "ca-crl.pem").unlink()

    async def check_again(after: timedelta = timedelta(seconds=CHECK_EVERY)) -> None:
        clock.elapse(after)
        await clock.asleep()

    with recorded() as events:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(source.follow)
            await clock.asleep()
            await check_again()
            assert len(events.named("revocation_list_gone")) == 1
            for step in (SETTLE, -3 * SETTLE):
                clock.set_wall(step)
                await check_again()
                assert len(source.current().crls) == 1
            await check_again(SETTLE)
            assert source.current().crls == ()
            tasks.cancel_scope.cancel()


async def still_revoked(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(channel)
    assert "is revoked" in (caught.value.details() or "")


def current_crl(issuer: Ca, *revoked: x509.Certificate) -> x509.CertificateRevocationList:
    now = datetime.now(UTC).replace(microsecond=0)
    return make_crl(issuer, *revoked, last_update=now - timedelta(hours=1), next_update=now + timedelta(days=1))


def write_crl(directory: Path, crl: x509.CertificateRevocationList) -> None:
    (directory / "ca-crl.pem").write_bytes(crl.public_bytes(Encoding.PEM))


async def test_a_root_that_is_taken_away_takes_only_its_own_certificates_along(tmp_path: Path) -> None:
    """Also on connections that were made before; a root that was only renewed, with its key, is not taken away."""
    root, other = fresh("root"), fresh("other root")
    renewed = fresh("root", key=root.key)
    former, signer, foreign = fresh("former", root), fresh("signer", root), fresh("foreign", other)
    plug(tmp_path / "cacerts", foreign, [foreign], [other, root])
    roots = write_pem([root.certificate, other.certificate])
    with recorded() as events:
        async with served(tmp_path, signer="{cacerts: cacerts}", roots=roots) as ca:
            lost = await ca.ask(ca.issuer.token())
            plug(tmp_path / "cacerts", former, [former], [root, other])
            await events.wait("signer", count=2)
            stored = await ca.ask(ca.issuer.token())
            async with ca.connected(stored) as good, ca.connected(lost) as bad:
                await ask(good)
                await ask(bad)
                plug(tmp_path / "cacerts", signer, [signer], [renewed])
                await events.wait("signer", roots=1)
                assert events.named("callers_left_behind") == []
                assert (await ask(good)).leaf.issuer == signer.certificate.subject
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await ask(bad)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert "no longer trusted" in ca.audit[-1]["reason"]


async def test_a_root_that_is_exchanged_in_one_step_is_logged_and_can_be_fixed(tmp_path: Path) -> None:
    """Machines that joined by token would have to be given a new one each."""
    root, new_root = fresh("root"), fresh("new root")
    signer, new_signer = fresh("signer", root), fresh("new signer", new_root)
    plug(tmp_path / "cacerts", signer, [signer], [root])
    roots = write_pem([root.certificate, new_root.certificate])
    with recorded() as events:
        async with served(tmp_path, signer="{cacerts: cacerts}", roots=roots) as ca:
            machine = await ca.ask(ca.join_token())
            plug(tmp_path / "cacerts", new_signer, [new_signer], [new_root])
            reported = await events.wait("callers_left_behind")
            assert reported["signer"] == serial_hex(signer.certificate)
            plug(tmp_path / "cacerts", new_signer, [new_signer], [new_root, root])
            await events.wait("signer", roots=2)
            assert (await ca.ask(identity=machine)).leaf.issuer == new_signer.certificate.subject
            assert len(events.named("callers_left_behind")) == 1


async def test_a_root_that_signs_itself_leaves_no_caller_behind_as_long_as_it_is_advertised(tmp_path: Path) -> None:
    root, successor = fresh("root"), fresh("successor")
    plug(tmp_path / "cacerts", root, [root], [root])
    roots = write_pem([root.certificate, successor.certificate])
    with recorded() as events:
        async with served(tmp_path, signer="{cacerts: cacerts}", roots=roots) as ca:
            machine = await ca.ask(ca.join_token())
            plug(tmp_path / "cacerts", successor, [successor], [root, successor])
            await events.wait("signer", roots=2)
            await ca.ask(identity=machine)
    assert events.named("callers_left_behind") == []


async def test_a_plugged_in_signer_answers_with_its_intermediate_and_all_roots(tmp_path: Path) -> None:
    old, root = fresh("old root"), fresh("root")  # in this order, for the one that ends later comes first
    signer = fresh("cluster1", root)
    plug(tmp_path / "cacerts", signer, [signer], [root, old])
    roots = write_pem([root.certificate])
    async with served(tmp_path, signer="{cacerts: cacerts}", roots=roots) as ca:
        got = await ca.ask(ca.issuer.token())
        assert [len(read_pem(element.encode())) for element in got.elements] == [1, 1, 2]
        assert read_pem(got.elements[1].encode()) == (signer.certificate,)
        assert read_pem(got.roots) == (root.certificate, old.certificate)
        assert not any(is_self_signed(c) for e in got.elements[:-1] for c in read_pem(e.encode()))
        renewed = await ca.ask(identity=got)
        assert renewed.leaf.issuer == signer.certificate.subject


async def test_a_plugged_in_key_may_be_encrypted(tmp_path: Path) -> None:
    root = fresh("root")
    signer = fresh("cluster1", root)
    plug(tmp_path / "cacerts", signer, [signer], [root])
    encrypted = signer.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (tmp_path / "cacerts" / "ca-key.pem").write_bytes(encrypted)
    (tmp_path / "passphrase").write_text("secret\n")
    how = "{cacerts: cacerts, passphrase_file: passphrase}"
    async with served(tmp_path, signer=how, roots=write_pem([root.certificate])) as ca:
        assert (await ca.ask(ca.issuer.token())).leaf.issuer == signer.certificate.subject


async def test_the_page_gives_the_form_of_every_answer(tmp_path: Path) -> None:
    old, root = fresh("old root"), fresh("root")  # in this order, for the one that ends later comes first
    region = fresh("region", root)
    below_root, below_region = fresh("cluster1", root), fresh("cluster1", region)
    plug(tmp_path / "one", below_root, [below_root], [root])
    plug(tmp_path / "two", below_root, [below_root], [root, old])
    plug(tmp_path / "three", below_region, [root, region, below_region], [root])
    signers = {
        "a self-signed root": "{self_signed: root}",
        "an intermediate": "{cacerts: one}",
        "an intermediate, two roots": "{cacerts: two}",
        "two intermediates": "{cacerts: three}",
    }
    rows = []
    for title, signer in signers.items():
        roots = None if "self_signed" in signer else write_pem([root.certificate])
        async with served(tmp_path, signer=signer, roots=roots) as ca:
            got = await ca.ask(ca.issuer.token())
        assert all(element.startswith("-----BEGIN") and element.endswith("-----\n") for element in got.elements)
        rows.append(f"| {title} | {form(got.elements)} |")
    page = (Path(__file__).parents[2] / "docs" / "ca-server.md").read_text()
    section = page.partition("## The answer")[2].partition("\n## ")[0]
    assert re.findall(r"^\| .* 1: .*$", section, re.MULTILINE) == rows


def form(elements: tuple[str, ...]) -> str:
    """Which certificates each element holds; one without a subject is a leaf."""
    names = [
        ", ".join(f"`{c.subject.rfc4514_string()}`" if c.subject.rdns else "leaf" for c in read_pem(element.encode()))
        for element in elements
    ]
    return "; ".join(f"{number}: {name}" for number, name in enumerate(names, start=1))


async def test_a_new_self_signed_root_joins_the_old_one_while_requests_go_on(tmp_path: Path) -> None:
    clock = Shifted()
    signer = "{self_signed: root, root_lifetime: 10d}"
    async with served(tmp_path, signer=signer, clock=clock, more=UNLIMITED) as ca, ca.connected() as channel:
        token = ca.issuer.token(exp=soon(timedelta(days=20)))
        first = await ask(channel, token)
        clock.ahead = timedelta(days=9)
        with anyio.fail_after(20):
            while len(read_pem((await ask(channel, token)).roots)) < 2:
                await anyio.lowlevel.checkpoint()
        old, new = read_pem((await ask(channel, token)).roots)
        assert read_pem(first.roots)[0] == old
        clock.ahead = timedelta(days=9, hours=1, minutes=1)  # by now every caller has loaded the new one
        with anyio.fail_after(20):
            while not is_signed_by((await ask(channel, token)).leaf, new):
                await anyio.lowlevel.checkpoint()
        assert {line["outcome"] for line in ca.audit} == {"issued"}


def is_signed_by(leaf: x509.Certificate, root: x509.Certificate) -> bool:
    try:
        leaf.verify_directly_issued_by(root)
    except InvalidSignature:
        return False
    return True


async def test_a_root_that_cannot_be_renewed_is_logged_and_renewed_once_it_can(tmp_path: Path) -> None:
    """The CA goes on, and is there when its operator has fixed the disk."""
    clock = Shifted()
    with recorded() as events:
        async with served(tmp_path, signer="{self_signed: root, root_lifetime: 10d}", clock=clock):
            (tmp_path / "root").rename(tmp_path / "away")
            (tmp_path / "root").touch()
            clock.ahead = timedelta(days=20)
            reported = await events.wait("signer_not_renewed")
            assert "cannot store its new root" in reported["cause"]
            (tmp_path / "root").unlink()
            (tmp_path / "away").rename(tmp_path / "root")
            await events.wait("root_created", count=2)


async def test_a_root_that_cannot_be_renewed_is_logged_once_and_not_at_every_check(tmp_path: Path) -> None:
    clock, lifetime = HandClock(), timedelta(days=10)
    ca = await SelfSignedCa.open(
        tmp_path / "root",
        trust_domain="demo.example",
        key_type=KeyType.EC_P256,
        lifetime=lifetime,
        clock=clock,
        setting="state_dir",
    )
    source = await SelfSignedSource.open(ca, clock)
    (tmp_path / "root").rename(tmp_path / "away")
    with recorded() as events:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(source.follow)
            for name, ahead in (("root_not_renewed", lifetime * 0.9), ("signer_not_renewed", lifetime * 0.1)):
                clock.set_wall(ahead)
                for _ in range(4):
                    await clock.asleep()
                    clock.elapse(timedelta(seconds=CHECK_EVERY))
                await clock.asleep()
                assert len(events.named(name)) == 1
            tasks.cancel_scope.cancel()


async def test_everything_that_is_wrong_with_a_signer_names_the_key_the_directory_and_the_file(tmp_path: Path) -> None:
    root = make_ca("root")
    plug(tmp_path, root, [root], [root])
    for name in ("ca-key.pem", "root-cert.pem"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ProblemsError) as caught:
        await PluggedSource.open(tmp_path, trust_domain="demo.example", passphrase_file=None, clock=HandClock())
    assert {problem.where for problem in caught.value.problems} == {
        ("signer.cacerts", str(tmp_path), "ca-key.pem"),
        ("signer.cacerts", str(tmp_path), "root-cert.pem"),
    }
    assert all(line.startswith(f"signer.cacerts: {tmp_path}: ") for line in str(caught.value).splitlines())


async def test_what_is_wrong_with_a_signer_is_logged_once_and_not_at_every_check(tmp_path: Path) -> None:
    root, clock = make_ca("root"), HandClock()
    signer = make_ca("signer", root)
    plug(tmp_path, signer, [signer], [root])
    source = await PluggedSource.open(tmp_path, trust_domain="demo.example", passphrase_file=None, clock=clock)
    (tmp_path / "ca-key.pem").write_bytes(b"")
    with recorded() as events:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(source.follow)
            for _ in range(4):
                await clock.asleep()
                clock.elapse(timedelta(seconds=CHECK_EVERY))
            await clock.asleep()
            tasks.cancel_scope.cancel()
    assert len(events.named("signer_not_taken")) == 1


async def test_another_signer_is_taken_while_requests_go_on(tmp_path: Path) -> None:
    """A CA gets a new intermediate without a restart and without a failed request, in place or by a symlink."""
    root = fresh("root")
    signers = [fresh(f"signer {number}", root) for number in range(4)]
    for number, signer in enumerate(signers):
        plug(tmp_path / f"set{number}", signer, [signer], [root])
    swap(tmp_path / "cacerts", "set0")
    async with (
        served(tmp_path, signer="{cacerts: cacerts}", roots=write_pem([root.certificate]), more=UNLIMITED) as ca,
        ca.connected() as channel,
    ):
        token = ca.issuer.token()
        before = await ask(channel, token)
        for number in (1, 2, 3):
            swap(tmp_path / "cacerts", f"set{number}")
            await until_issued_by(signers[number], channel, token)
        plug(tmp_path / "set3", signers[0], [signers[0]], [root])
        await until_issued_by(signers[0], channel, token)
        after = await ca.ask(identity=before)
        assert after.leaf.issuer == signers[0].certificate.subject
        assert {line["outcome"] for line in ca.audit} == {"issued"}


def swap(link: Path, target: str) -> None:
    """As Kubernetes replaces a volume: a new link is renamed over the old one."""
    fresh_link = link.with_name("new")
    fresh_link.symlink_to(target)
    fresh_link.rename(link)


async def until_issued_by(signer: Ca, channel: grpc.aio.Channel, token: str) -> None:
    with anyio.fail_after(20):
        while (await ask(channel, token)).leaf.issuer != signer.certificate.subject:
            pass


async def test_a_bad_set_is_logged_and_the_old_one_goes_on(tmp_path: Path) -> None:
    root = fresh("root")
    first, second = fresh("first", root), fresh("second", root)
    plug(tmp_path / "cacerts", first, [first], [root])
    with recorded() as events:
        async with served(tmp_path, signer="{cacerts: cacerts}", roots=write_pem([root.certificate])) as ca:
            (tmp_path / "cacerts" / "ca-cert.pem").write_bytes(write_pem([second.certificate]))
            reported = await events.wait("signer_not_taken")
            assert "the key is not that of" in reported["causes"][0]
            assert (await ca.ask(ca.issuer.token())).leaf.issuer == first.certificate.subject


async def test_a_directory_that_cannot_be_read_does_not_end_the_ca(tmp_path: Path) -> None:
    """A directory above it is closed, or a network's disk is gone for a while: the CA that was read goes on."""
    root = fresh("root")
    first = fresh("first", root)
    plug(tmp_path / "good", first, [first], [root])
    swap(tmp_path / "cacerts", "good")
    with recorded() as events:
        async with served(tmp_path, signer="{cacerts: cacerts}", roots=write_pem([root.certificate])) as ca:
            swap(tmp_path / "cacerts", "no-name-is-so-long" * 20)
            reported = await events.wait("signer_not_taken")
            assert "cannot read" in reported["causes"][0]
            await ca.ask(ca.issuer.token())


async def test_secrets_of_the_ca_that_every_user_can_read_are_reported(tmp_path: Path) -> None:
    """A volume of Kubernetes has the mode 0644 unless its `defaultMode` says otherwise."""
    root = fresh("root")
    plug(tmp_path / "cacerts", root, [], [root])
    key = tmp_path / "cacerts" / "ca-key.pem"
    key.chmod(0o644)
    with recorded() as events:
        async with served(tmp_path, signer="{cacerts: cacerts}", roots=write_pem([root.certificate])):
            reported = await events.wait("credential_unusable", level="warning")
    assert reported["cause"] == f"signer.cacerts: every user can read the secret in {key} (chmod o-r {key})"


@pytest.mark.parametrize("name", ["signer.passphrase_file", "callers.jwt[0].token_file"])
async def test_the_passphrase_and_the_tokens_of_the_ca_are_looked_at_too(tmp_path: Path, name: str) -> None:
    root = fresh("root")
    plug(tmp_path / "cacerts", root, [], [root])
    (tmp_path / "cacerts" / "ca-key.pem").chmod(0o600)
    for each in ("passphrase_file", "token_file"):
        (tmp_path / each).write_text("secret\n")
        (tmp_path / each).chmod(0o644 if name.endswith(each) else 0o600)
    signer = "{cacerts: cacerts, passphrase_file: passphrase_file}"
    keys = "'https://127.0.0.1:1/keys', token_file: token_file"
    with recorded() as events:
        async with served(tmp_path, signer=signer, jwks=keys, roots=write_pem([root.certificate])):
            reported = await events.wait("credential_unusable", level="warning")
    assert reported["cause"].startswith(f"{name}: every user can read the secret in {tmp_path}")


async def test_a_group_that_could_become_the_ca_is_reported(tmp_path: Path) -> None:
    """A user who may write to the signer's directory can be the CA."""
    root = fresh("root")
    plug(tmp_path / "cacerts", root, [], [root])
    (tmp_path / "cacerts").chmod(0o770)
    with recorded() as events:
        async with served(tmp_path, signer="{cacerts: cacerts}", roots=write_pem([root.certificate])):
            reported = await events.wait("source_shared", level="warning", setting="signer.cacerts")
    assert f"may write to {tmp_path / 'cacerts'} (chmod g-w" in reported["cause"]
