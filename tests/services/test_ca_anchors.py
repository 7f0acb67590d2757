"""Which certificates of callers are trusted: those below a CA that stands among the roots and is not revoked."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from fakes import der
from fakes.ca_servers import WEB, Identity, ask, fresh, plug, served, soon
from fakes.events import recorded
from fakes.hierarchy import DAY, Ca, Key, make_ca, make_crl, make_leaf

from sds_agent.ca.anchors import Revocations, anchors_of
from sds_agent.ca.refusal import RefusalError
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import KeyType, PrivateKey, generate
from sds_agent.signing.signer import Signer
from sds_agent.signing.signing_set import SigningSet

HOUR = timedelta(hours=1)


def leaf_of(issuer: Ca, key: Key, uri: str = WEB) -> x509.Certificate:
    return make_leaf(issuer, uri, key=key, not_before=soon(-HOUR), not_after=soon(HOUR))


def identity(key: PrivateKey, *chain: x509.Certificate) -> Identity:
    """What a caller shows: the certificates, and nothing that it got from a CA."""
    return Identity(key, (*(write_pem([each]).decode() for each in chain), ""))


def version_1() -> Ca:
    """A root of the kind that has no extensions, and so does not say whether it is a CA's."""
    entity = der.entity("version 1")
    root = der.loaded(der.certificate(entity, extensions=(), version=b""))
    assert root.version is x509.Version.v1
    return Ca(root, entity.key)


def add_root(directory: Path, *more: x509.Certificate) -> None:
    file = directory / "root-cert.pem"
    file.write_bytes(file.read_bytes() + write_pem(more))


def write_crl(directory: Path, issuer: Ca, *revoked: x509.Certificate) -> None:
    crl = make_crl(issuer, *revoked, last_update=soon(-HOUR), next_update=soon(HOUR))
    (directory / "ca-crl.pem").write_bytes(crl.public_bytes(Encoding.PEM))


async def test_only_a_cas_certificate_among_the_roots_vouches_for_callers(tmp_path: Path) -> None:
    """The holder of a pinned server's key could get a certificate for every name in it."""
    root, v1 = fresh("root"), version_1()
    signer, elsewhere = fresh("cluster1", root), fresh("elsewhere")
    pinned_key, key = generate(KeyType.EC_P256), generate(KeyType.EC_P256)
    pinned = leaf_of(elsewhere, pinned_key)
    plug(tmp_path / "cacerts", signer, [signer], [root])
    add_root(tmp_path / "cacerts", v1.certificate, pinned)
    with recorded() as events:
        async with served(tmp_path, signer="{cacerts: cacerts}", roots=write_pem([root.certificate])) as ca:
            (reported,) = events.named("anchors_left_out")
            assert [cause.partition(" is no CA")[0] for cause in reported["causes"]] == ["'CN=version 1'", f"'{WEB}'"]
            assert reported["level"] == "error"
            for caller in (identity(pinned_key, pinned), identity(key, leaf_of(v1, key))):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await ca.ask(identity=caller)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, "the handshake"
            assert ca.audit == []
            await ca.ask(identity=identity(key, leaf_of(signer, key), signer.certificate))


async def test_a_connection_made_while_an_anchor_counted_is_judged_by_the_anchors_of_the_moment(tmp_path: Path) -> None:
    """The root's list takes out an intermediate that stands among the roots too, and on connections that are open."""
    root = fresh("root")
    region, signer = fresh("region", root), fresh("cluster1", root)
    key = generate(KeyType.EC_P256)
    caller = identity(key, leaf_of(region, key), region.certificate)
    plug(tmp_path / "cacerts", signer, [signer], [root, region])
    with recorded() as events:
        async with (
            served(tmp_path, signer="{cacerts: cacerts}", roots=write_pem([root.certificate])) as ca,
            ca.connected(caller) as channel,
        ):
            await ask(channel)
            write_crl(tmp_path / "cacerts", root, region.certificate)
            reported = await events.wait("anchors_left_out")
            assert "'CN=region' is revoked" in reported["causes"][0]
            for attempt in (ask(channel), ca.ask(identity=caller)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await attempt
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert "the CA 'CN=region' above the client's" in ca.audit[-1]["reason"]


def signing(signer: Ca, roots: Sequence[Ca], *crls: x509.CertificateRevocationList) -> SigningSet:
    assert isinstance(signer.key, PrivateKey)
    certificates = tuple(root.certificate for root in roots)
    return SigningSet(Signer(signer.certificate, signer.key), (signer.certificate,), certificates, crls)


def test_a_root_below_a_revoked_one_is_no_anchor_unless_another_way_leads_up() -> None:
    """What a stolen CA issued is what its revocation is for; a CA that was signed anew by another one goes on."""
    root, other = fresh("root"), fresh("other root")
    region = fresh("region", root)
    again = fresh("region", other, key=region.key)
    zone, signer = fresh("zone", region), fresh("cluster1", root)
    lists = (make_crl(root, region.certificate),)
    assert anchors_of(signing(signer, [root, region, zone])).left_out == ()
    below = anchors_of(signing(signer, [root, region, zone], *lists))
    assert below.usable == (root.certificate,)
    assert "'CN=zone' is below 'CN=region', which is revoked" in below.left_out[1]
    fixed = anchors_of(signing(signer, [root, region, again, zone], *lists))
    assert fixed.usable == (root.certificate, again.certificate, zone.certificate)


def test_what_was_verified_counts_as_long_as_its_anchor_does() -> None:
    """A root that was renewed with its key vouches for what the old one signed; a leaf alone vouches for nothing."""
    old, now = fresh("root"), datetime.now(UTC)
    new, namesake = fresh("root", key=old.key), fresh("root")
    signer = fresh("cluster1", old)
    leaf = leaf_of(signer, generate(KeyType.EC_P256))
    shown = (leaf, signer.certificate, old.certificate)
    assert anchors_of(signing(signer, [namesake, old])).path(shown, now) == shown
    assert anchors_of(signing(signer, [new])).path(shown, now) == (leaf, signer.certificate, new.certificate)
    for roots, seen in (
        ([fresh("elsewhere")], shown),
        ([Ca(leaf, old.key)], (leaf,)),
        ([signer], (signer.certificate,)),
    ):
        with pytest.raises(RefusalError, match="no longer trusted"):
            anchors_of(signing(signer, roots)).path(seen, now)


def test_a_caller_below_one_of_two_roots_of_one_name_is_taken_though_an_envoy_may_choose_the_other() -> None:
    roots = [make_ca("root", identified=False, not_before=soon(-DAY), not_after=soon(DAY)) for _ in range(2)]
    for root in roots:
        signer = fresh("cluster1", root)
        leaf = leaf_of(signer, generate(KeyType.EC_P256))
        path = anchors_of(signing(signer, roots)).path((leaf, signer.certificate), datetime.now(UTC))
        assert path == (leaf, signer.certificate, root.certificate)


def test_of_many_lists_the_certificate_that_is_revoked_is_found_and_no_namesake() -> None:
    """A serial number means something only together with its issuer, and other CAs may list the same one."""
    root = fresh("root")
    signer, other = fresh("cluster1", root), fresh("cluster2", root)
    leaf, good = (leaf_of(signer, generate(KeyType.EC_P256)) for _ in range(2))
    path, beside = (leaf, signer.certificate, root.certificate), (good, signer.certificate, root.certificate)
    many = make_crl(signer, *range(10**6, 10**6 + 5000), leaf)
    one, both, foreign = (
        Revocations(lists)
        for lists in (
            (make_crl(root), many),
            (make_crl(root, signer.certificate), many),
            (make_crl(other, leaf), make_crl(root, leaf)),
        )
    )
    for _ in range(2):  # what was asked before is remembered
        assert one.first_of(path) == leaf
        assert one.first_of(beside) is None
        assert both.first_of(beside) == signer.certificate
        assert foreign.first_of(path) is None
