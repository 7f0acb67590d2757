"""Reading and questioning certificates: whatever a CA sends is either understood to its end or refused in words."""

import base64
import contextlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from fakes.hierarchy import (
    NOW,
    SERVER_AND_CLIENT,
    UNKNOWN,
    URI,
    Ca,
    common_name,
    make_ca,
    make_leaf,
    new_key,
    uris,
)
from fakes.openssl import openssl
from hypothesis import given, settings
from hypothesis import strategies as st

from sds_agent.pki.certificates import (
    MOST_LOADED,
    MOST_PAIRS_REMEMBERED,
    MOST_REMEMBERED,
    CertificateError,
    der_of,
    describe,
    describe_name,
    extended_key_usages,
    extension,
    has_key,
    is_ca,
    is_self_signed,
    load_der,
    read_again,
    read_bundle,
    read_issuers_again,
    read_pem,
    remembered,
    remembered_of_two,
    san_values,
    serial_hex,
    subject_alternative_uris,
    unique,
    write_beside,
    write_pem,
)
from sds_agent.pki.keys import to_pkcs8_pem
from sds_agent.pki.validation.path import PathError, find_path

ROOT = make_ca("Root")
CA = make_ca("CA", ROOT)
LEAF = make_leaf(CA)
CHAIN = (LEAF, CA.certificate, ROOT.certificate)
PEM = write_pem(CHAIN)


# --- reading ---

TEXT = b"subject=CN = Root\nissuer=CN = Root\nCertificate:\n    Data:\n        -----\n"
BLOCKS = [write_pem([certificate]) for certificate in CHAIN]
KEY = to_pkcs8_pem(new_key())

READABLE = {
    "as written": PEM,
    "with CRLF": PEM.replace(b"\n", b"\r\n"),
    "with a byte order mark": b"\xef\xbb\xbf" + PEM,
    "with text before, between and after": TEXT + TEXT.join(BLOCKS) + TEXT,
    "with a private key among them": BLOCKS[0] + KEY + BLOCKS[1] + BLOCKS[2],
    "without the last line break": PEM.rstrip(b"\n"),
    "joined without line breaks between them": b"".join(block.rstrip(b"\n") for block in BLOCKS),
    "indented": b"\n".join(b"    " + line for line in PEM.splitlines()),
    "in lines of another length": b"".join(
        b"-----BEGIN CERTIFICATE-----\n%s\n-----END CERTIFICATE-----\n" % base64.b64encode(c.public_bytes(Encoding.DER))
        for c in CHAIN
    ),
    "under the old label": PEM.replace(b" CERTIFICATE", b" X509 CERTIFICATE"),
}


def test_what_was_just_written_is_the_same_object_when_read_and_the_same_text_when_written_again() -> None:
    """As what a CA in this process signs: it is not decoded, parsed and encoded a second time."""
    made = load_der(make_leaf(CA, key=CA.key).public_bytes(Encoding.DER))
    text = write_pem([made])
    (read,) = read_pem(text)
    assert read is made
    assert write_pem([read]) is text


def test_of_what_was_read_and_written_only_the_last_is_kept() -> None:
    """A CA signs for years, and no certificate of it twice."""
    der = make_leaf(CA, key=CA.key).public_bytes(Encoding.DER)
    before = sys.getrefcount(der)
    text = write_pem([load_der(der)])
    of_text = sys.getrefcount(text)
    assert sys.getrefcount(der) > before
    for _ in range(MOST_LOADED):
        write_pem([load_der(make_leaf(CA, key=CA.key).public_bytes(Encoding.DER))])
    assert sys.getrefcount(der) == before
    assert sys.getrefcount(text) < of_text


def test_an_issuer_that_cannot_be_read_is_found_each_time_and_in_what_was_written_here() -> None:
    """Neither that others were read before it, nor that its text is known, says anything of this one."""
    der = make_leaf(make_ca("Spelled")).public_bytes(Encoding.DER)
    assert read_pem(write_pem([load_der(der)]))
    damaged = load_der(der.replace(b"Spelled", b"Spell\xff\xfe"))
    for _ in range(2):
        with pytest.raises(CertificateError, match=r"^PEM block 1 is not a well-formed "):
            read_pem(write_pem([damaged]))


def test_what_was_written_is_read_again_with_or_without_the_leaf() -> None:
    assert read_again(PEM) == CHAIN
    assert read_issuers_again(PEM) == CHAIN[1:]
    assert read_issuers_again(write_pem(CHAIN[:1])) == ()


@pytest.mark.parametrize("data", READABLE.values(), ids=READABLE.keys())
def test_certificates_are_read_from_pem_as_tools_and_editors_write_it(data: bytes) -> None:
    """Some tools write text before the PEM, editors a byte order mark; `cat` joins what has no last newline."""
    assert read_pem(data) == CHAIN


@pytest.mark.parametrize("data", [b"", b"\n", b"hello", KEY, b"-----BEGIN CERTIFICATE REQUEST-----\nAA==\n"])
def test_without_a_certificate_there_are_none(data: bytes) -> None:
    assert read_pem(data) == ()


def block(der: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n%s\n-----END CERTIFICATE-----\n" % base64.encodebytes(der)


DER = LEAF.public_bytes(Encoding.DER)

UNREADABLE = {
    "a block without content": (block(b""), "PEM block 1 is not a well-formed X.509 certificate"),
    "not base64": (PEM.replace(b"MII", b"MI!I"), "PEM block 1 is not a certificate: its base64 is damaged"),
    "of an unknown version": (
        block(DER.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x05", 1)),
        "PEM block 1 is a certificate of a kind that is not supported",
    ),
    "base64 cut short": (
        b"-----BEGIN CERTIFICATE-----\n%s\n-----END CERTIFICATE-----\n" % base64.b64encode(DER)[:-1],
        "PEM block 1 is not a certificate: its base64 is damaged",
    ),
    "not a certificate": (block(b"\x30\x03\x02\x01\x05"), "PEM block 1 is not a well-formed X.509 certificate"),
    "bytes after the certificate": (block(DER + b"\x00"), "PEM block 1 is not a well-formed X.509 certificate"),
    "a certificate cut short": (block(DER[:-1]), "PEM block 1 is not a well-formed X.509 certificate"),
    "the second block": (BLOCKS[0] + block(DER[:-1]) + BLOCKS[2], "PEM block 2 is not a well-formed X.509 certificate"),
    "the last block cut off": (PEM[:-40], "PEM block 3 has no END line: the certificate is cut off"),
    "an end of another label": (
        BLOCKS[0].replace(b"END CERTIFICATE", b"END X509 CERTIFICATE"),
        "PEM block 1 has no END line",
    ),
    "a beginning in a block": (BLOCKS[0][:100] + PEM, "PEM block 1 is not a certificate: its base64 is damaged"),
}


@pytest.mark.parametrize(("data", "reason"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_the_error_for_an_unreadable_bundle_names_the_block_and_the_reason(data: bytes, reason: str) -> None:
    """A damaged bundle is never half taken: that would silently drop a trust anchor."""
    with pytest.raises(CertificateError) as refused:
        read_pem(data)
    assert reason in str(refused.value)


CUT = BLOCKS[0].replace(b"-----END CERTIFICATE-----\n", b"")
NONE = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
OTHER = b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"


@pytest.mark.parametrize(
    "data",
    [PEM, NONE + PEM, PEM + NONE, CUT + PEM, PEM + CUT + PEM, OTHER + NONE + PEM + NONE + OTHER, CUT + NONE + PEM],
)
def test_what_is_rewritten_reads_as_before_with_its_faults_at_the_same_numbers(data: bytes) -> None:
    reading = read_bundle(data)
    again = read_bundle(reading.rewritten)
    assert (again.certificates, again.left_out) == (reading.certificates, reading.left_out)
    assert b"CRL" not in reading.rewritten


@pytest.mark.parametrize("rest", [OTHER, b"-----END X509 CRL-----" + OTHER])
def test_one_that_is_cut_off_costs_no_other_where_nothing_but_certificates_is_rewritten(rest: bytes) -> None:
    reading = read_bundle(PEM + CUT + rest)
    again = read_bundle(reading.rewritten)
    assert (again.certificates, len(again.left_out)) == (reading.certificates, 1)


@pytest.mark.parametrize("line_break", [b"\n", b"\r"])
def test_a_key_that_was_joined_to_one_that_is_cut_off_is_in_nothing_that_is_told(line_break: bytes) -> None:
    """`cat` joins them in one line, where a BEGIN is none."""
    reading = read_bundle((CUT.rstrip() + KEY + PEM).replace(b"\n", line_break))
    assert reading.left_out == ("PEM block 1 has no END line before the next BEGIN: the certificate is cut off",)
    assert read_bundle(reading.rewritten).left_out == reading.left_out
    assert b"KEY" not in reading.rewritten + repr(reading).encode()


def test_what_cannot_be_read_is_told_once_in_one_order_and_costs_no_certificate() -> None:
    unread = [*read_bundle(CUT + PEM).unread.values(), *read_bundle(NONE + PEM).unread.values()]
    written = write_beside(read_pem(PEM), unread)
    assert (read_bundle(written).certificates, len(read_bundle(written).left_out)) == (read_pem(PEM), 2)
    assert write_beside(read_pem(PEM), (*reversed(unread), *unread)) == written


def test_openssls_trusted_certificates_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "c.pem").write_bytes(BLOCKS[2])
    trusted = openssl(tmp_path, "x509", "-in", "c.pem", "-trustout", "-addtrust", "serverAuth")
    with pytest.raises(CertificateError, match=r"PEM block 1 is a TRUSTED CERTIFICATE.*`openssl x509 -in FILE`"):
        read_pem(trusted.encode())
    (tmp_path / "t.pem").write_text(trusted)
    assert read_pem(openssl(tmp_path, "x509", "-in", "t.pem").encode()) == (ROOT.certificate,)


def test_a_root_with_serial_number_0_is_read_without_a_warning(tmp_path: Path) -> None:
    """Many a private root has it; standard error stays free of the library's warnings."""
    new = ["-newkey", "rsa:2048", "-nodes", "-keyout", "k.pem", "-subj", "/CN=Zero", "-set_serial", "0"]
    pem = openssl(tmp_path, "req", "-x509", *new)
    look = "import sys\nfrom sds_agent.pki.certificates import read_pem, serial_hex\n"
    look += "print(serial_hex(read_pem(sys.stdin.buffer.read())[0]))"
    shown = subprocess.run(
        [sys.executable, "-W", "always", "-c", look], input=pem, capture_output=True, text=True, check=True
    )
    assert (shown.stdout, shown.stderr) == ("0\n", "")


def with_extension(value: bytes, oid: bytes = b"\x55\x1d\x11") -> bytes:
    """A certificate whose extension (SAN by default) has this value, byte for byte; the signature is not right."""
    marker = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.99"), value)
    der = make_ca("Odd", extra=[(marker, False)]).certificate.public_bytes(Encoding.DER)
    return block(der.replace(b"\x55\x1d\x63", oid))


MALFORMED = {
    "of no end": b"\x30\x80",
    "not a sequence": b"\x04\x00",
    "a URI that is not UTF-8": b"\x30\x03\x86\x01\xff",
    "an IP address of three bytes": b"\x30\x05\x87\x03abc",
    "bytes after its end": b"\x30\x06\x87\x04abcd\x00",
}


@pytest.mark.parametrize("value", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_extension_is_found_when_reading(value: bytes) -> None:
    """cryptography parses extensions on demand; found later, the damage would end a task and not one answer."""
    with pytest.raises(CertificateError, match="PEM block 1 is not a well-formed"):
        read_pem(with_extension(value))


def test_a_name_of_a_form_that_is_not_supported_is_found_when_reading() -> None:
    edi_party_name = b"\x30\x06\xa5\x04\xa1\x02\x0c\x00"
    with pytest.raises(CertificateError, match="PEM block 1 is a certificate of a kind that is not supported"):
        read_pem(with_extension(edi_party_name))


def test_a_repeated_extension_is_found_when_reading() -> None:
    with pytest.raises(CertificateError, match="PEM block 1 is not a well-formed"):
        read_pem(with_extension(b"\x30\x00", oid=b"\x55\x1d\x13"))


# --- any bytes ---

RICH = make_leaf(
    make_ca("CA", ROOT, constraints=uris(permitted=["demo.example"])),
    subject=common_name("web"),
    names=[x509.DNSName("a.example"), x509.DirectoryName(common_name("x")), x509.RFC822Name("a@b.example")],
    extra=[(UNKNOWN, False)],
).public_bytes(Encoding.DER)
RICH_CA = make_ca(
    "CA", ROOT, constraints=uris(permitted=["demo.example"], excluded=["x.example"]), usages=SERVER_AND_CLIENT
).certificate.public_bytes(Encoding.DER)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    der = bytearray(draw(st.sampled_from([RICH, RICH_CA])))
    for _ in range(draw(st.integers(1, 3))):
        der[draw(st.integers(0, len(der) - 1))] = draw(st.integers(0, 255))
    return bytes(der)


def ask_everything(certificate: x509.Certificate) -> None:
    for question in (describe, extended_key_usages, is_ca, is_self_signed, san_values, serial_hex):
        question(certificate)
    has_key(certificate, LEAF.public_key())
    for kind in (x509.KeyUsage, x509.NameConstraints, x509.AuthorityKeyIdentifier):
        extension(certificate, kind)
    for leaf, candidates, anchors in (
        (certificate, CHAIN, [ROOT.certificate]),
        (LEAF, [certificate], [ROOT.certificate]),
        (LEAF, CHAIN, [certificate]),
        (make_leaf(Ca(certificate, CA.key)), [certificate], [certificate, ROOT.certificate]),
    ):
        with contextlib.suppress(PathError):
            find_path(leaf, candidates, anchors, NOW)


@settings(max_examples=400)
@given(der=damaged())
def test_a_damaged_certificate_is_refused_or_answers_every_question(der: bytes) -> None:
    """Whatever bytes a CA sends, no foreign exception comes out of reading them or of working with what was read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # cryptography's, on names of a wrong length
        try:
            certificates = read_pem(block(der))
        except CertificateError:
            return
        for certificate in certificates:
            ask_everything(certificate)


@given(
    data=st.binary()
    | st.lists(st.sampled_from([*BLOCKS, b"-----BEGIN CERTIFICATE-----", b"\n", b"AAAA"])).map(b"".join)
)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(CertificateError):
        read_pem(data)


# --- writing and asking ---


def test_a_written_chain_is_read_back_unchanged() -> None:
    assert read_pem(write_pem(CHAIN)) == CHAIN
    assert PEM.endswith(b"-----END CERTIFICATE-----\n")
    assert PEM.count(b"\n-----END CERTIFICATE-----\n") == 3
    assert write_pem(()) == b""


def test_a_certificate_is_written_as_cryptography_does_whatever_its_length() -> None:
    made = [make_leaf(CA, f"{URI}/{'x' * length}") for length in range(49)]  # a line has 48 bytes
    pems = [each.public_bytes(Encoding.PEM) for each in made]
    assert [write_pem([each]) for each in made] == pems
    assert [write_pem(read_pem(pem)) for pem in pems] == pems


def test_of_a_certificate_that_was_read_its_own_bytes_are_written_and_no_others() -> None:
    """Also when many others were read since, one of which may have taken its place in memory."""
    made = [make_leaf(CA, key=CA.key) for _ in range(2 * MOST_REMEMBERED)]
    read = [load_der(each.public_bytes(Encoding.DER)) for each in made]
    for each in made:
        load_der(each.public_bytes(Encoding.DER))
    assert [der_of(each) for each in read] == [each.public_bytes(Encoding.DER) for each in made]


def test_a_ca_is_asked_about_once_however_many_leaves_come_between() -> None:
    asked, leaves = list[x509.Certificate](), [make_leaf(CA, key=CA.key) for _ in range(5 * MOST_REMEMBERED)]

    @remembered
    def serial(certificate: x509.Certificate) -> int:
        asked.append(certificate)
        return certificate.serial_number

    for leaf in leaves:
        assert serial(leaf) == leaf.serial_number
        assert serial(CA.certificate) == CA.certificate.serial_number
    assert asked.count(CA.certificate) == 1
    assert asked.count(leaves[0]) == 1
    assert serial(leaves[0]) == leaves[0].serial_number
    assert asked.count(leaves[0]) == 2, "no more is remembered than the bound"


def test_an_answer_about_two_certificates_is_for_these_two() -> None:
    asked, leaves = list[tuple[int, int]](), [make_leaf(CA, key=CA.key) for _ in range(MOST_PAIRS_REMEMBERED + 1)]

    @remembered_of_two
    def serials(one: x509.Certificate, other: x509.Certificate) -> tuple[int, int]:
        asked.append((one.serial_number, other.serial_number))
        return asked[-1]

    for leaf in leaves:
        for pair in ((leaf, CA.certificate), (CA.certificate, leaf), (leaf, CA.certificate)):
            assert serials(*pair) == (pair[0].serial_number, pair[1].serial_number)
    assert len(asked) == len(set(asked)) == 2 * len(leaves)


def test_unique_drops_repetitions_and_preserves_the_order() -> None:
    again = read_pem(PEM)
    assert unique([*CHAIN, *again, LEAF]) == CHAIN
    assert unique([*reversed(CHAIN), *again]) == tuple(reversed(CHAIN))
    assert unique(()) == ()


def test_certificates_of_one_name_and_key_are_not_repetitions() -> None:
    """A renewed root under its old key is a certificate of its own: it outlives the old one."""
    renewed = make_ca("Root", key=ROOT.key).certificate
    assert unique([ROOT.certificate, renewed]) == (ROOT.certificate, renewed)


def test_only_what_its_own_key_signed_is_self_signed() -> None:
    assert is_self_signed(ROOT.certificate)
    assert not is_self_signed(CA.certificate)
    self_issued = make_ca("Root", ROOT).certificate
    assert self_issued.issuer == self_issued.subject
    assert not is_self_signed(self_issued)


def test_the_serial_number_is_in_lower_case_hexadecimal() -> None:
    """As `openssl x509 -serial` shows it, but for the case: what an operator compares in logs and on the wire."""
    assert serial_hex(LEAF) == f"{LEAF.serial_number:x}"
    assert set(serial_hex(LEAF)) <= set("0123456789abcdef")


def test_a_certificate_knows_its_key() -> None:
    assert has_key(CA.certificate, CA.key.public_key())
    assert not has_key(CA.certificate, ROOT.key.public_key())


def test_a_ca_is_what_says_so_critical_or_not() -> None:
    assert is_ca(ROOT.certificate)
    assert is_ca(make_ca("CA", is_ca_critical=False).certificate)
    assert not is_ca(LEAF)
    assert not is_ca(make_ca("CA", is_ca=None).certificate)


def test_every_name_and_usage_of_a_certificate_is_read() -> None:
    dns = x509.DNSName("web.demo.example")
    leaf = make_leaf(CA, names=[dns])
    assert san_values(leaf) == (x509.UniformResourceIdentifier(URI), dns)
    assert subject_alternative_uris(leaf) == (URI,)
    assert extended_key_usages(leaf) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert extension(leaf, x509.KeyUsage) is not None


def test_a_certificate_without_extensions_has_no_names_and_usages() -> None:
    bare = make_leaf(CA, None, usages=())
    assert (san_values(bare), subject_alternative_uris(bare), extended_key_usages(bare)) == ((), (), frozenset())
    assert extension(bare, x509.NameConstraints) is None


def test_a_certificate_is_described_by_what_a_reader_knows_it_by() -> None:
    assert describe(CA.certificate) == "'CN=CA'"
    assert describe(LEAF) == f"'{URI}'"
    assert describe(make_leaf(CA, None)).startswith("the certificate with serial number ")


def test_a_name_from_outside_can_do_nothing_to_a_terminal_or_a_log() -> None:
    organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "x\n\x1b[31mfaked é" + "y" * 200)
    text = describe(make_ca("CA", subject=x509.Name([organization])).certificate)
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 200
    assert describe_name("a" * 500) == "'" + "a" * 120 + "'..."
