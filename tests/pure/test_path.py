"""The walk from a leaf to a trust anchor: what it must take and what not, rule by rule of RFC 5280 section 6.1."""

import itertools
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from fakes import der
from fakes.chains import Case, below
from fakes.hierarchy import (
    DAY,
    HOUR,
    NOW,
    SERVER_AND_CLIENT,
    UNKNOWN,
    URI,
    Ca,
    Digest,
    Key,
    common_name,
    key_usage,
    make_ca,
    make_leaf,
    new_key,
    uris,
)
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.pki.certificates import read_pem
from sds_agent.pki.validation.path import MOST_INTERMEDIATES, PathError, find_path

SECOND = timedelta(seconds=1)
SERVER_ONLY = (ExtendedKeyUsageOID.SERVER_AUTH,)
CLIENT_ONLY = (ExtendedKeyUsageOID.CLIENT_AUTH,)
ANY_USAGE = (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)
POLICY = x509.CertificatePolicies([x509.PolicyInformation(x509.ObjectIdentifier("1.2.3.4"), None)])
AUTHORITY_KEY_IDENTIFIER = x509.AuthorityKeyIdentifier(None, None, None)
REVOCATION_LIST = x509.CRLDistributionPoints(
    [x509.DistributionPoint([x509.UniformResourceIdentifier("http://crl.example/")], None, None, None)]
)


def under_root(root: Ca) -> Case:
    return below(root)


def under_root_of(key: Key, digest: Digest) -> Case:
    root = make_ca("Root", key=key, digest=digest)
    return below(root, leaf=make_leaf(root, digest=digest))


def under_intermediate(shape: Callable[[Ca], Ca], leaf: Callable[[Ca], x509.Certificate] = make_leaf) -> Case:
    root = make_ca("Root")
    intermediate = shape(root)
    return below(root, intermediate, leaf=leaf(intermediate))


def email_in_utf8(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.EMAIL_ADDRESS, text, _ASN1Type.UTF8String)])


def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


# --- what must be found ---


def test_a_leaf_straight_under_its_anchor_needs_no_intermediate() -> None:
    case = below(make_ca("Root"))
    assert case.find() == (case.leaf,)


def test_intermediates_come_in_issuing_order_without_the_anchor() -> None:
    root = make_ca("Root")
    upper = make_ca("Upper", root)
    lower = make_ca("Lower", upper)
    leaf = make_leaf(lower)
    sent = (upper.certificate, root.certificate, leaf, lower.certificate, upper.certificate)
    assert find_path(leaf, sent, [root.certificate], NOW) == (leaf, lower.certificate, upper.certificate)


def test_a_pinned_intermediate_ends_the_chain() -> None:
    """An operator who trusts one intermediate, and not its root, still gets certificates."""
    root = make_ca("Root")
    pinned = make_ca("Pinned", root)
    lower = make_ca("Lower", pinned)
    leaf = make_leaf(lower)
    sent = (lower.certificate, pinned.certificate, root.certificate)
    assert find_path(leaf, sent, [pinned.certificate], NOW) == (leaf, lower.certificate)


def test_the_shortest_chain_wins_where_several_lead_to_anchors() -> None:
    old, new = make_ca("Old"), make_ca("New")
    cross = make_ca("New", old, key=new.key)
    leaf = make_leaf(new)
    sent = (cross.certificate, old.certificate)
    assert find_path(leaf, sent, [old.certificate, new.certificate], NOW) == (leaf,)
    assert find_path(leaf, sent, [old.certificate], NOW) == (leaf, cross.certificate)


def test_an_expired_twin_of_an_intermediate_does_not_stop_the_walk() -> None:
    """After a CA renews its intermediate under the same key, both may be sent; the valid one is served."""
    root = make_ca("Root")
    key = new_key()
    expired = make_ca("Issuing", root, key=key, not_after=NOW - SECOND)
    valid = make_ca("Issuing", root, key=key)
    case = below(root, expired, valid)
    assert case.find() == (case.leaf, valid.certificate)


def test_of_two_twins_the_one_that_is_valid_longer_is_served() -> None:
    """A CA sends both while its intermediate is renewed; with the other one every leaf would end too early."""
    root, key = make_ca("Root"), new_key()
    old = make_ca("CA", root, key=key, not_after=NOW + HOUR)
    new = make_ca("CA", root, key=key)
    leaf = make_leaf(new)
    for candidates in itertools.permutations((old.certificate, new.certificate)):
        assert find_path(leaf, candidates, [root.certificate], NOW) == (leaf, new.certificate)


def test_of_two_roots_with_one_name_the_one_that_signed_is_taken() -> None:
    """After a root is renewed with a new key under the same name, leaves of both are accepted."""
    old, new = make_ca("Root"), make_ca("Root")
    anchors = (old.certificate, new.certificate)
    for signer in (old, new):
        leaf = make_leaf(signer)
        assert find_path(leaf, (), anchors, NOW) == (leaf,)


def test_a_circle_of_cross_signed_cas_is_left() -> None:
    first, second = make_ca("First"), make_ca("Second")
    first_by_second = make_ca("First", second, key=first.key)
    second_by_first = make_ca("Second", first, key=second.key)
    leaf = make_leaf(first)
    circle = (first_by_second.certificate, second_by_first.certificate)
    with pytest.raises(PathError, match="'CN=Second' was issued by 'CN=First', which is already below it"):
        find_path(leaf, circle, [make_ca("Other").certificate], NOW)
    assert find_path(leaf, circle, [second.certificate], NOW) == (leaf, first_by_second.certificate)


def test_a_new_root_key_certified_by_the_old_one_is_followed() -> None:
    """Key rollover (RFC 4210 section 4.4): a peer with the old root alone reaches it by a self-issued certificate."""
    old = make_ca("Root", path_length=0)
    rolled = make_ca("Root", old)
    leaf = make_leaf(rolled)
    assert find_path(leaf, [rolled.certificate], [old.certificate], NOW) == (leaf, rolled.certificate)


GOOD: dict[str, Callable[[], Case]] = {
    "BasicConstraints not critical, as easy-rsa makes them": lambda: under_intermediate(
        lambda root: make_ca("CA", root, is_ca_critical=False)
    ),
    "a CA without KeyUsage": lambda: under_intermediate(lambda root: make_ca("CA", root, usage=None)),
    "a CA that signs no revocation lists": lambda: under_intermediate(
        lambda root: make_ca("CA", root, usage=key_usage(cert_sign=True, crl_sign=False))
    ),
    "a CA with both usages": lambda: under_intermediate(lambda root: make_ca("CA", root, usages=SERVER_AND_CLIENT)),
    "signatures with SHA-224": lambda: under_intermediate(lambda root: make_ca("CA", root, digest=hashes.SHA224())),
    "a critical extension on policies": lambda: under_intermediate(
        lambda root: make_ca("CA", root, extra=[(POLICY, True), (x509.InhibitAnyPolicy(0), True)])
    ),
    "an anchor's critical extension on revocation lists": lambda: under_root(
        make_ca("Root", extra=[(REVOCATION_LIST, True)])
    ),
    "an unknown extension that is not critical": lambda: under_intermediate(
        lambda root: make_ca("CA", root, extra=[(UNKNOWN, False)])
    ),
    "path length 0 above the leaf": lambda: under_intermediate(lambda root: make_ca("CA", root, path_length=0)),
    "path length 1 above one CA": lambda: below(root := make_ca("Root", path_length=1), make_ca("CA", root)),
    "RSA 2048 throughout": lambda: under_intermediate(
        lambda root: make_ca("CA", root, key=rsa_key()), lambda ca: make_leaf(ca, key=rsa_key())
    ),
    **{
        f"{kind} signatures with {digest.name}": partial(under_root_of, key, digest)
        for kind, key in (("RSA", rsa_key()), ("ECDSA", new_key()))
        for digest in (hashes.SHA224(), hashes.SHA256(), hashes.SHA384(), hashes.SHA512())
    },
    "P-384 with SHA-384": lambda: under_root(make_ca("Root", key=ec.generate_private_key(ec.SECP384R1()))),
    "P-521": lambda: under_root(make_ca("Root", key=ec.generate_private_key(ec.SECP521R1()))),
    "P-224": lambda: under_root(make_ca("Root", key=ec.generate_private_key(ec.SECP224R1()))),
    "an Ed25519 root": lambda: under_root(make_ca("Root", key=ed25519.Ed25519PrivateKey.generate())),
    "the permitted URI is the trust domain": lambda: under_root(
        make_ca("Root", constraints=uris(permitted=["demo.example"]))
    ),
    "one of several permitted URIs is": lambda: under_root(
        make_ca("Root", constraints=uris(permitted=["a.example", "demo.example"]))
    ),
    "another trust domain is excluded": lambda: under_root(
        make_ca("Root", constraints=uris(excluded=["other.example", ".demo.example"]))
    ),
    "constraints of forms that the leaf has no name of": lambda: under_root(
        make_ca(
            "Root",
            constraints=x509.NameConstraints(
                [x509.DNSName("x.example"), x509.RFC822Name("x.example")], [x509.DirectoryName(common_name("x"))]
            ),
        )
    ),
    "certificates without key identifiers": lambda: under_intermediate(
        lambda root: make_ca("CA", root, identified=False)
    ),
}


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD.keys())
def test_a_good_chain_is_taken_and_openssl_agrees(make: Callable[[], Case], tmp_path: Path) -> None:
    case = make()
    assert case.find() == (case.leaf, *case.candidates)
    assert case.openssl_verifies(tmp_path)


# --- what must be refused ---

BAD: dict[str, tuple[Callable[[], Case], str]] = {
    "the leaf has expired": (
        lambda: below(root := make_ca("Root"), leaf=make_leaf(root, not_after=NOW - SECOND)),
        f"'{URI}' expired on 2026-03-14 15:09:25 UTC, and it is 2026-03-14 15:09:26 UTC",
    ),
    "the leaf is not valid yet": (
        lambda: below(root := make_ca("Root"), leaf=make_leaf(root, not_before=NOW + SECOND)),
        "is valid only from 2026-03-14 15:09:27 UTC, and it is 2026-03-14 15:09:26 UTC by this machine's clock",
    ),
    "the intermediate has expired": (
        lambda: under_intermediate(lambda root: make_ca("CA", root, not_after=NOW - SECOND)),
        "'CN=CA' expired on 2026-03-14 15:09:25 UTC",
    ),
    "the intermediate is not valid yet": (
        lambda: under_intermediate(lambda root: make_ca("CA", root, not_before=NOW + SECOND)),
        "'CN=CA' is valid only from 2026-03-14 15:09:27 UTC",
    ),
    "the anchor has expired": (
        lambda: under_root(make_ca("Root", not_after=NOW - SECOND)),
        "'CN=Root' expired on 2026-03-14 15:09:25 UTC",
    ),
    "the anchor is not valid yet": (
        lambda: under_root(make_ca("Root", not_before=NOW + SECOND)),
        "'CN=Root' is valid only from",
    ),
    "the intermediate says CA:FALSE": (
        lambda: under_intermediate(lambda root: make_ca("CA", root, is_ca=False)),
        "'CN=CA' is no CA",
    ),
    "the intermediate has no BasicConstraints": (
        lambda: under_intermediate(lambda root: make_ca("CA", root, is_ca=None, usage=None)),
        "'CN=CA' is no CA",
    ),
    "the anchor says CA:FALSE": (lambda: under_root(make_ca("Root", is_ca=False)), "'CN=Root' is no CA"),
    "the intermediate may not sign certificates": (
        lambda: under_intermediate(lambda root: make_ca("CA", root, usage=key_usage(cert_sign=False))),
        "'CN=CA' may not sign certificates: its KeyUsage lacks keyCertSign",
    ),
    "the anchor may not sign certificates": (
        lambda: under_root(make_ca("Root", usage=key_usage(cert_sign=False))),
        "'CN=Root' may not sign certificates",
    ),
    "path length 0 above a CA": (
        lambda: below(root := make_ca("Root", path_length=0), make_ca("CA", root)),
        "'CN=Root' allows at most 0 CAs below it (pathLenConstraint), and there are 1",
    ),
    "path length 0 of an intermediate above a CA": (
        lambda: below(root := make_ca("Root"), upper := make_ca("Upper", root, path_length=0), make_ca("CA", upper)),
        "'CN=Upper' allows at most 0 CAs below it (pathLenConstraint), and there are 1",
    ),
    "the intermediate allows servers only": (
        lambda: under_intermediate(lambda root: make_ca("CA", root, usages=SERVER_ONLY)),
        "the ExtendedKeyUsage of 'CN=CA' does not list serverAuth and clientAuth",
    ),
    "the intermediate allows servers and clients only by anyExtendedKeyUsage": (
        lambda: under_intermediate(lambda root: make_ca("CA", root, usages=ANY_USAGE)),
        "the ExtendedKeyUsage of 'CN=CA' does not list serverAuth and clientAuth",
    ),
    "the intermediate's key identifier is critical": (
        lambda: under_intermediate(
            lambda root: make_ca("CA", root, identified=False, extra=[(x509.SubjectKeyIdentifier(b"id"), True)])
        ),
        "'CN=CA' has the critical extension 2.5.29.14",
    ),
    "the intermediate's issuer is identified in a critical extension": (
        lambda: under_intermediate(
            lambda root: make_ca("CA", root, identified=False, extra=[(AUTHORITY_KEY_IDENTIFIER, True)])
        ),
        "'CN=CA' has the critical extension 2.5.29.35",
    ),
    "the leaf has an unknown critical extension": (
        lambda: below(root := make_ca("Root"), leaf=make_leaf(root, extra=[(UNKNOWN, True)])),
        "has the critical extension 1.2.3.4.5",
    ),
    "the intermediate has an unknown critical extension": (
        lambda: under_intermediate(lambda root: make_ca("CA", root, extra=[(UNKNOWN, True)])),
        "'CN=CA' has the critical extension 1.2.3.4.5",
    ),
    "the anchor has an unknown critical extension": (
        lambda: under_root(make_ca("Root", extra=[(UNKNOWN, True)])),
        "'CN=Root' has the critical extension 1.2.3.4.5",
    ),
    "another trust domain is permitted": (
        lambda: under_root(make_ca("Root", constraints=uris(permitted=["other.example"]))),
        f"the name constraints of 'CN=Root' permit 'other.example', but not '{URI}'",
    ),
    "the intermediate's constraints permit another trust domain": (
        lambda: under_intermediate(lambda root: make_ca("CA", root, constraints=uris(permitted=["other.example"]))),
        "the name constraints of 'CN=CA' permit 'other.example'",
    ),
    "the constraints of two CAs have nothing in common": (
        lambda: below(
            root := make_ca("Root", constraints=uris(permitted=["other.example"])),
            make_ca("CA", root, constraints=uris(permitted=["demo.example"])),
        ),
        "the name constraints of 'CN=Root' permit 'other.example'",
    ),
    "the trust domain is excluded": (
        lambda: under_root(make_ca("Root", constraints=uris(permitted=["demo.example"], excluded=["demo.example"]))),
        f"the name constraints of 'CN=Root' exclude 'demo.example', and so '{URI}'",
    ),
    "an intermediate's subject is outside the permitted directory names": (
        lambda: below(
            root := make_ca("Root", constraints=x509.NameConstraints([x509.DirectoryName(common_name("x"))], None)),
            make_ca("CA", root),
        ),
        "the name constraints of 'CN=Root' permit 'CN=x', but not 'CN=CA'",
    ),
}


@pytest.mark.parametrize(("make", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_chain_is_refused_with_its_reason_and_openssl_agrees(
    make: Callable[[], Case], reason: str, tmp_path: Path
) -> None:
    case = make()
    with pytest.raises(PathError) as refused:
        case.find()
    assert reason in str(refused.value)
    assert not case.openssl_verifies(tmp_path)


STRICTER: dict[str, tuple[Callable[[], Case], str]] = {
    "an RSA 1024 root": (
        lambda: under_root(make_ca("Root", key=rsa_key(1024))),
        "'CN=Root' has an RSA key of 1024 bits; it needs one of 2048 bits or more",
    ),
    "an RSA 1024 intermediate": (
        lambda: under_intermediate(lambda root: make_ca("CA", root, key=rsa_key(1024))),
        "'CN=CA' has an RSA key of 1024 bits",
    ),
    "an RSA 1024 leaf": (
        lambda: under_intermediate(lambda root: make_ca("CA", root), lambda ca: make_leaf(ca, key=rsa_key(1024))),
        "has an RSA key of 1024 bits",
    ),
    "a P-192 root": (
        lambda: under_root(make_ca("Root", key=ec.generate_private_key(ec.SECP192R1()))),
        "'CN=Root' has a key on the curve secp192r1; it needs one on P-256, P-384 or P-521",
    ),
    "a root on a curve that no Envoy takes": (
        lambda: under_root(make_ca("Root", key=ec.generate_private_key(ec.BrainpoolP256R1()))),
        "'CN=Root' has a key on the curve brainpoolP256r1; it needs",
    ),
    "a leaf signed with SHA3-256, which no Envoy can check": (
        lambda: below(root := make_ca("Root"), leaf=make_leaf(root, digest=hashes.SHA3_256())),
        "is signed with SHA3-256: its CA must sign by RSA or ECDSA, with SHA-256 or its like",
    ),
    "an intermediate signed with SHA3-256": (
        lambda: under_intermediate(lambda root: make_ca("CA", root, digest=hashes.SHA3_256())),
        "'CN=CA' is signed with SHA3-256",
    ),
    "an Ed448 root, whose signatures no Envoy can check": (
        lambda: under_root(make_ca("Root", key=ed448.Ed448PrivateKey.generate())),
        "is signed by the algorithm 1.3.101.113: its CA must sign by RSA or ECDSA",
    ),
    "a critical extension on revocation lists, which no Envoy takes": (
        lambda: under_intermediate(lambda root: make_ca("CA", root, extra=[(REVOCATION_LIST, True)])),
        "'CN=CA' has the critical extension 2.5.29.31",
    ),
    "a permitted URI with a scheme": (
        lambda: under_root(make_ca("Root", constraints=uris(permitted=["spiffe://demo.example"]))),
        "hold the URI 'spiffe://demo.example', which must be a DNS name such as 'demo.example'",
    ),
    "an excluded URI that can never match": (
        lambda: under_root(make_ca("Root", constraints=uris(excluded=["spiffe://demo.example/"]))),
        "hold the URI 'spiffe://demo.example/', which must be a DNS name",
    ),
    "a trust domain that is an IP address under URI constraints": (
        lambda: below(
            root := make_ca("Root", constraints=uris(excluded=["x.example"])),
            leaf=make_leaf(root, "spiffe://10.1.2.3/web"),
        ),
        "must then be a DNS name, and that of 'spiffe://10.1.2.3/web' is none",
    ),
    "a URI without a host under URI constraints": (
        lambda: below(
            root := make_ca("Root", constraints=uris(excluded=["x.example"])), leaf=make_leaf(root, "urn:demo:web")
        ),
        "must then be a DNS name, and that of 'urn:demo:web' is none",
    ),
    "a name of a form that cannot be judged": (
        lambda: below(
            root := make_ca("Root", constraints=x509.NameConstraints([x509.IPAddress(ip_network("10.0.0.0/8"))], None)),
            leaf=make_leaf(root, names=[x509.IPAddress(ip_address("10.0.0.1"))]),
        ),
        "restrict names of the form IPAddress, and cannot be judged for '10.0.0.1'",
    ),
    "an e-mail address in a subject that is no IA5String": (
        lambda: below(
            root := make_ca("Root", constraints=x509.NameConstraints([x509.RFC822Name("x.example")], None)),
            leaf=make_leaf(root, subject=email_in_utf8("web@x.example")),
        ),
        "restrict e-mail addresses, and 'one' is none in plain ASCII",
    ),
    "a wildcard under excluded DNS names": (
        lambda: below(
            root := make_ca("Root", constraints=x509.NameConstraints(None, [x509.DNSName("a.demo.example")])),
            leaf=make_leaf(root, names=[x509.DNSName("*.demo.example")]),
        ),
        "exclude 'a.demo.example', and so '*.demo.example'",
    ),
}


@pytest.mark.parametrize(("make", "reason"), STRICTER.values(), ids=STRICTER.keys())
def test_the_agent_refuses_chains_that_openssl_accepts(make: Callable[[], Case], reason: str) -> None:
    """Nothing weak, nothing that an Envoy refuses, and no constraint whose meaning cannot be relied on."""
    with pytest.raises(PathError) as refused:
        make().find()
    assert reason in str(refused.value)


def test_a_signature_of_an_unknown_kind_is_refused_not_raised() -> None:
    """Tomorrow's algorithms, or nonsense: the CA's answer is refused in words, and the agent goes on."""
    root = make_ca("Root")
    ecdsa_with_sha256 = bytes.fromhex("2a8648ce3d040302")
    der = make_leaf(root).public_bytes(Encoding.DER).replace(ecdsa_with_sha256, ecdsa_with_sha256[:-1] + b"\x7f")
    with pytest.raises(
        PathError, match=r"is signed by the algorithm 1\.2\.840\.10045\.4\.3\.127: its CA must sign by RSA or ECDSA"
    ):
        find_path(x509.load_der_x509_certificate(der), (), [root.certificate], NOW)


def test_a_key_in_a_form_that_envoy_does_not_read_vouches_for_nothing() -> None:
    """cryptography takes it for the plain key, by which the signature is right."""
    key = rsa_key()
    assert isinstance(key, rsa.RSAPrivateKey)
    root, ca, leaf = der.entity("Root"), der.entity("CA", key), der.entity("leaf")
    numbers = key.public_key().public_numbers()
    modulus = der.sequence(der.integer(numbers.n), der.integer(numbers.e))
    for_pss = der.sequence(der.sequence(der.oid("1.2.840.113549.1.1.10")), der.bits(modulus))
    earlier = der.utc_time("480101000000Z")
    plain, odd = der.certificate(ca, root), der.certificate(ca, root, spki=for_pss, not_after=earlier)
    below = der.certificate(leaf, ca)
    read = read_pem(b"".join(map(der.pem, (below, plain, odd, der.certificate(root)))))
    assert find_path(read[0], [read[1]], [read[3]], NOW) == (read[0], read[1])
    reason = "'CN=CA' has its key in a form that Envoy does not read, such as that of an RSA-PSS key: it must be issued"
    with pytest.raises(PathError, match=reason):
        find_path(read[0], [read[2]], [read[3]], NOW)
    with pytest.raises(PathError, match=reason):
        find_path(read[0], (), [read[2]], NOW)
    with pytest.raises(PathError, match=f"Envoy may choose the trust anchor .*{reason}"):
        find_path(read[0], (), [read[1], read[2]], NOW)


def test_a_weak_root_above_a_good_chain_is_borne() -> None:
    """As one that has certified the next, and stays trusted for a while: Envoy may go on to it, and takes its key."""
    old = make_ca("Old", key=rsa_key(1024))
    new = make_ca("New")
    cross = make_ca("New", old, key=new.key)
    leaf = make_leaf(new)
    for anchors in ([new, cross, old], [cross, new, old], [cross, old]):
        assert find_path(leaf, (), [each.certificate for each in anchors], NOW) == (leaf,)
    with pytest.raises(PathError, match="'CN=Old' has an RSA key of 1024 bits"):
        find_path(leaf, [cross.certificate], [old.certificate], NOW)


SHA224, SHA256, SHA384, SHA512 = hashes.SHA224(), hashes.SHA256(), hashes.SHA384(), hashes.SHA512()


def signed_by_pss(digest: Digest, mask: Digest, salt: int) -> Case:
    root = make_ca("Root", key=rsa_key())
    assert isinstance(root.key, rsa.RSAPrivateKey)
    builder = x509.CertificateBuilder(root.certificate.subject, common_name("leaf"), new_key().public_key(), 7)
    builder = builder.not_valid_before(NOW - HOUR).not_valid_after(NOW + HOUR)
    leaf = builder.sign(root.key, digest, rsa_padding=padding.PSS(padding.MGF1(mask), salt))
    return Case(leaf, (), (root.certificate,))


@pytest.mark.parametrize(("digest", "salt"), [(SHA256, 32), (SHA384, 48), (SHA512, 64)])
def test_rsa_pss_signatures_are_taken_as_tls_has_them(digest: Digest, salt: int) -> None:
    case = signed_by_pss(digest, digest, salt)
    assert case.find() == (case.leaf,)


@pytest.mark.parametrize(
    ("digest", "mask", "salt"),
    [(SHA256, SHA256, 222), (SHA256, SHA256, 20), (SHA256, SHA384, 32), (SHA384, SHA256, 48), (SHA224, SHA224, 28)],
)
def test_other_forms_of_rsa_pss_are_refused_as_envoy_does(
    digest: Digest, mask: Digest, salt: int, tmp_path: Path
) -> None:
    """Envoy 1.40 ended the handshake with each; openssl makes the first of them by default, and accepts all."""
    case = signed_by_pss(digest, mask, salt)
    assert case.openssl_verifies(tmp_path)
    with pytest.raises(PathError, match="a salt as long as the hash"):
        case.find()


ROOT_KEY = new_key()
KEY_IDENTIFIER = x509.SubjectKeyIdentifier.from_public_key(ROOT_KEY.public_key()).digest
ROOT_NAME, OTHER_NAME = ([x509.DirectoryName(common_name(name))] for name in ("Root", "Other"))


@pytest.mark.parametrize(
    ("key_identifier", "issuer", "serial", "words"),
    [
        (KEY_IDENTIFIER, None, None, ""),
        (KEY_IDENTIFIER, ROOT_NAME, 0, ""),
        (None, ROOT_NAME, 0, ""),
        (b"other", None, None, "by the key identifier 6f74686572, and this one has"),
        (KEY_IDENTIFIER, ROOT_NAME, 1, "by the serial number"),
        (None, OTHER_NAME, 0, "one issued by 'CN=Other', and this one was issued by 'CN=Root'"),
    ],
    ids=["key", "all three", "issuer and serial number", "another key", "another serial number", "another issuer"],
)
@pytest.mark.parametrize("identified", [True, False])
def test_an_issuer_is_the_certificate_that_is_asked_for(
    key_identifier: bytes | None,
    issuer: list[x509.GeneralName] | None,
    serial: int | None,
    words: str,
    tmp_path: Path,
    *,
    identified: bool,
) -> None:
    """A root that was renewed with its old key has another serial number, and Envoy refuses what asks for the old."""
    root = make_ca("Root", key=ROOT_KEY, identified=identified)
    number = None if serial is None else root.certificate.serial_number + serial
    asks = x509.AuthorityKeyIdentifier(key_identifier, issuer, number)
    signer = make_ca("CA", root, identified=False, extra=[(asks, False)])
    case = below(root, signer)
    fault = words if identified or "key identifier" not in words else ""
    assert case.openssl_verifies(tmp_path) is not bool(fault)
    if fault:
        with pytest.raises(PathError, match=f"AuthorityKeyIdentifier of 'CN=CA' asks for another .*{fault}"):
            case.find()
    else:
        assert case.find() == (case.leaf, signer.certificate)


def test_a_certificate_signed_by_another_key_under_the_same_name_is_refused() -> None:
    """The name of a CA proves nothing; its signature does."""
    leaf = make_leaf(make_ca("Root"))
    with pytest.raises(PathError, match="was not signed with the key of 'CN=Root'"):
        find_path(leaf, (), [make_ca("Root").certificate], NOW)


def test_a_self_signed_root_that_is_no_anchor_gives_no_trust() -> None:
    root = make_ca("Stranger")
    case = below(root, make_ca("CA", root))
    with pytest.raises(PathError, match="'CN=Stranger' is self-signed and is not one of the trust anchors"):
        find_path(case.leaf, (*case.candidates, root.certificate), [make_ca("Root").certificate], NOW)


def test_a_self_signed_leaf_does_not_vouch_for_itself_even_as_an_anchor() -> None:
    alone = make_ca("Alone")
    with pytest.raises(PathError, match="'CN=Alone' is self-signed"):
        find_path(alone.certificate, (), [alone.certificate], NOW)


def test_a_missing_intermediate_is_named() -> None:
    root = make_ca("Root")
    leaf = make_leaf(make_ca("Issuing", root))
    with pytest.raises(PathError, match=f"'{URI}' was issued by 'CN=Issuing', which is neither among the certificates"):
        find_path(leaf, (), [root.certificate], NOW)


def test_without_any_anchor_nothing_is_trusted() -> None:
    case = below(make_ca("Root"))
    with pytest.raises(PathError, match="there is no trust anchor"):
        find_path(case.leaf, case.anchors, (), NOW)


def test_an_intermediate_has_to_allow_what_the_leaf_is_used_for_and_no_more() -> None:
    """A leaf for clients alone may come from a CA for clients alone; one that says nothing is used for both."""
    root = make_ca("Root")
    clients = make_ca("CA", root, usages=CLIENT_ONLY)
    for_clients, for_any = make_leaf(clients, usages=CLIENT_ONLY), make_leaf(clients, usages=())
    assert below(root, clients, leaf=for_clients).find() == (for_clients, clients.certificate)
    with pytest.raises(PathError, match="the ExtendedKeyUsage of 'CN=CA' does not list serverAuth and clientAuth"):
        below(root, clients, leaf=for_any).find()


def test_the_usages_of_an_anchor_are_ignored() -> None:
    """Envoy does not look at them either, so a chain is not refused here that would work there."""
    case = below(make_ca("Root", usages=SERVER_ONLY))
    assert case.find() == (case.leaf,)


def test_the_reason_is_the_fault_of_the_ca_that_signed_and_not_of_its_namesakes() -> None:
    """The operator learns of the expired intermediate, whatever else came along."""
    root, stranger = make_ca("Root"), make_ca("Stranger")
    expired = make_ca("CA", root, not_after=NOW - SECOND)
    others = (make_ca("CA", root), make_ca("CA", stranger), make_ca("CA", stranger, key=expired.key), stranger)
    sent = [other.certificate for other in (*others, expired)]
    with pytest.raises(PathError, match="'CN=CA' expired on"):
        find_path(make_leaf(expired), sent, [root.certificate], NOW)


def test_a_signature_by_a_key_that_cannot_sign_so_is_refused_not_raised() -> None:
    """A candidate whose key is of another kind than the signature must not end the search with a foreign exception."""
    root = make_ca("Root")
    other = make_ca("Root", key=ed25519.Ed25519PrivateKey.generate())
    leaf = make_leaf(root)
    assert find_path(leaf, [other.certificate], [other.certificate, root.certificate], NOW) == (leaf,)
    with pytest.raises(PathError):
        find_path(leaf, (), [other.certificate], NOW)


# --- times ---


def test_a_validity_ends_with_the_beginning_of_its_last_second_as_for_envoy() -> None:
    root = make_ca("Root")
    leaf = make_leaf(root, not_before=NOW, not_after=NOW + SECOND)
    assert find_path(leaf, (), [root.certificate], NOW) == (leaf,)
    with pytest.raises(PathError, match="expired"):
        find_path(leaf, (), [root.certificate], NOW + SECOND)


def test_skew_stretches_not_before_alone() -> None:
    """A CA whose clock is a little ahead can still issue; nothing expired gets more time."""
    root = make_ca("Root", not_before=NOW + SECOND)
    ca = make_ca("CA", root, not_before=NOW + SECOND)
    case = below(root, ca, leaf=make_leaf(ca, not_before=NOW + SECOND))
    assert len(case.find(skew=SECOND)) == 2
    with pytest.raises(PathError):
        case.find(skew=SECOND / 2)
    with pytest.raises(PathError, match="expired"):
        below(make_ca("Root", not_after=NOW - SECOND)).find(skew=DAY)


# --- bounds ---


def deep(intermediates: int) -> Case:
    cas = list(
        itertools.accumulate(range(intermediates), lambda ca, n: make_ca(f"CA {n}", ca), initial=make_ca("Root"))
    )
    return below(*cas)


def test_a_chain_may_have_eight_intermediates_and_no_more() -> None:
    assert len(deep(MOST_INTERMEDIATES).find()) == 1 + MOST_INTERMEDIATES
    with pytest.raises(PathError, match="the chain has more than 8 intermediates"):
        deep(MOST_INTERMEDIATES + 1).find()


def test_a_tangle_of_cas_with_one_name_is_given_up_soon() -> None:
    """A hostile bundle in which every CA could have issued every other does not keep the agent from its work."""
    stranger = make_ca("Stranger")
    same = [make_ca("Same", stranger, identified=False) for _ in range(12)]
    crossed = [make_ca("Same", by, key=ca.key, identified=False).certificate for ca in same for by in same if by != ca]
    with pytest.raises(PathError, match="too many of the certificates have the same name"):
        find_path(make_leaf(same[0]), crossed, [make_ca("Root").certificate], NOW)


def test_among_hundreds_of_namesakes_the_key_identifier_finds_the_right_one() -> None:
    root = make_ca("Root")
    right = make_ca("Same", root, not_after=NOW + HOUR)
    namesakes = [make_ca("Same", root).certificate for _ in range(300)]
    leaf = make_leaf(right)
    assert find_path(leaf, [*namesakes, right.certificate], [root.certificate], NOW) == (leaf, right.certificate)


# --- any order ---


def tangle() -> tuple[x509.Certificate, list[x509.Certificate], list[x509.Certificate]]:
    """A leaf with two equally long ways to two anchors, and much beside them."""
    first, second, stranger = make_ca("First"), make_ca("Second"), make_ca("Stranger")
    key = new_key()
    upper = [make_ca("Upper", root, key=key) for root in (first, second, stranger)]
    lower = [make_ca("Lower", upper[0]), make_ca("Lower", upper[0], not_after=NOW - SECOND)]
    leaf = make_leaf(lower[0])
    junk = [make_ca("Lower", stranger), make_ca("Upper", stranger), stranger, make_ca("First"), first]
    candidates = [ca.certificate for ca in (*upper, *lower, *junk)]
    return leaf, [*candidates, leaf, make_leaf(stranger), upper[0].certificate], [first.certificate, second.certificate]


LEAF, CANDIDATES, ANCHORS = tangle()
EXPECTED = find_path(LEAF, CANDIDATES, ANCHORS, NOW)


@given(candidates=st.permutations(CANDIDATES), anchors=st.permutations(ANCHORS))
def test_the_same_certificates_give_the_same_chain_in_any_order(
    candidates: list[x509.Certificate], anchors: list[x509.Certificate]
) -> None:
    """A CA that sends its chain in another order every time does not make every answer a new secret."""
    assert len(EXPECTED) == 3
    assert find_path(LEAF, candidates, anchors, NOW) == EXPECTED
