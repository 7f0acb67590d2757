"""Our own signing: what it issues is a valid SVID for every client, and nothing outlives its signer."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from fakes.hierarchy import DAY, NOW, URI, make_ca, make_leaf, new_key
from fakes.openssl import openssl, verifies
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.pki.certificates import extension, is_ca, is_self_signed, read_pem, san_values, write_pem
from sds_agent.pki.keys import (
    KeyType,
    PrivateKey,
    PublicKey,
    generate,
    public_bytes,
    signature_hash,
    to_pkcs8_pem,
)
from sds_agent.pki.validation.path import find_path
from sds_agent.signing.signer import (
    LEAF_BACKDATE,
    LONGEST_COMMON_NAME,
    LONGEST_ORGANIZATION,
    ROOT_BACKDATE,
    SHORTEST_LIFE,
    Signer,
    SignerError,
    make_intermediate,
    make_root,
)

YEARS = timedelta(days=3650)
SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)
KINDS = [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048]
KEYS: dict[KeyType, PrivateKey] = {kind: generate(kind) for kind in KINDS}
ROOTS = {kind: make_root(key, "demo.example", NOW, YEARS) for kind, key in KEYS.items()}
ROOT = ROOTS[KeyType.EC_P256]
WORKLOAD = new_key().public_key()
P521 = ec.generate_private_key(ec.SECP521R1()).public_key()


def sign(ttl: timedelta = HOUR, *, signer: Signer = ROOT, now: datetime = NOW) -> x509.Certificate:
    return signer.sign_leaf(WORKLOAD, URI, now, ttl)


def extensions_of(certificate: x509.Certificate) -> dict[str, bool]:
    """Each extension by its class, and whether it is critical."""
    return {type(e.value).__name__: e.critical for e in certificate.extensions}


def key_usage_of(certificate: x509.Certificate) -> set[str]:
    usage = extension(certificate, x509.KeyUsage)
    assert usage is not None
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    return {name for name in (*names, "key_cert_sign", "crl_sign") if getattr(usage, name)}


# --- the root ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_root_is_a_ca_for_certificates_and_revocation_lists(kind: KeyType) -> None:
    root = ROOTS[kind].certificate
    assert is_ca(root)
    assert is_self_signed(root)
    assert key_usage_of(root) == {"key_cert_sign", "crl_sign"}
    assert extensions_of(root) == {
        "BasicConstraints": True,
        "KeyUsage": True,
        "SubjectKeyIdentifier": False,
        "AuthorityKeyIdentifier": False,
    }
    (organization,) = root.subject
    assert (organization.oid, organization.value) == (NameOID.ORGANIZATION_NAME, "demo.example")


def test_a_root_survives_a_clock_that_is_set_right_after_the_first_start() -> None:
    root = make_root(new_key(), "demo.example", NOW, YEARS).certificate
    assert root.not_valid_before_utc == NOW - ROOT_BACKDATE == NOW - 2 * DAY
    assert root.not_valid_after_utc == NOW + YEARS


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_identifier_is_the_one_that_cryptography_makes(kind: KeyType) -> None:
    """Peers and the roots of before know it by these bytes."""
    made = extension(ROOTS[kind].certificate, x509.SubjectKeyIdentifier)
    assert made == x509.SubjectKeyIdentifier.from_public_key(KEYS[kind].public_key())


def test_key_identifiers_distinguish_two_roots_of_one_name() -> None:
    """While a root is renewed, both are in every bundle, and verifiers pick the right one by its key identifier."""
    old, new = (make_root(new_key(), "demo.example", NOW, YEARS) for _ in range(2))
    anchors = [old.certificate, new.certificate]
    assert old.certificate.subject == new.certificate.subject
    for signer in (old, new):
        leaf = sign(signer=signer)
        own = extension(signer.certificate, x509.SubjectKeyIdentifier)
        named = extension(leaf, x509.AuthorityKeyIdentifier)
        assert own is not None
        assert named is not None
        assert named.key_identifier == own.digest
        assert find_path(leaf, (), anchors, NOW) == (leaf,)
    assert extension(old.certificate, x509.SubjectKeyIdentifier) != extension(
        new.certificate, x509.SubjectKeyIdentifier
    )


@pytest.mark.parametrize("length", [1, LONGEST_ORGANIZATION - 1, LONGEST_ORGANIZATION])
def test_an_organization_that_fits_is_written_as_it_is(length: int) -> None:
    (organization,) = make_root(new_key(), "a" * length, NOW, YEARS).certificate.subject
    assert organization.value == "a" * length


def test_a_longer_organization_is_cut_and_still_its_own(tmp_path: Path) -> None:
    """A trust domain of 255 characters works, OpenSSL included, and does not become another that begins the same."""
    names = ["a" * 65, "a" * 255, "a" * 254 + "b"]
    roots = [make_root(KEYS[KeyType.EC_P256], name, NOW, YEARS) for name in names]
    texts = [next(iter(root.certificate.subject)).value for root in roots]
    assert [len(text) for text in texts] == [LONGEST_ORGANIZATION] * 3
    assert all(str(text).startswith("a" * 47 + "~") for text in texts)
    assert len(set(texts)) == 3
    again = make_root(new_key(), names[1], NOW, YEARS).certificate
    assert again.subject == roots[1].certificate.subject
    assert verifies(tmp_path, sign(signer=roots[1]), (), [roots[1].certificate], NOW)


def test_a_root_needs_a_name_and_a_lifetime() -> None:
    with pytest.raises(SignerError, match="needs a name"):
        make_root(new_key(), "", NOW, YEARS)
    for lifetime in (timedelta(0), -DAY, SHORTEST_LIFE / 2):
        with pytest.raises(SignerError, match="a root cannot be made for"):
            make_root(new_key(), "demo.example", NOW, lifetime)


# --- the leaf ---


def built(like: x509.Certificate, signer: Signer, key: PublicKey, uri: str) -> x509.Certificate:
    """A leaf of the same serial number and times, made by cryptography's own builder."""
    own = extension(signer.certificate, x509.SubjectKeyIdentifier)
    assert own is not None
    usage = dict.fromkeys(
        (
            "content_commitment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(signer.certificate.subject)
        .public_key(key)
        .serial_number(like.serial_number)
        .not_valid_before(like.not_valid_before_utc)
        .not_valid_after(like.not_valid_after_utc)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_encipherment=isinstance(key, rsa.RSAPublicKey), **usage),
            critical=True,
        )
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False)
        .sign(signer.key, signature_hash(signer.key))
    )


@given(
    signed_by=st.sampled_from(KINDS),
    kinds=st.lists(st.sampled_from([*KINDS, "secp521r1"]), min_size=2, max_size=5),
    path=st.text("abcz09.-_", min_size=1, max_size=1900),
    later=st.sampled_from([0, 20, 23, 30]),
    lifetime=st.integers(1, 40 * 365 * 86400),
)
def test_every_leaf_is_the_one_that_a_full_builder_makes(
    signed_by: KeyType, kinds: list[KeyType | str], path: str, later: int, lifetime: int
) -> None:
    """Leaves after the first come from a template: for any key, name and time it must hold nothing of another leaf."""
    now = NOW + later * timedelta(days=365, microseconds=7)
    signer = Signer(
        make_root(KEYS[signed_by], "demo.example", NOW, 40 * timedelta(days=365)).certificate, KEYS[signed_by]
    )
    for number, kind in enumerate(kinds):
        key = P521 if kind == "secp521r1" else KEYS[KeyType(kind)].public_key()
        uri = f"spiffe://demo.example/{number}/{path}"
        leaf = signer.sign_leaf(key, uri, now, timedelta(seconds=lifetime))
        assert leaf.tbs_certificate_bytes == built(leaf, signer, key, uri).tbs_certificate_bytes
        leaf.verify_directly_issued_by(signer.certificate)


def test_no_name_that_is_not_ascii_gets_into_a_leaf() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=r"URI values|ascii"):
            ROOT.sign_leaf(WORKLOAD, "spiffe://demo.example/\xfc", NOW, HOUR)
        sign()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workload", KINDS)
def test_a_leaf_is_an_svid_that_we_and_openssl_take(kind: KeyType, workload: KeyType, tmp_path: Path) -> None:
    root, key = ROOTS[kind], KEYS[workload]
    leaf = root.sign_leaf(key.public_key(), URI, NOW, HOUR)
    assert leaf.subject == x509.Name([])
    assert san_values(leaf) == (x509.UniformResourceIdentifier(URI),)
    assert not is_ca(leaf)
    # only an RSA key can be encrypted to
    encipherment = {"key_encipherment"} if workload is KeyType.RSA_2048 else set()
    assert key_usage_of(leaf) == {"digital_signature"} | encipherment
    usages = extension(leaf, x509.ExtendedKeyUsage)
    assert usages is not None
    assert list(usages) == [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    assert extensions_of(leaf) == {
        "SubjectAlternativeName": True,
        "BasicConstraints": True,
        "KeyUsage": True,
        "ExtendedKeyUsage": False,
        "SubjectKeyIdentifier": False,
        "AuthorityKeyIdentifier": False,
    }
    assert public_bytes(key.public_key()) == public_bytes(leaf.public_key())  # type: ignore[arg-type]  # EC or RSA
    assert find_path(leaf, (), [root.certificate], NOW) == (leaf,)
    assert verifies(tmp_path, leaf, (), [root.certificate], NOW)


def test_serial_numbers_are_128_random_bits() -> None:
    """No two certificates of a CA may share one (RFC 5280 section 4.1.2.2), and no one may guess the next."""
    numbers = {sign().serial_number for _ in range(200)}
    assert len(numbers) == 200
    assert all(0 < number < 2**128 for number in numbers)
    assert max(numbers) > 2**120
    # every bit is drawn: in 200 draws each is 0 at least once and 1 at least once
    assert all({number >> bit & 1 for number in numbers} == {0, 1} for bit in range(128))


def test_a_leaf_begins_two_minutes_back_and_ends_after_its_ttl() -> None:
    leaf = sign(HOUR)
    assert leaf.not_valid_before_utc == NOW - LEAF_BACKDATE == NOW - timedelta(minutes=2)
    assert leaf.not_valid_after_utc == NOW + HOUR


def test_a_leaf_ends_with_its_signer_and_begins_with_it() -> None:
    """A chain is only as long valid as its shortest link: a leaf that claimed more would fail handshakes unrenewed."""
    young = Signer(
        make_ca("CA", not_before=NOW - SECOND, not_after=NOW + HOUR, key=(key := new_key())).certificate, key
    )
    leaf = sign(DAY, signer=young)
    assert (leaf.not_valid_before_utc, leaf.not_valid_after_utc) == (NOW - SECOND, NOW + HOUR)


MOMENTS = st.datetimes(datetime(2026, 1, 1), datetime(2035, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - bounds are naive
TTLS = st.timedeltas(SHORTEST_LIFE, timedelta(days=4000)) | st.timedeltas(SHORTEST_LIFE, 3 * SECOND)


@given(now=MOMENTS, ttl=TTLS, lifetime=st.timedeltas(timedelta(minutes=1), YEARS), later=st.floats(0, 1))
def test_rounding_never_stretches_a_leaf(now: datetime, ttl: timedelta, lifetime: timedelta, later: float) -> None:
    """Whole seconds, never past the signer, never longer than asked for, never born expired."""
    signer = make_root(KEYS[KeyType.EC_P256], "demo.example", now, lifetime)
    at = now + (lifetime - SECOND) * later
    leaf = sign(ttl, signer=signer, now=at)
    first, last = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    root = signer.certificate
    assert root.not_valid_before_utc <= first <= at < last <= root.not_valid_after_utc <= now + lifetime
    assert last <= at + ttl
    assert last > min(at + ttl, root.not_valid_after_utc) - SECOND
    assert at - first < LEAF_BACKDATE + SECOND


def test_times_in_another_zone_mean_the_same_moment() -> None:
    elsewhere = NOW.astimezone(datetime.strptime("+0530", "%z").tzinfo)
    assert sign(now=elsewhere).not_valid_after_utc == NOW + HOUR


@pytest.mark.parametrize("ttl", [timedelta(0), -HOUR, SHORTEST_LIFE - timedelta(microseconds=1)])
def test_a_ttl_that_leaves_no_time_is_refused(ttl: timedelta) -> None:
    with pytest.raises(SignerError, match=r"a certificate cannot be issued for .* s: ask for 1 s or more"):
        sign(ttl)


def test_an_expired_signer_signs_nothing() -> None:
    end = ROOT.certificate.not_valid_after_utc
    assert sign(now=end - timedelta(microseconds=1)).not_valid_after_utc == end
    for now in (end, end + SECOND):
        with pytest.raises(SignerError, match=r"the CA 'O=demo\.example' expired on 2036-03-11 15:09:26 UTC: renew it"):
            sign(now=now)


def test_a_signer_that_is_not_valid_yet_signs_nothing() -> None:
    """A clock that lost years says so, where a certificate that is valid some day would only fail."""
    with pytest.raises(SignerError, match=r"valid only from .*: set this machine's clock"):
        sign(now=NOW - 3 * DAY)


# --- signers made elsewhere ---


def test_a_ca_of_openssl_signs_under_its_own_name(tmp_path: Path) -> None:
    """Names are compared byte by byte by Go: a PrintableString that came back as UTF-8 would break every chain."""
    (tmp_path / "c.cnf").write_text(
        "[req]\ndistinguished_name=dn\nx509_extensions=ca\nstring_mask=default\n[dn]\n"
        "[ca]\nbasicConstraints=critical,CA:TRUE\nsubjectKeyIdentifier=none\n"
    )
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-config", "c.cnf", "-keyout", "ca.key"]
    (ca,) = read_pem(openssl(tmp_path, "req", "-x509", *new, "-subj", "/C=DE/O=Demo/CN=Demo CA").encode())
    key = load_pem_private_key((tmp_path / "ca.key").read_bytes(), password=None)
    assert isinstance(key, PrivateKey)
    assert b"\x13\x07Demo CA" in ca.subject.public_bytes()
    now = ca.not_valid_before_utc
    leaf = Signer(ca, key).sign_leaf(WORKLOAD, URI, now, HOUR)
    assert leaf.issuer.public_bytes() == ca.subject.public_bytes()
    assert extension(leaf, x509.AuthorityKeyIdentifier) is not None
    assert find_path(leaf, (), [ca], now) == (leaf,)
    assert verifies(tmp_path, leaf, (), [ca], now)


def test_an_intermediate_signs_with_its_own_key_identifier() -> None:
    """Some CAs hash keys differently (RFC 7093): the identifier is copied, not computed."""
    root, key = make_ca("Root"), new_key()
    odd = x509.SubjectKeyIdentifier(b"\x01\x02\x03\x04")
    intermediate = make_ca("CA", root, key=key, identified=False, extra=[(odd, False)]).certificate
    leaf = sign(signer=Signer(intermediate, key))
    named = extension(leaf, x509.AuthorityKeyIdentifier)
    assert named is not None
    assert (named.key_identifier, named.authority_cert_issuer) == (odd.digest, None)
    assert find_path(leaf, [intermediate], [root.certificate], NOW) == (leaf, intermediate)


def test_an_intermediate_that_would_outlive_its_root_is_refused_and_not_cut_short() -> None:
    """Its operator has planned for the time that was asked for."""
    key, end = KEYS[KeyType.EC_P256], ROOT.certificate.not_valid_after_utc
    made = make_intermediate(ROOT, key, "cluster1", NOW, end - NOW)
    assert made.certificate.not_valid_after_utc == end
    with pytest.raises(SignerError, match="shorter lifetime"):
        make_intermediate(ROOT, key, "cluster1", NOW, end - NOW + SECOND)


@pytest.mark.parametrize(
    "name", ["", "x" * (LONGEST_COMMON_NAME + 1), "\N{LATIN SMALL LETTER E WITH ACUTE}" * 33, "\udcff", "cluster\n1"]
)
def test_an_intermediate_needs_a_name_that_can_be_shown(name: str) -> None:
    with pytest.raises(SignerError, match="printable characters"):
        make_intermediate(ROOT, KEYS[KeyType.EC_P256], name, NOW, HOUR)


def test_a_key_of_another_certificate_is_refused() -> None:
    with pytest.raises(SignerError, match=r"the private key is not that of the CA certificate 'O=demo\.example'"):
        Signer(ROOT.certificate, new_key())


def test_a_certificate_that_is_no_ca_cannot_sign() -> None:
    key = new_key()
    with pytest.raises(SignerError, match="is no CA"):
        Signer(make_leaf(make_ca("Root"), key=key), key)


def test_a_signer_never_shows_its_key() -> None:
    key = KEYS[KeyType.EC_P256]
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    secret = key.private_numbers().private_value
    pem = to_pkcs8_pem(key).decode().splitlines()[1]
    for text in (repr(ROOT), str(ROOT), f"{ROOT}"):
        assert pem not in text
        assert "key" not in text.lower()
        assert str(secret) not in text
        assert f"{secret:x}" not in text


def test_a_root_is_written_and_read_as_any_certificate() -> None:
    assert read_pem(write_pem([ROOT.certificate])) == (ROOT.certificate,)
