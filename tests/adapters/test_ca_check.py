"""`sds-agent ca check` on what operators really have: directories by openssl, easy-rsa and cfssl, whole and spoiled."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from fakes import der
from fakes.ca_files import CA_EXTENSIONS, LEAF_WITH_CA_TRUE, by_cfssl, by_easyrsa, by_openssl
from fakes.hierarchy import DAY, NOW, Ca, key_usage, make_ca
from fakes.judge import Case
from fakes.odd_certificates import NOT_LOADED, NOT_READ
from fakes.oddities.places import CA, ENDED, ROOT, case, instead, parts, plus
from fakes.openssl import openssl

from sds_agent.cli.main import main
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keyfile import read_private_key

Spoil = Callable[[Path], object]
Printed = pytest.CaptureFixture[str]
BOM = b"\xef\xbb\xbf"


def by_shell(steps: str) -> Spoil:
    """Commands as an operator types them, in the directory."""
    return lambda directory: subprocess.run(["bash", "-euc", steps], cwd=directory, check=True, capture_output=True)


def every_file(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(directory: Path) -> None:
        for file in directory.glob("*.pem"):
            file.write_bytes(change(file.read_bytes()))

    return spoil


def more_in(name: str, certificate: bytes) -> Spoil:
    """A certificate (DER) at the end of a file."""

    def spoil(directory: Path) -> None:
        with (directory / name).open("ab") as file:
            file.write(der.pem(certificate))

    return spoil


def signer_of_version_1(directory: Path) -> None:
    key = read_private_key((directory / "ca-key.pem").read_bytes())
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    (directory / "ca-cert.pem").write_bytes(der.pem(der.certificate(der.entity("Old Signer", key), version=b"")))


def issued_again(extensions: str = CA_EXTENSIONS) -> Spoil:
    """The signer's certificate, signed anew by its root."""

    def spoil(directory: Path) -> None:
        (directory / "again.ext").write_text(extensions)
        signed = ("-CA", "root-cert.pem", "-CAkey", "root-key.pem", "-CAcreateserial", "-extfile", "again.ext")
        openssl(directory, "x509", "-req", "-in", "ca.csr", *signed, "-out", "ca-cert.pem", "-days", "9")
        by_shell("cat ca-cert.pem root-cert.pem > cert-chain.pem")(directory)

    return spoil


def issued_until(end: str) -> Spoil:
    """The same with an end in the past, which `openssl x509` has no word for, or refuses."""
    database = "[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\nnew_certs_dir=.\nrand_serial=yes\npolicy=p\n"
    names = "[p]\norganizationName=supplied\ncommonName=supplied\n"
    times = ("-startdate", "20200101000000Z", "-enddate", end)

    def spoil(directory: Path) -> None:
        (directory / "index.txt").touch()
        (directory / "again.ext").write_text(CA_EXTENSIONS)
        (directory / "ca.cnf").write_text(database + names)
        signed = ("-cert", "root-cert.pem", "-keyfile", "root-key.pem", "-extfile", "again.ext", "-md", "sha256")
        made = ("-batch", "-notext", "-out", "ca-cert.pem")
        openssl(directory, "ca", "-config", "ca.cnf", "-in", "ca.csr", *signed, *times, *made)
        by_shell("cat ca-cert.pem root-cert.pem > cert-chain.pem")(directory)

    return spoil


def signer_with_key(new_key: str) -> Spoil:
    """A self-signed signer with a key of that kind."""
    return by_shell(
        f"openssl {new_key} > ca-key.pem; openssl req -x509 -new -key ca-key.pem -subj /CN=ca -out ca-cert.pem; "
        "cp ca-cert.pem root-cert.pem; cp ca-cert.pem cert-chain.pem"
    )


def revocation_list(certificate: str, key: str, times: str = "-crldays 9") -> Spoil:
    return by_shell(
        f"touch index.txt; printf '[ca]\\ndefault_ca=d\\n[d]\\ndatabase=index.txt\\n' > ca.cnf; openssl ca -gencrl "
        f"-config ca.cnf -md sha256 {times} -cert {certificate} -keyfile {key} -out ca-crl.pem"
    )


REVOKED = by_shell(
    "touch index.txt; printf '[ca]\\ndefault_ca=d\\n[d]\\ndatabase=index.txt\\n' > ca.cnf; openssl ca -config ca.cnf "
    "-md sha256 -cert root-cert.pem -keyfile root-key.pem -revoke ca-cert.pem"
)
"""The signer, in the database of its root."""


def both(first: Spoil, second: Spoil) -> Spoil:
    return lambda directory: (first(directory), second(directory))


GOOD: dict[str, tuple[Spoil, str]] = {
    "as it is": (lambda _: None, ""),
    "the names of cert-manager": (
        by_shell("mv cert-chain.pem tls.crt; mv ca-key.pem tls.key; mv root-cert.pem ca.crt; rm ca-cert.pem"),
        "",
    ),
    "both names": (
        by_shell("cp cert-chain.pem tls.crt; cp ca-key.pem tls.key; cp root-cert.pem ca.crt"),
        "tls.crt is the one that is taken",
    ),
    "a chain without its root": (by_shell("cp ca-cert.pem cert-chain.pem"), ""),
    "a text before the PEM": (by_shell("openssl x509 -text -in root-cert.pem > r; mv r root-cert.pem"), ""),
    "CRLF": (every_file(lambda data: data.replace(b"\n", b"\r\n")), ""),
    "a byte order mark": (every_file(lambda data: BOM + data), "begins with a byte order mark"),
    "a key behind EC PARAMETERS": (
        by_shell("(openssl ecparam -name prime256v1; openssl ec -in ca-key.pem) > k; mv k ca-key.pem"),
        "begins with an EC PARAMETERS block",
    ),
    "a key behind its certificate": (
        by_shell("cat ca-cert.pem ca-key.pem > k; mv k ca-key.pem"),
        "ca-key.pem: begins with a block CERTIFICATE; move the key to the front",
    ),
    "a signer behind parameters": (
        by_shell("(openssl ecparam -name prime256v1; cat ca-cert.pem) > c; mv c ca-cert.pem"),
        "ca-cert.pem: begins with a block EC PARAMETERS; move the signer's certificate to the front",
    ),
    "an old label": (
        by_shell("sed -i 's/CERTIFICATE/X509 CERTIFICATE/' root-cert.pem"),
        "root-cert.pem: holds an X509 CERTIFICATE; `sed -i",
    ),
    "a chain whose lines run together": (
        by_shell('(printf %s "$(cat ca-cert.pem)"; cat root-cert.pem) > cert-chain.pem'),
        "cert-chain.pem: holds a BEGIN or an END of a block that shares its line",
    ),
    "an indented key": (by_shell("sed -i 's/^/  /' ca-key.pem"), "ca-key.pem: holds a BEGIN or an END"),
    "spaces after each line": (every_file(lambda data: data.replace(b"\n", b" \n")), ""),
    "PKCS#1": (signer_with_key("genrsa -traditional"), ""),
    "name constraints": (
        issued_again(f"{CA_EXTENSIONS}nameConstraints=critical,permitted;URI:demo.example\n"),
        "",
    ),
    "a revocation list": (revocation_list("root-cert.pem", "root-key.pem"), ""),
    "a comment that names a BEGIN line": (
        every_file(
            lambda data: b"# the old -----BEGIN CERTIFICATE----- was here, and a -----BEGIN PRIVATE KEY-----\n" + data
        ),
        "",
    ),
}

LEFT_OUT: dict[str, tuple[Spoil, str]] = {
    "another root that Envoy does not load": (
        more_in("root-cert.pem", NOT_LOADED["version 1 with extensions"]),
        "root-cert.pem: PEM block 2 is a certificate that Envoy does not load: it is of version 1",
    ),
    "another root that cannot be read": (
        more_in("root-cert.pem", NOT_READ["_ in PrintableString"]),
        "root-cert.pem: PEM block 2 is not a well-formed X.509 certificate",
    ),
    "a certificate in the chain that is not needed": (
        more_in("cert-chain.pem", NOT_READ["critical FALSE"]),
        "cert-chain.pem: PEM block 3 is not a well-formed X.509 certificate",
    ),
}

BAD: dict[str, tuple[Spoil, str, str]] = {
    "no chain": (by_shell("rm cert-chain.pem"), "cert-chain.pem: is missing", "put it beside"),
    "a leaf with CA:true": (issued_again(LEAF_WITH_CA_TRUE), "workload's own certificate", "issue a CA certificate"),
    "a CA that may not sign": (
        issued_again("basicConstraints=critical,CA:TRUE\nkeyUsage=critical,digitalSignature\n"),
        "its KeyUsage lacks keyCertSign",
        "keyUsage=critical,keyCertSign,cRLSign",
    ),
    "a certificate that is no CA": (issued_again("basicConstraints=CA:FALSE\n"), "is no CA", "CA:TRUE"),
    "an expired signer": (issued_until("20210101000000Z"), "expired on", "issue a new one"),
    "the key of another": (by_shell("cp root-key.pem ca-key.pem"), "the key is not that of", "put the key there"),
    "another root": (
        by_shell("openssl req -x509 -newkey rsa:2048 -nodes -keyout /dev/null -subj /CN=other -out root-cert.pem"),
        "no certificate of this signer would be trusted",
        "put the certificates from the signer up to the root",
    ),
    "a root that was renewed under a signer that asks for the old one": (
        both(
            issued_again(f"{CA_EXTENSIONS}authorityKeyIdentifier=keyid,issuer:always\n"),
            by_shell("openssl req -x509 -new -key root-key.pem -subj /O=demo.example -days 9 -out root-cert.pem"),
        ),
        "asks for another certificate of 'O=demo.example' than is there, by the serial number",
        "put the certificates from the signer up to the root",
    ),
    "TRUSTED CERTIFICATE": (
        by_shell("openssl x509 -trustout -in root-cert.pem -out r; mv r root-cert.pem"),
        "`openssl x509 -in FILE` writes it as a plain one",
        "write it anew",
    ),
    "explicit parameters": (
        by_shell("openssl ec -in ca-key.pem -param_enc explicit -out k; mv k ca-key.pem"),
        "explicit parameters",
        "-param_enc named_curve",
    ),
    "RSA-PSS": (signer_with_key("genpkey -algorithm RSA-PSS"), "RSA-PSS key", "openssl genpkey -algorithm RSA"),
    "short RSA": (signer_with_key("genrsa 1024"), "RSA key of 1024 bits", "2048 bits or more"),
    "Ed25519": (signer_with_key("genpkey -algorithm ed25519"), "neither an EC nor an RSA key", "make an EC or RSA key"),
    "an encrypted key": (
        by_shell("openssl pkcs8 -topk8 -in ca-key.pem -passout pass:secret -out k; mv k ca-key.pem"),
        "is encrypted and there is no passphrase",
        "name the file that holds it",
    ),
    "DER": (
        by_shell("openssl pkey -in ca-key.pem -outform DER -out k; mv k ca-key.pem"),
        "is in DER",
        "openssl pkey -inform DER",
    ),
    "a certificate that is cut off": (
        by_shell("head -c 300 root-cert.pem > r; mv r root-cert.pem"),
        "cut off",
        "write it anew",
    ),
    "key and certificate in each other's place": (
        by_shell("mv ca-key.pem k; mv ca-cert.pem ca-key.pem; mv k ca-cert.pem"),
        "ca-key.pem: is a certificate",
        "give the private key",
    ),
    "a revocation list of another key": (
        both(
            by_shell("openssl req -x509 -new -key ca-key.pem -subj /O=demo.example -out namesake.pem"),
            revocation_list("namesake.pem", "ca-key.pem"),
        ),
        "not signed with that CA's key",
        "have that CA issue it anew",
    ),
    "a signer that Envoy does not load": (
        signer_of_version_1,
        "Envoy does not load: it is of version 1 and has extensions or unique identifiers, which only later versions "
        "have; its subject is 'CN=Old Signer'",
        "have the certificate issued anew",
    ),
    "a revocation list that is cut off": (
        both(revocation_list("root-cert.pem", "root-key.pem"), by_shell("head -c 200 ca-crl.pem > c; mv c ca-crl.pem")),
        "its revocation list 1 is damaged: it has no END line, so it is cut off",
        "write it anew",
    ),
    "a revocation list with a damaged line": (
        both(revocation_list("root-cert.pem", "root-key.pem"), by_shell("sed -i '3s/./!/' ca-crl.pem")),
        "its revocation list 1 is damaged: it is not in base64",
        "write it anew",
    ),
    "a signer that its root has revoked": (
        both(REVOKED, revocation_list("root-cert.pem", "root-key.pem")),
        "ca-crl.pem: revokes 'CN=cluster1,O=demo.example'",
        "have another CA certificate issued",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), GOOD.values(), ids=GOOD)
def test_the_check_passes_a_good_directory_and_says_what_istiod_would_refuse(
    spoil: Spoil, words: str, tmp_path: Path, capfd: Printed
) -> None:
    spoil(by_openssl(tmp_path))
    code = main(["ca", "check", str(tmp_path)])
    printed = capfd.readouterr().out
    assert code == 0, printed
    assert "can be plugged in." in printed
    assert words in printed
    assert ("istiod itself would not take it" in printed) is bool(words)


@pytest.mark.parametrize(("spoil", "words"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_the_check_names_what_the_agent_leaves_out_and_passes(
    spoil: Spoil, words: str, tmp_path: Path, capfd: Printed
) -> None:
    spoil(by_openssl(tmp_path))
    assert main(["ca", "check", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert f"  left out: {words}" in printed
    assert printed.count("  root: ") == 1


@pytest.mark.parametrize(("spoil", "words", "fix"), BAD.values(), ids=BAD)
def test_the_check_fails_a_bad_directory_and_says_how_to_fix_it(
    spoil: Spoil, words: str, fix: str, tmp_path: Path, capfd: Printed
) -> None:
    spoil(by_openssl(tmp_path))
    keys = [line for file in tmp_path.glob("*key.pem") for line in file.read_bytes().splitlines() if len(line) > 40]
    code = main(["ca", "check", str(tmp_path)])
    printed = capfd.readouterr()
    assert code == 2, printed.out
    assert printed.err == ""
    assert "cannot be plugged in:" in printed.out
    line = next(line for line in printed.out.splitlines() if words in line)
    assert fix in line.partition("; ")[2]
    assert not any(line in printed.out.encode() for line in keys)


OTHER_FORMS: dict[str, tuple[str, Spoil]] = {
    f"{name}, {form}": (name, both(before, by_shell(f"{command.format(name)} > other; mv other {name}")))
    for name, before, forms in (
        ("root-cert.pem", lambda _: None, {"DER": "openssl x509 -outform DER -in {}"}),
        ("cert-chain.pem", lambda _: None, {"PKCS#7": "openssl crl2pkcs7 -nocrl -certfile {}"}),
        ("ca-key.pem", lambda _: None, {"DER": "openssl pkey -outform DER -in {}"}),
        ("ca-crl.pem", revocation_list("root-cert.pem", "root-key.pem"), {"DER": "openssl crl -outform DER -in {}"}),
    )
    for form, command in {**forms, "UTF-16": "iconv -t UTF-16 {}", "base64": "base64 -w0 {}"}.items()
}


@pytest.mark.parametrize(("name", "spoil"), OTHER_FORMS.values(), ids=OTHER_FORMS)
def test_the_check_gives_a_command_that_converts_a_file_to_pem(
    name: str, spoil: Spoil, tmp_path: Path, capfd: Printed
) -> None:
    """Windows exports DER and writes UTF-16, `kubectl get secret` shows base64, a CA publishes its lists in DER."""
    spoil(by_openssl(tmp_path))
    assert main(["ca", "check", str(tmp_path)]) == 2
    (command,) = re.findall(rf"{re.escape(name)}: .*; .*`(.*)`", capfd.readouterr().out)
    by_shell(f"{command.replace('FILE', name)}; mv {name}.pem {name}")(tmp_path)
    assert main(["ca", "check", str(tmp_path)]) == 0, command


def test_the_check_shows_the_trust_domains_that_the_constraints_leave(tmp_path: Path, capfd: Printed) -> None:
    """The first host that the signer permits is one that its root excludes: that says nothing of the others."""
    by_openssl(tmp_path)
    excluding = "nameConstraints=critical,excluded;URI:old.example,excluded;URI:.dev.example"
    subject = ("-subj", "/O=demo.example", "-addext", "keyUsage=critical,keyCertSign", "-addext", excluding)
    openssl(tmp_path, "req", "-x509", "-new", "-key", "root-key.pem", *subject, "-out", "root-cert.pem")
    permitted = "permitted;URI:old.example,permitted;URI:demo.example,permitted;URI:.example"
    issued_again(f"{CA_EXTENSIONS}nameConstraints=critical,{permitted}\n")(tmp_path)
    assert main(["ca", "check", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert "  trust domains: any below 'example'; but not 'old.example', any below 'dev.example'\n" in printed
    issued_again(f"{CA_EXTENSIONS}nameConstraints=critical,permitted;URI:old.example\n")(tmp_path)
    assert main(["ca", "check", str(tmp_path)]) == 2
    assert "exclude 'old.example'" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("useless", "words"),
    [
        (make_ca("useless", not_before=NOW - 2000 * DAY, not_after=NOW - 1000 * DAY), "it has expired"),
        (make_ca("useless", is_ca=False, not_after=NOW + 9999 * DAY), "it is no CA"),
        (make_ca("useless", usage=key_usage(cert_sign=False), not_after=NOW + 9999 * DAY), "it is no CA"),
    ],
)
def test_the_check_says_which_of_several_roots_to_remove(
    useless: Ca, words: str, tmp_path: Path, capfd: Printed
) -> None:
    with (by_openssl(tmp_path) / "root-cert.pem").open("ab") as roots:
        roots.write(write_pem([useless.certificate]))
    assert main(["ca", "check", str(tmp_path)]) == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.endswith(": remove it")]
    assert line.startswith("  root: 'CN=useless', EC secp256r1, valid until ")
    assert f"; {words}: remove it" in line


def test_an_encrypted_key_is_read_with_its_passphrase(tmp_path: Path, capfd: Printed) -> None:
    BAD["an encrypted key"][0](by_openssl(tmp_path))
    (tmp_path / "passphrase").write_text("secret\n")
    assert main(["ca", "check", str(tmp_path), "--passphrase-file", str(tmp_path / "passphrase")]) == 0
    assert "istiod has no way to be given a passphrase" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ("-crldays 9", "revocation list: 'O=demo.example', 0 entries, valid until"),
        ("-crl_lastupdate 20200101000000Z -crl_nextupdate 20200102000000Z", "it is overdue: have it issued anew"),
    ],
)
def test_the_check_shows_a_revocation_list_and_says_when_it_is_overdue(
    times: str, words: str, tmp_path: Path, capfd: Printed
) -> None:
    revocation_list("root-cert.pem", "root-key.pem", times)(by_openssl(tmp_path))
    assert main(["ca", "check", str(tmp_path)]) == 0
    assert words in capfd.readouterr().out


@pytest.mark.parametrize(
    ("kind", "words"),
    [("ed25519", "Ed25519"), ("rsa:3072", "RSA 3072"), ("ec -pkeyopt ec_paramgen_curve:P-521", "EC secp521r1")],
)
def test_the_check_shows_the_type_and_size_of_every_key(kind: str, words: str, tmp_path: Path, capfd: Printed) -> None:
    """An auditor who reads "RSA 0" of a sound Ed25519 root throws it away, or stops believing the rest."""
    openssl(
        by_openssl(tmp_path),
        *("req", "-x509", "-newkey", *kind.split(), "-nodes", "-keyout", "root-key.pem", "-subj", "/O=demo.example"),
        *("-addext", "keyUsage=critical,keyCertSign", "-out", "root-cert.pem"),
    )
    issued_again()(tmp_path)
    assert main(["ca", "check", str(tmp_path)]) == 0
    assert f"root: 'O=demo.example', {words}, valid until" in capfd.readouterr().out


@pytest.mark.parametrize("by", [by_easyrsa, by_cfssl])
def test_the_directories_of_other_tools_are_good(by: Callable[[Path], Path], tmp_path: Path, capfd: Printed) -> None:
    assert main(["ca", "check", str(by(tmp_path))]) == 0
    assert "can be plugged in." in capfd.readouterr().out


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    """A running CA that read it would not even end on a signal."""
    by_openssl(tmp_path)
    (tmp_path / "ca-key.pem").unlink()
    os.mkfifo(tmp_path / "ca-key.pem")
    command = [sys.executable, "-m", "sds_agent", "ca", "check", str(tmp_path)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert checked.returncode == 2
    assert "ca-key.pem: it is a pipe, and not a file" in checked.stdout + checked.stderr


# --- what Envoy makes of it ---


def plugged(directory: Path, case: Case) -> Path:
    """The CA and the anchors of an odd chain."""
    above, roots = (b"".join(map(der.pem, each)) for each in (case.above, case.anchors))
    contents = {
        "ca-cert": der.pem(case.above[0]),
        "ca-key": der.key_pem(CA.key),
        "cert-chain": above,
        "root-cert": roots,
    }
    for name, content in contents.items():
        (directory / f"{name}.pem").write_bytes(content)
    return directory


def test_a_root_of_the_same_name_that_an_envoy_may_take_is_named(tmp_path: Path, capfd: Printed) -> None:
    namesake = der.certificate(der.entity("Demo Root"), serial=der.integer(0xABC))
    odd = case("", make_ca=instead(der.AUTHORITY_KEY_IDENTIFIER), beside=[namesake])
    assert main(["ca", "check", str(plugged(tmp_path, odd))]) == 2
    printed = capfd.readouterr().out
    assert "Envoy may choose the trust anchor 'CN=Demo Root' with serial number abc" in printed
    assert "remove that anchor, or issue what is below it anew with an AuthorityKeyIdentifier" in printed


def test_a_root_that_has_expired_beside_its_renewal_does_no_harm(tmp_path: Path, capfd: Printed) -> None:
    odd = case("", beside=[der.certificate(ROOT, not_after=ENDED)])
    assert main(["ca", "check", str(plugged(tmp_path, odd))]) == 0
    assert "it has expired: remove it" in capfd.readouterr().out


def test_the_check_quotes_a_uri_constraint_that_is_not_a_dns_name(tmp_path: Path, capfd: Printed) -> None:
    odd = case("", make_ca=plus(der.name_constraints([der.uri("demo_x")])))
    assert main(["ca", "check", str(plugged(tmp_path, odd))]) == 2
    assert "hold the URI 'demo_x', which must be a DNS name" in capfd.readouterr().out


def test_the_check_names_the_ca_that_demands_a_policy_no_leaf_has(tmp_path: Path, capfd: Printed) -> None:
    odd = case("", make_ca=plus(der.policies("1.2.3.4"), der.policy_constraints(0, critical=None)))
    assert main(["ca", "check", str(plugged(tmp_path, odd))]) == 2
    assert "'CN=Demo CA' demands a certificate policy" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("subject", "issuer"),
    [
        (der.common_name("Demo", der.PRINTABLE), der.common_name("Demo")),
        (der.common_name("DEMO"), der.common_name("demo")),
    ],
)
def test_a_root_that_is_spelled_otherwise_below_is_good_for_envoy_and_not_for_go(
    subject: bytes, issuer: bytes, tmp_path: Path, capfd: Printed
) -> None:
    odd = case("", root=der.Entity(subject, ROOT.key), make_ca=parts(issuer_name=issuer))
    assert main(["ca", "check", str(plugged(tmp_path, odd))]) == 0
    printed = capfd.readouterr().out
    assert "istiod itself would not take it as it is:" in printed
    assert "'CN=Demo CA': spells its issuer's name in another way than" in printed


@pytest.mark.parametrize(
    ("entries", "extensions", "words"),
    [
        (
            [der.revoked(77, der.extension(der.REASON_CODE, der.enumerated(8)))],
            [der.DELTA_CRL],
            "1 entry (a delta list",
        ),
        ([der.revoked(77), der.revoked(78)], [], "revokes 'CN=Demo CA'"),
    ],
)
def test_the_check_fails_a_revoked_ca_and_passes_one_that_a_list_removes(
    entries: list[bytes], extensions: list[str], words: str, tmp_path: Path, capfd: Printed
) -> None:
    directory = plugged(tmp_path, case("", make_ca=parts(serial=der.integer(77))))
    marks = [der.extension(kind, der.integer(5), critical=True) for kind in extensions]
    (directory / "ca-crl.pem").write_bytes(der.pem(der.revocation_list(ROOT, entries, marks), "X509 CRL"))
    assert main(["ca", "check", str(directory)]) == (0 if extensions else 2)
    assert words in capfd.readouterr().out
