"""Whose CA can be plugged in: directories by the real openssl, easy-rsa and cfssl, and every way to get them wrong."""

import base64
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from fakes import der
from fakes.ca_files import LEAF_WITH_CA_TRUE, by_cfssl, by_easyrsa, by_openssl, contents, files_of
from fakes.hierarchy import DAY, NOW, URI, Ca, Key, key_usage, make_ca, make_crl, new_key, uris
from fakes.openssl import openssl
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.errors import Problem, ProblemsError
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keyfile import read_private_key
from sds_agent.pki.keys import KeyType, generate
from sds_agent.pki.validation.path import find_path
from sds_agent.signing.cacerts import read_signing_set
from sds_agent.signing.directory import (
    LARGEST_FILE,
    DirectoryError,
    Events,
    PluggedDirectory,
    read_directory,
    read_passphrase,
)
from sds_agent.signing.istiod import refused_by_istiod
from sds_agent.signing.signing_set import LARGEST_ANSWER, ROOM_FOR_LEAF, SigningSet

ROOT = make_ca("root")
SIGNER = make_ca("signer", ROOT, path_length=0)
GOOD = files_of(SIGNER, ROOT)
BOM = b"\xef\xbb\xbf"


def problems(files: dict[str, bytes], **how: str | None) -> tuple[Problem, ...]:
    with pytest.raises(ProblemsError) as caught:
        read_signing_set(files, NOW, trust_domain=how.get("trust_domain"))
    return caught.value.problems


def plugged(directory: Path, passphrase: bytes | None = None) -> SigningSet:
    """The CA in a directory, which has to be able to issue."""
    now = datetime.now(UTC)
    signing = read_signing_set(contents(directory), now, passphrase=passphrase)
    leaf, *above = signing.issue(generate(KeyType.EC_P256).public_key(), URI, now, timedelta(hours=1))
    assert find_path(leaf, above, signing.roots, now)
    return signing


def test_a_directory_by_openssl_can_be_plugged_in(tmp_path: Path) -> None:
    signing = plugged(by_openssl(tmp_path))
    assert signing.intermediates == (signing.signer.certificate,)
    assert refused_by_istiod(contents(tmp_path)) == ()


def test_a_directory_by_easyrsa_can_be_plugged_in(tmp_path: Path) -> None:
    directory = by_easyrsa(tmp_path)
    assert not (directory / "ca-cert.pem").read_bytes().startswith(b"-----"), "easy-rsa puts a text before it"
    plugged(directory)


@pytest.mark.parametrize(("algorithm", "size"), [("ecdsa", 256), ("ecdsa", 384), ("rsa", 2048)])
def test_a_directory_by_cfssl_can_be_plugged_in(algorithm: str, size: int, tmp_path: Path) -> None:
    plugged(by_cfssl(tmp_path, algorithm, size))


KEY_FORMS = {
    "PKCS#8": ("pkcs8", "-topk8", "-nocrypt", "-in", "ca-key.pem"),
    "SEC1": ("ec", "-in", "ca-key.pem"),
    "encrypted PKCS#8": ("pkcs8", "-topk8", "-in", "ca-key.pem", "-passout", "pass:secret"),
    "encrypted SEC1": ("ec", "-in", "ca-key.pem", "-aes256", "-passout", "pass:secret"),
}


@pytest.mark.parametrize("arguments", KEY_FORMS.values(), ids=KEY_FORMS)
def test_every_form_of_the_key_can_be_plugged_in(arguments: tuple[str, ...], tmp_path: Path) -> None:
    directory = by_openssl(tmp_path)
    (directory / "ca-key.pem").write_text(openssl(directory, *arguments))
    plugged(directory, b"secret")


def test_a_leaf_made_by_openssl_with_ca_true_is_refused(tmp_path: Path) -> None:
    """openssl's default configuration says CA:true for whatever `req -x509` makes."""
    directory = by_openssl(tmp_path, extensions=LEAF_WITH_CA_TRUE)
    with pytest.raises(ProblemsError) as caught:
        plugged(directory)
    error = str(caught.value)
    assert "lacks keyCertSign" in error
    assert "is a workload's own certificate" in error


def test_a_self_signed_leaf_by_openssl_req_is_refused(tmp_path: Path) -> None:
    made = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca-key.pem", "-out", "ca-cert.pem")
    openssl(tmp_path, *made, "-subj", "/CN=web", "-addext", f"subjectAltName=URI:{URI}")
    for name in ("root-cert.pem", "cert-chain.pem"):
        (tmp_path / name).write_bytes((tmp_path / "ca-cert.pem").read_bytes())
    with pytest.raises(ProblemsError, match="is a workload's own certificate"):
        plugged(tmp_path)


def test_an_expired_signer_by_openssl_is_refused_with_the_time(tmp_path: Path) -> None:
    directory = by_openssl(tmp_path, days=1)
    with pytest.raises(ProblemsError, match="expired on"):
        read_signing_set(contents(directory), datetime.now(UTC) + 2 * DAY)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    directory = by_openssl(tmp_path)
    (directory / "ca-key.pem").write_bytes((directory / "root-key.pem").read_bytes())
    with pytest.raises(ProblemsError, match=r"ca-cert\.pem and ca-key\.pem: the key is not that of"):
        plugged(directory)


def test_a_chain_without_its_root_is_refused_unless_the_roots_have_it() -> None:
    middle = make_ca("middle", ROOT)
    signer = make_ca("signer", middle)
    whole = files_of(signer, middle, ROOT)
    without_root = {**whole, "cert-chain.pem": write_pem([signer.certificate, middle.certificate])}
    assert read_signing_set(without_root, NOW).intermediates == (signer.certificate, middle.certificate)
    other = {**whole, "root-cert.pem": write_pem([make_ca("other").certificate])}
    assert [each.where[0] for each in problems(other)] == ["cert-chain.pem and root-cert.pem"]
    gap = {**whole, "cert-chain.pem": write_pem([signer.certificate, ROOT.certificate])}
    assert "was issued by 'CN=middle'" in str(problems(gap)[0])


def test_a_self_signed_signer_is_its_own_root() -> None:
    signing = read_signing_set(files_of(ROOT), NOW)
    assert signing.intermediates == ()
    assert signing.roots == (ROOT.certificate,)


def test_the_names_of_cert_manager_are_taken_and_win_over_istios() -> None:
    other = make_ca("other", ROOT)
    chain = [other.certificate, ROOT.certificate]
    named = {"tls.crt": write_pem(chain[:1]), "tls.key": files_of(other)["ca-key.pem"], "ca.crt": write_pem(chain[1:])}
    assert read_signing_set(named, NOW).signer.certificate == other.certificate
    assert refused_by_istiod(named) == ()
    both = {**GOOD, **named}
    assert read_signing_set(both, NOW).signer.certificate == other.certificate
    assert "tls.crt is the one that is taken" in str(refused_by_istiod(both)[0])


@pytest.mark.parametrize("name", GOOD)
def test_an_incomplete_set_is_refused_with_the_name_of_the_file(name: str) -> None:
    files = {other: data for other, data in GOOD.items() if other != name}
    assert [(each.where[0], each.found) for each in problems(files)] == [(name, "is missing")]


def test_the_error_for_an_empty_directory_names_the_files_that_belong_there() -> None:
    assert "ca-cert.pem" in problems({})[0].fix
    assert "tls.crt" in problems({})[0].fix


def test_everything_that_is_wrong_is_reported_at_once() -> None:
    files = {**GOOD, "ca-key.pem": b"", "root-cert.pem": b"hello", "cert-chain.pem": b"", "ca-crl.pem": b"x"}
    assert {each.where[0] for each in problems(files)} == {
        "ca-key.pem",
        "root-cert.pem",
        "cert-chain.pem",
        "ca-crl.pem",
    }


BAD_SIGNERS = {
    "no CA": (make_ca("signer", ROOT, is_ca=False), "is no CA"),
    "no BasicConstraints": (make_ca("signer", ROOT, is_ca=None), "is no CA"),
    "no keyCertSign": (make_ca("signer", ROOT, usage=key_usage(cert_sign=False)), "lacks keyCertSign"),
    "expired": (make_ca("signer", ROOT, not_before=NOW - 2 * DAY, not_after=NOW - DAY), "expired on"),
    "not yet valid": (make_ca("signer", ROOT, not_before=NOW + DAY, not_after=NOW + 2 * DAY), "valid only from"),
    "below a root with pathlen 0": (make_ca("signer", make_ca("root", path_length=0, key=ROOT.key)), "pathLen"),
    "for servers alone": (
        make_ca("signer", ROOT, usages=[x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]),
        "ExtendedKeyUsage",
    ),
}


@pytest.mark.parametrize(("signer", "words"), BAD_SIGNERS.values(), ids=BAD_SIGNERS)
def test_a_signer_whose_leaves_no_envoy_would_accept_is_refused(signer: Ca, words: str) -> None:
    root = make_ca("root", path_length=0, key=ROOT.key) if words == "pathLen" else ROOT
    assert words in " ".join(map(str, problems(files_of(signer, root))))


@pytest.mark.parametrize(
    ("uri", "good"),
    [
        ("spiffe://demo.example", True),
        ("spiffe://demo.example/", True),
        ("spiffe://demo.example/web", False),
        ("spiffe://demo.example/ns/default/sa/web", False),
        ("https://demo.example/ca/one", True),
    ],
)
def test_a_ca_that_carries_a_workloads_identity_is_refused(uri: str, *, good: bool) -> None:
    """The holder of its key could speak as that workload, and sign for all others."""
    signer = make_ca("signer", ROOT, names=[x509.UniformResourceIdentifier(uri)])
    files = files_of(signer, ROOT)
    if good:
        assert read_signing_set(files, NOW).roots
    else:
        assert "workload's own certificate" in str(problems(files)[0])


def test_a_constraint_to_whatever_is_below_a_host_can_be_plugged_in() -> None:
    signer = make_ca("signer", ROOT, constraints=uris(permitted=[".demo.example"]))
    assert read_signing_set(files_of(signer, ROOT), NOW).roots
    assert read_signing_set(files_of(signer, ROOT), NOW, trust_domain="east.demo.example").roots


def test_a_signer_that_may_not_issue_for_the_trust_domain_is_refused() -> None:
    files = files_of(make_ca("signer", ROOT, constraints=uris(permitted=["demo.example"])), ROOT)
    assert read_signing_set(files, NOW).roots
    assert read_signing_set(files, NOW, trust_domain="demo.example").roots
    assert "permit 'demo.example'" in str(problems(files, trust_domain="other.example")[0])


@pytest.mark.parametrize("name", ["ca-cert.pem", "root-cert.pem", "cert-chain.pem"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (GOOD["ca-cert.pem"].replace(b" CERTIFICATE", b" TRUSTED CERTIFICATE"), "TRUSTED CERTIFICATE"),
        (GOOD["ca-cert.pem"][:-40], "cut off"),
        (GOOD["ca-key.pem"], "it begins with PRIVATE KEY"),
    ],
)
def test_the_error_says_what_a_file_without_a_certificate_contains(name: str, data: bytes, words: str) -> None:
    reported = problems({**GOOD, name: data})
    assert words in str(reported[0])
    assert reported[0].where == (name,)
    assert "MIG" not in str(reported)


def test_the_agent_reads_a_bom_crlf_and_a_preamble_and_reports_what_istiod_would_refuse(tmp_path: Path) -> None:
    directory = by_openssl(tmp_path)
    sec1 = openssl(directory, "ecparam", "-name", "prime256v1", "-genkey").encode()
    files = {**GOOD, "root-cert.pem": BOM + GOOD["root-cert.pem"].replace(b"\n", b"\r\n")}
    assert read_signing_set(files, NOW).roots == (ROOT.certificate,)
    assert [each.where[0] for each in refused_by_istiod(files)] == ["root-cert.pem"]
    assert "EC PARAMETERS" in str(refused_by_istiod({**GOOD, "ca-key.pem": sec1})[0])
    locked = openssl(directory, *KEY_FORMS["encrypted PKCS#8"]).encode()
    assert "is encrypted" in str(refused_by_istiod({**GOOD, "ca-key.pem": locked})[0])
    behind = {**GOOD, "ca-cert.pem": write_pem([ROOT.certificate, SIGNER.certificate])}
    assert read_signing_set(behind, NOW).signer.certificate == SIGNER.certificate
    assert "not the first certificate" in str(refused_by_istiod(behind)[0])


def crl(issuer: Ca, serial: int, key: Key | None = None) -> bytes:
    return make_crl(issuer, serial, key=key).public_bytes(Encoding.PEM)


def test_every_revocation_list_of_the_file_is_read() -> None:
    """cryptography's own reader stops after the first."""
    lists = crl(ROOT, 7) + b"text\n" + crl(SIGNER, 8)
    signing = read_signing_set({**GOOD, "ca-crl.pem": lists}, NOW)
    assert [
        one.get_revoked_certificate_by_serial_number(n) is not None for one, n in zip(signing.crls, (7, 8), strict=True)
    ]
    assert len(signing.crls) == 2
    assert "list 2 is damaged" in str(problems({**GOOD, "ca-crl.pem": crl(ROOT, 7) + crl(ROOT, 8)[:90]})[0])


def test_a_revocation_list_that_would_revoke_nothing_is_refused() -> None:
    """Its operator relies on it."""
    forged = crl(ROOT, 7) + crl(SIGNER, 8, key=new_key())
    (problem,) = problems({**GOOD, "ca-crl.pem": forged})
    assert "list 2 names 'CN=signer' as its issuer, and is not signed with that CA's key" in str(problem)
    former = make_ca("signer", ROOT)
    fixed = {**GOOD, "cert-chain.pem": GOOD["cert-chain.pem"] + write_pem([former.certificate])}
    assert read_signing_set({**fixed, "ca-crl.pem": crl(former, 8)}, NOW).crls
    assert read_signing_set({**GOOD, "ca-crl.pem": crl(make_ca("gone"), 8)}, NOW).crls, "a former CA's leaves live on"


async def test_files_that_never_rest_are_read_another_time(tmp_path: Path) -> None:
    (tmp_path / "ca-cert.pem").symlink_to("/proc/self/io")  # which counts what is read of it, too
    directory = PluggedDirectory(tmp_path, "demo.example", None, Events("refused", "unread"))
    assert await directory.changed(NOW) is None
    with pytest.raises(ProblemsError, match="its files change all the time"):
        await directory.first(NOW)


@pytest.mark.filterwarnings("ignore:Attribute's length must be:UserWarning")
def test_roots_that_no_client_could_receive_are_refused_with_the_size() -> None:
    """gRPC's clients take answers of 4 MiB, and would never have a certificate of such a CA."""
    one, other = (der.pem(der.certificate(der.entity(letter * 768_000))) for letter in "ab")
    files = {**GOOD, "root-cert.pem": GOOD["root-cert.pem"] + one + other}
    assert LARGEST_ANSWER - ROOM_FOR_LEAF < len(files["root-cert.pem"]) < LARGEST_FILE
    (problem,) = problems(files)
    assert problem.where == ("root-cert.pem",)
    assert f"clients take {LARGEST_ANSWER - ROOM_FOR_LEAF}; remove the roots" in str(problem)
    assert len(read_signing_set({**GOOD, "root-cert.pem": GOOD["root-cert.pem"] + one}, NOW).roots) == 2


def test_the_error_for_a_file_too_large_for_a_ca_says_what_to_put_there(tmp_path: Path) -> None:
    with (tmp_path / "root-cert.pem").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(DirectoryError, match="put the CA's own file there"):
        read_directory(tmp_path)


WITH_CRL = {**GOOD, "ca-crl.pem": crl(ROOT, 7)}


@given(
    st.sampled_from(sorted(WITH_CRL)),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_no_damage_to_a_file_does_more_than_refuse_it(name: str, changes: list[tuple[int, int]]) -> None:
    """A server that reads such a directory goes on; a bug in its reading would end it."""
    begin, *body = WITH_CRL[name].partition(b"-----END")[0].splitlines()
    label = begin.removeprefix(b"-----BEGIN ")
    der = bytearray(base64.b64decode(b"".join(body)))
    for place, value in changes:
        der[place % len(der)] = value
    damaged = {**WITH_CRL, name: begin + b"\n" + base64.encodebytes(der) + b"-----END " + label + b"\n"}
    refused_by_istiod(damaged)
    with suppress(ProblemsError):
        read_signing_set(damaged, NOW)


def test_a_root_that_has_expired_does_not_stand_before_its_renewal() -> None:
    """Of roots with one name and key Envoy takes the first: `ca serve` hands them out in this order."""
    old = make_ca("root", key=ROOT.key, not_before=NOW - 9 * DAY, not_after=NOW - DAY).certificate
    files = {**GOOD, "root-cert.pem": write_pem([old, ROOT.certificate, old])}
    assert read_signing_set(files, NOW).roots == (ROOT.certificate, old)


def test_the_error_for_an_unreadable_path_says_why(tmp_path: Path) -> None:
    with pytest.raises(DirectoryError, match="is not a directory"):
        read_directory(tmp_path / "nowhere")
    (tmp_path / "ca-key.pem").mkdir()
    with pytest.raises(DirectoryError, match="cannot read"):
        read_directory(tmp_path)
    with pytest.raises(DirectoryError, match="passphrase"):
        read_passphrase(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["secret", "secret\n", "secret\n\n", "secret\n# of the offline root\n"])
def test_a_passphrase_is_the_first_line_as_openssl_reads_it(content: str, tmp_path: Path) -> None:
    """An editor leaves an empty line behind, a person a remark, and the passphrase would be called wrong."""
    file = tmp_path / "passphrase"
    file.write_text(content)
    openssl(tmp_path, "genrsa", "-aes256", "-passout", f"file:{file}", "-out", "key.pem")
    assert read_passphrase(file) == b"secret"
    assert read_private_key((tmp_path / "key.pem").read_bytes(), read_passphrase(file)).key_size == 2048
    file.write_bytes(content.replace("\n", "\r\n").encode())
    assert read_passphrase(file) == b"secret"


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "is empty"), ("\n", "is empty"), ("\nsecret\n", "is empty"), (1024 * "s", "has more than 1023 bytes")],
)
def test_the_error_says_why_the_first_line_is_no_passphrase(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_text(content)
    with pytest.raises(DirectoryError, match=f"the first line of the passphrase file .* {words}"):
        read_passphrase(tmp_path / "passphrase")


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_longest_passphrase_is_taken(end: str, tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_bytes(1023 * b"s" + end.encode())
    assert read_passphrase(tmp_path / "passphrase") == 1023 * b"s"


@pytest.mark.parametrize(
    ("new_key", "words"),
    [
        (("genpkey", "-algorithm", "RSA-PSS"), "is an RSA-PSS key"),
        (("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-param_enc", "explicit"), "explicit parameters"),
    ],
)
def test_an_odd_key_is_seen_in_the_certificate_when_its_file_is_encrypted(
    new_key: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    """The check cannot see into an encrypted key, and reading the key loses what is odd about its encoding."""
    openssl(tmp_path, *new_key, "-out", "plain.pem")
    openssl(tmp_path, "req", "-x509", "-new", "-key", "plain.pem", "-subj", "/CN=ca", "-out", "ca-cert.pem")
    openssl(tmp_path, "pkcs8", "-topk8", "-in", "plain.pem", "-passout", "pass:secret", "-out", "ca-key.pem")
    for name in ("root-cert.pem", "cert-chain.pem"):
        (tmp_path / name).write_bytes((tmp_path / "ca-cert.pem").read_bytes())
    with pytest.raises(ProblemsError, match=words):
        plugged(tmp_path, b"secret")
