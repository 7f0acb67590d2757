"""Chains before OpenSSL and before us: the same verdict on any, and what its command makes is understood."""

from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from fakes.chains import Case, below
from fakes.hierarchy import (
    DAY,
    NOW,
    SERVER_AND_CLIENT,
    UNKNOWN,
    URI,
    Ca,
    key_usage,
    make_ca,
    make_leaf,
    uris,
)
from fakes.openssl import openssl
from hypothesis import given, settings
from hypothesis import strategies as st

from sds_agent.pki.certificates import read_pem
from sds_agent.pki.validation.path import PathError, find_path

SECOND = timedelta(seconds=1)
SERVER_ONLY = (ExtendedKeyUsageOID.SERVER_AUTH,)
ANY_USAGE = (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)
HOSTS = st.sampled_from(["demo.example", ".demo.example", ".example", "other.example", "sub.demo.example"])


@st.composite
def name_limits(draw: st.DrawFn) -> x509.NameConstraints | None:
    permitted, excluded = draw(st.lists(HOSTS, max_size=2)), draw(st.lists(HOSTS, max_size=1))
    return uris(permitted=permitted, excluded=excluded) if permitted or excluded else None


@st.composite
def some_ca(draw: st.DrawFn, name: str, issuer: Ca | None, *, identified: bool) -> Ca:
    """Mostly right, wrong in one way or another now and then."""
    rarely = st.integers(0, 15).map(lambda n: n == 0)
    is_ca = not draw(rarely)
    return make_ca(
        name,
        issuer,
        is_ca=is_ca,
        is_ca_critical=draw(st.booleans()),
        path_length=draw(st.sampled_from([None, None, 0, 1, 2])) if is_ca else None,
        usage=draw(st.sampled_from([None, key_usage(cert_sign=True), key_usage(cert_sign=not draw(rarely))])),
        # OpenSSL checks an anchor's usages too, and Envoy does not
        usages=draw(st.sampled_from([(), (), SERVER_AND_CLIENT, *([SERVER_ONLY, ANY_USAGE] if issuer else [])])),
        constraints=draw(st.none() | name_limits()),
        not_after=NOW - SECOND if draw(rarely) else NOW + DAY,
        identified=identified,
        extra=[(UNKNOWN, draw(rarely))],
    )


@st.composite
def some_chain(draw: st.DrawFn) -> Case:
    self_issued = draw(st.booleans())
    # without key identifiers OpenSSL does not tell CAs of one name apart
    identified = self_issued or draw(st.booleans())
    cas = [draw(some_ca("Root", None, identified=identified))]
    for number in range(draw(st.integers(0, 3))):
        name = "Root" if self_issued and draw(st.booleans()) else f"CA {number}"
        cas.append(draw(some_ca(name, cas[-1], identified=identified)))
    uri = draw(st.sampled_from([URI, URI, "spiffe://sub.demo.example/web", "spiffe://other.example/web"]))
    return below(*cas, leaf=make_leaf(cas[-1], uri))


@settings(max_examples=150)
@given(case=some_chain())
def test_openssl_comes_to_the_same_verdict_on_any_chain(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        case.find()
        ours = True
    except PathError:
        ours = False
    assert case.openssl_verifies(tmp_path_factory.mktemp("chain")) == ours


def made_by_openssl(
    directory: Path, *, ca: str = "critical,CA:TRUE", extensions: Iterable[str] = (), signing: Iterable[str] = ()
) -> Case:
    """A leaf and its CA by the openssl command: `ca` and `extensions` are the CA's, `signing` goes for the leaf."""
    config = ["[req]", "distinguished_name=dn", "x509_extensions=ca", "[dn]", "[ca]", f"basicConstraints={ca}"]
    config += [*extensions, "[leaf]", f"subjectAltName=critical,URI:{URI}", "extendedKeyUsage=serverAuth,clientAuth"]
    (directory / "c.cnf").write_text("\n".join([*config, ""]))
    new = ["-newkey", "rsa:2048", "-nodes", "-config", "c.cnf"]
    openssl(
        directory, "req", "-x509", *new, "-subj", "/O=Demo/CN=Made by openssl", "-keyout", "ca.key", "-out", "ca.pem"
    )
    openssl(directory, "req", *new, "-subj", "/", "-keyout", "leaf.key", "-out", "leaf.csr")
    sign = ["-CA", "ca.pem", "-CAkey", "ca.key", "-set_serial", "7", "-extfile", "c.cnf", "-extensions", "leaf"]
    openssl(directory, "x509", "-req", "-in", "leaf.csr", *sign, *signing, "-out", "made.pem")
    (leaf,) = read_pem((directory / "made.pem").read_bytes())
    return Case(leaf, (), read_pem((directory / "ca.pem").read_bytes()), leaf.not_valid_before_utc)


def test_a_ca_made_by_openssl_for_one_trust_domain_is_taken(tmp_path: Path) -> None:
    """The way to keep a CA to its trust domain is a URI name constraint, which cryptography's own verifier refuses."""
    limits = "nameConstraints=critical,permitted;URI:demo.example"
    case = made_by_openssl(tmp_path, extensions=[limits, "keyUsage=critical,keyCertSign,cRLSign"])
    assert case.find() == (case.leaf,)


def test_a_ca_like_those_of_easy_rsa_is_taken(tmp_path: Path) -> None:
    """Its extensions are not critical, for which cryptography's own verifier refuses it."""
    usage = ["keyUsage=cRLSign,keyCertSign", "subjectKeyIdentifier=hash", "authorityKeyIdentifier=keyid,issuer"]
    case = made_by_openssl(tmp_path, ca="CA:TRUE", extensions=usage)
    assert case.find() == (case.leaf,)


def test_a_ca_made_by_openssl_keeps_to_its_constraints(tmp_path: Path) -> None:
    case = made_by_openssl(tmp_path, extensions=["nameConstraints=critical,permitted;URI:other.example"])
    with pytest.raises(PathError, match=r"permit 'other\.example', but not"):
        case.find()


def test_a_root_that_does_not_say_it_is_a_ca_is_refused_as_an_anchor(tmp_path: Path) -> None:
    """Were it taken, any self-signed certificate that is pinned by mistake could issue identities.

    `openssl x509 -signkey` makes such roots: of version 1, and from OpenSSL 3.2 on without BasicConstraints.
    """
    new = ["req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj"]
    openssl(tmp_path, *new, "/CN=Bare", "-keyout", "bare.key", "-out", "bare.csr")
    openssl(tmp_path, "x509", "-req", "-in", "bare.csr", "-signkey", "bare.key", "-out", "bare.pem")
    openssl(tmp_path, *new, "/CN=leaf", "-keyout", "leaf.key", "-out", "leaf.csr")
    signed = ["-CA", "bare.pem", "-CAkey", "bare.key", "-set_serial", "7"]
    openssl(tmp_path, "x509", "-req", "-in", "leaf.csr", *signed, "-out", "leaf.pem")
    (root,) = read_pem((tmp_path / "bare.pem").read_bytes())
    (leaf,) = read_pem((tmp_path / "leaf.pem").read_bytes())
    with pytest.raises(PathError, match="'CN=Bare' is no CA"):
        find_path(leaf, (), [root], leaf.not_valid_before_utc)


@pytest.mark.parametrize("options", [["-sha1"], ["-md5"], ["-sha1", "-sigopt", "rsa_padding_mode:pss"]])
def test_signatures_that_can_be_forged_are_refused(options: list[str], tmp_path: Path) -> None:
    case = made_by_openssl(tmp_path, signing=options)
    with pytest.raises(PathError, match=f"is signed with {options[0][1:].upper()}"):
        case.find()
