"""`sds-agent ca root`, `intermediate` and `check` as an operator runs them; nothing is left half done."""

import json
import os
import pty
import re
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from fakes import der
from fakes.ca_files import run
from fakes.hierarchy import make_ca
from fakes.odd_certificates import NOT_READ
from fakes.openssl import openssl

from sds_agent.cli.ca_keys import KEY_TYPES
from sds_agent.cli.main import main
from sds_agent.pki.certificates import read_pem, subject_alternative_uris, write_pem
from sds_agent.pki.keyfile import is_encrypted, read_private_key

PAGE = Path(__file__).parents[2] / "docs" / "hierarchy.md"
LAYOUT = {"ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"}
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def ca(*arguments: str | Path) -> int:
    return main(["ca", *map(str, arguments)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    assert ca("root", tmp_path / "root", "--trust-domain", "demo.example") == 0
    return tmp_path / "root"


def only(directory: Path, name: str) -> x509.Certificate:
    (certificate,) = read_pem((directory / name).read_bytes())
    return certificate


def test_root_and_intermediate_have_their_layout_and_keys_are_private(root: Path, tmp_path: Path) -> None:
    assert ca("intermediate", tmp_path / "one", "--root", root, "--name", "cluster1") == 0
    assert {each.name for each in root.iterdir()} == {"root-cert.pem", "root-key.pem"}
    assert {each.name for each in (tmp_path / "one").iterdir()} == LAYOUT
    for key in (root / "root-key.pem", tmp_path / "one" / "ca-key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    for directory in (root, tmp_path / "one"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        public = (file for file in directory.iterdir() if not file.name.endswith("-key.pem"))
        assert {stat.S_IMODE(file.stat().st_mode) for file in public} == {0o644}
    certificate = only(tmp_path / "one", "ca-cert.pem")
    assert certificate.subject.rfc4514_string() == "CN=cluster1,O=demo.example"
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    assert subject_alternative_uris(certificate) == ()
    assert openssl(tmp_path / "one", "verify", "-CAfile", "root-cert.pem", "ca-cert.pem") == "ca-cert.pem: OK\n"


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_every_kind_of_key_can_be_chosen(key_type: str, tmp_path: Path) -> None:
    made = ca("root", tmp_path / "r", "--trust-domain", "demo.example", "--key", key_type, "--lifetime", "90d")
    assert made == 0
    key = read_private_key((tmp_path / "r" / "root-key.pem").read_bytes())
    assert isinstance(key, rsa.RSAPrivateKey if key_type.startswith("rsa") else ec.EllipticCurvePrivateKey)
    assert str(key.key_size) in key_type
    certificate = only(tmp_path / "r", "root-cert.pem")
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 92
    assert ca("intermediate", tmp_path / "i", "--root", tmp_path / "r", "--name", "i", "--lifetime", "60d") == 0
    assert ca("check", tmp_path / "i") == 0


@pytest.mark.parametrize(("uri", "good"), [("spiffe://demo.example/web", True), ("spiffe://other.example/web", False)])
def test_a_constrained_intermediate_holds_its_leaves_to_the_trust_domain(
    uri: str, root: Path, tmp_path: Path, *, good: bool
) -> None:
    directory = tmp_path / "i"
    assert ca("intermediate", directory, "--root", root, "--name", "i", "--constrain", "demo.example") == 0
    found = only(directory, "ca-cert.pem").extensions.get_extension_for_class(x509.NameConstraints)
    assert found.critical
    assert found.value.permitted_subtrees == [x509.UniformResourceIdentifier("demo.example")]
    assert found.value.excluded_subtrees is None
    (directory / "leaf.ext").write_text(f"subjectAltName=critical,URI:{uri}\n")
    openssl(directory, "req", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", "k", "-subj", "/", "-out", "csr")
    signed = ("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-extfile", "leaf.ext")
    openssl(directory, "x509", "-req", "-in", "csr", *signed, "-out", "leaf.pem")
    verify = ["openssl", "verify", "-CAfile", "root-cert.pem", "-untrusted", "ca-cert.pem", "leaf.pem"]
    done = subprocess.run(verify, cwd=directory, capture_output=True, check=False)
    assert (done.returncode == 0) is good


def test_keys_are_encrypted_with_the_passphrase_from_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    secret = tmp_path / "passphrase"
    secret.write_text("correct horse battery\n")
    encrypt = ("--passphrase-file", secret)
    assert ca("root", tmp_path / "r", "--trust-domain", "demo.example", *encrypt) == 0
    assert is_encrypted((tmp_path / "r" / "root-key.pem").read_bytes())
    below = ("--root", tmp_path / "r", "--name", "i")
    assert ca("intermediate", tmp_path / "i", *below, "--root-passphrase-file", secret, *encrypt) == 0
    assert ca("check", tmp_path / "i") == 2
    assert ca("check", tmp_path / "i", *encrypt) == 0
    said = capfd.readouterr()
    assert "ca-key.pem: is encrypted and there is no passphrase" in said.out
    assert "istiod itself would not take it" in said.out
    wrong = tmp_path / "wrong"
    wrong.write_text("guess")
    assert ca("intermediate", tmp_path / "j", *below, "--root-passphrase-file", wrong) == 2
    said = capfd.readouterr()
    assert "the passphrase is wrong" in said.err
    assert "battery" not in said.out + said.err
    assert not (tmp_path / "j").exists()
    os.mkfifo(pipe := tmp_path / "pipe")  # as of --root-passphrase-file <(...)
    writer = threading.Thread(target=lambda: pipe.write_bytes(secret.read_bytes()))
    writer.start()
    assert ca("intermediate", tmp_path / "k", *below, "--root-passphrase-file", pipe) == 0
    writer.join()


def typed(*lines: str) -> tuple[int, str]:
    """Run `sds-agent ca` with the first line, on a terminal, and type the others; its status and what it showed."""
    program, terminal = pty.openpty()
    command = [sys.executable, "-m", "sds_agent", "ca", *lines[0].split()]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    ) as running:
        os.close(terminal)
        shown = b""
        for count, line in enumerate(lines[1:], start=1):
            while shown.count(b": ") < count:
                shown += os.read(program, 1024)
            os.write(program, f"{line}\n".encode(errors="surrogateescape"))
        with suppress(OSError):  # what a terminal raises once its other end is closed
            while more := os.read(program, 1024):
                shown += more
        code = running.wait(30)
    os.close(program)
    return code, shown.decode()


def test_a_passphrase_is_asked_for_twice_and_not_shown(tmp_path: Path) -> None:
    command = f"root {tmp_path / 'r'} --trust-domain demo.example --ask-passphrase"
    code, shown = typed(command, "battery staple", "battery stable")
    assert code == 2, shown
    assert "the two passphrases differ" in shown
    assert not (tmp_path / "r").exists()
    code, shown = typed(command, "battery staple", "battery staple")
    assert code == 0, shown
    assert "battery" not in shown
    pem = (tmp_path / "r" / "root-key.pem").read_bytes()
    assert read_private_key(pem, b"battery staple").key_size == 256
    code, shown = typed(f"intermediate {tmp_path / 'i'} --root {tmp_path / 'r'} --name i", "battery staple")
    assert code == 0, shown
    assert ca("check", tmp_path / "i") == 0
    code, shown = typed(command, "")
    assert code == 2
    assert "the passphrase is empty" in shown


def test_what_is_typed_in_another_encoding_is_reported_and_not_shown(tmp_path: Path) -> None:
    """A terminal that sends Latin-1 would end in a traceback instead of the way out."""
    code, shown = typed(f"root {tmp_path / 'r'} --trust-domain demo.example --ask-passphrase", "battery \udcfc")
    assert code == 2, shown
    assert "the passphrase is not in the terminal's encoding" in shown
    assert "battery" not in shown
    assert not (tmp_path / "r").exists()


def test_the_agent_explains_such_a_ca_and_does_not_start_on_a_bad_one(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ca("intermediate", tmp_path / "i", "--root", root, "--name", "i", "--constrain", "other.example") == 0
    config = tmp_path / "sds-agent.yaml"
    config.write_text(
        "trust_domain: demo.example\nstate_dir: state\nsds: {socket: sds.sock}\n"
        "authorities: {plugged: {type: cacerts, directory: i}}\n"
        "workloads: [{name: web, spiffe_id: spiffe://demo.example/web}]\n"
    )
    assert main(["check", str(config)]) == 3
    explained = capfd.readouterr()
    assert "is the CA in the directory" in explained.out
    assert "permit 'other.example'" in explained.err
    command = [sys.executable, "-m", "sds_agent", "run", str(config)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "authorities.plugged.directory" in done.stderr
    assert "permit 'other.example'" in done.stderr


def test_no_file_is_ever_overwritten(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.read_bytes() for file in root.iterdir()}
    assert ca("root", root, "--trust-domain", "other.example") == 2
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "cert-chain.pem").symlink_to("nowhere")
    assert ca("intermediate", tmp_path / "i", "--root", root, "--name", "i") == 2
    assert "choose another directory" in capfd.readouterr().err
    assert {file.name: file.read_bytes() for file in root.iterdir()} == before
    assert [file.name for file in (tmp_path / "i").iterdir()] == ["cert-chain.pem"]


@pytest.mark.parametrize("name", ["tls.crt", "tls.key", "ca.crt", "ca-crl.pem"])
def test_no_intermediate_is_made_beside_what_would_count_with_it(
    name: str, root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would be called ready, and the old `tls.crt` signs on, or the old CA's revocation list has it refused."""
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / name).write_text("old")
    assert ca("intermediate", tmp_path / "i", "--root", root, "--name", "i") == 2
    assert f"holds {name} already" in capfd.readouterr().err
    assert [file.name for file in (tmp_path / "i").iterdir()] == [name]


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, umask: int) -> None:
    """With 077 no other program could read the root's certificate, with 000 every user could replace the directory."""
    before = os.umask(umask)
    try:
        assert ca("root", tmp_path / "new" / "root", "--trust-domain", "demo.example") == 0
    finally:
        os.umask(before)
    made = ("new", "new/root", "new/root/root-cert.pem", "new/root/root-key.pem")
    assert [stat.S_IMODE((tmp_path / each).stat().st_mode) for each in made] == [0o755, 0o700, 0o644, 0o600]


def test_what_was_made_is_on_the_disk_when_the_command_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A root is made once, and who carries its medium away must have all of it."""
    seen, sync = [], os.fsync

    def look(descriptor: int) -> None:
        sync(descriptor)
        seen.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    monkeypatch.setattr(os, "fsync", look)
    assert ca("root", tmp_path / "root", "--trust-domain", "demo.example") == 0
    assert seen[:3] == ["root-key.pem", "root-cert.pem", "root"]


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_no_half_directory(root: Path, tmp_path: Path, *, there: bool) -> None:
    """A limit on the size of files stands for it: the keys fit, the chain does not."""
    directory = tmp_path / "new" / "i"
    if there:
        directory.mkdir(parents=True)
        (directory / "notes").touch()
    command = f"ulimit -f 1; exec {sys.executable} -B -m sds_agent ca intermediate {directory} --root {root} --name i"
    done = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "nothing was left behind" in done.stderr
    assert [file.name for file in directory.iterdir()] == ["notes"] if there else not directory.parent.exists()


AS_NOBODY = """
import os, sys
from sds_agent.cli.main import main
warm = sys.argv[1]  # what later imports need: another user may not read root's Python
main(["ca", "root", f"{warm}/r", "--trust-domain", "demo.example"])
main(["ca", "intermediate", f"{warm}/i", "--root", f"{warm}/r", "--name", "i"])
main(["ca", "check", f"{warm}/i"])
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "command",
    [
        ("root", "closed/r", "--trust-domain", "demo.example"),
        ("intermediate", "i", "--root", "closed/r", "--name", "i"),
        ("check", "closed/i"),
        ("bundle", "closed/i"),
        ("check", ".", "--passphrase-file", "closed/passphrase"),
    ],
)
def test_a_place_that_may_not_be_read_is_reported(command: tuple[str, ...], tmp_path: Path) -> None:
    """As for an operator who forgot sudo."""
    (tmp_path / "closed").mkdir(mode=0o000)
    call = [sys.executable, "-B", "-c", AS_NOBODY, str(tmp_path / "warm"), "ca", *command]
    done = subprocess.run(call, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Permission denied" in done.stderr


BEFORE_A_FILE = """
import os, signal, sys
left, directory = int(sys.argv[1]), sys.argv[2]
def hook(event, arguments):
    global left
    if event == "open" and str(arguments[0]).startswith(directory) and arguments[2] & os.O_CREAT:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""
WITHIN_A_FILE = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which ends the process in the middle of a write, with no last word
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
"""
THEN_RUN = "from sds_agent.cli.main import main\nsys.exit(main(sys.argv[3:]))\n"


KILLED = [
    *(("root", BEFORE_A_FILE, files) for files in range(2)),
    *(("root", WITHIN_A_FILE, size) for size in (0, 200, 500)),
    *(("intermediate", BEFORE_A_FILE, files) for files in range(4)),
    *(("intermediate", WITHIN_A_FILE, size) for size in (0, 200, 500, 900)),
]


@pytest.mark.parametrize(("command", "how", "amount"), KILLED)
def test_a_command_that_is_killed_leaves_nothing_that_passes_for_whole(
    command: str, how: str, amount: int, root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "new"
    options = {"root": ["--trust-domain", "demo.example"], "intermediate": ["--root", str(root), "--name", "i"]}[
        command
    ]
    call = ["ca", command, str(directory), *options]
    killed = subprocess.run(
        [sys.executable, "-B", "-c", how + THEN_RUN, str(amount), str(directory), *call],
        env=ENVIRONMENT,
        capture_output=True,
        check=False,
    )
    assert killed.returncode < 0, killed.stderr
    assert use(command, directory, tmp_path) == 2
    assert all(stat.S_IMODE(key.stat().st_mode) == 0o600 for key in directory.glob("*key.pem"))
    left = {file: file.read_bytes() for file in directory.glob("*")}
    assert main(call) == (2 if left else 0)
    assert {file: file.read_bytes() for file in left} == left
    assert "Traceback" not in capfd.readouterr().err


def use(command: str, directory: Path, tmp_path: Path) -> int:
    """What becomes of who takes what is there for whole."""
    if command == "root":
        return ca("intermediate", tmp_path / "below", "--root", directory, "--name", "below")
    return ca("check", directory)


def test_a_certificate_beside_the_root_that_cannot_be_used_is_no_hindrance(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    certificate, odd = root / "root-cert.pem", der.pem(NOT_READ["critical FALSE"])
    certificate.write_bytes(odd + certificate.read_bytes())
    assert ca("intermediate", tmp_path / "one", "--root", root, "--name", "one") == 0
    assert odd not in (tmp_path / "one" / "root-cert.pem").read_bytes()
    certificate.write_bytes(odd + write_pem([make_ca("other").certificate]))
    assert ca("intermediate", tmp_path / "two", "--root", root, "--name", "two") == 2
    assert "is not the key of a certificate in" in (reported := capfd.readouterr().err)
    assert "(PEM block 1 is not a well-formed X.509 certificate" in reported


def test_a_root_that_is_none_is_refused(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    below = ("--root", tmp_path / "one", "--name", "two")
    assert ca("intermediate", tmp_path / "one", "--root", root, "--name", "one") == 0
    for name, target in (("root-key.pem", "ca-key.pem"), ("root-cert.pem", "ca-cert.pem")):
        (tmp_path / "one" / name).unlink(missing_ok=True)
        (tmp_path / "one" / name).symlink_to(target)
    assert ca("intermediate", tmp_path / "two", *below) == 2
    assert "is not self-signed" in capfd.readouterr().err
    (tmp_path / "one" / "root-key.pem").unlink()
    (tmp_path / "one" / "root-key.pem").symlink_to(root / "root-key.pem")
    assert ca("intermediate", tmp_path / "two", *below) == 2
    assert "is not the key of" in capfd.readouterr().err
    (tmp_path / "one" / "ca-cert.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    assert ca("intermediate", tmp_path / "two", *below) == 2
    assert "cut off" in capfd.readouterr().err
    (tmp_path / "one" / "ca-cert.pem").write_bytes(only(root, "root-cert.pem").public_bytes(Encoding.DER))
    assert ca("intermediate", tmp_path / "two", *below) == 2
    assert "root-cert.pem: is in DER; convert it" in capfd.readouterr().err
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("name", ["root-cert.pem", "root-key.pem"])
def test_a_file_of_the_root_that_is_no_cas_is_reported_without_reading_it(
    name: str, root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An image of the medium in the place of the key would fill the memory."""
    os.truncate(root / name, 1 << 40)
    assert ca("intermediate", tmp_path / "i", "--root", root, "--name", "i") == 2
    assert f"the root cannot be read: {root / name} has more than" in capfd.readouterr().err


def test_an_oddity_of_a_foreign_root_is_no_warning_of_ours(tmp_path: Path) -> None:
    """cfssl lets a country have a whole name, and cryptography would say so with the line of our code."""
    request = {"CN": "root", "key": {"algo": "ecdsa", "size": 256}, "names": [{"C": "Germany"}]}
    (tmp_path / "request.json").write_text(json.dumps(request))
    made = json.loads(run(tmp_path, "cfssl", "gencert", "-initca", "request.json"))
    (tmp_path / "root-cert.pem").write_text(made["cert"])
    (tmp_path / "root-key.pem").write_text(made["key"])
    call = [sys.executable, "-m", "sds_agent", "ca", "intermediate", "i", "--root", ".", "--name", "i"]
    done = subprocess.run(call, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ready to be plugged in" in done.stdout


USELESS = {
    "it allows no CA below it": ("-addext basicConstraints=critical,CA:TRUE,pathlen:0", "at most 0 CAs below it"),
    "it may not sign": ("-addext keyUsage=critical,digitalSignature", "its KeyUsage lacks keyCertSign"),
    "its URIs are others": ("-addext nameConstraints=critical,permitted;URI:other.example", "permit 'other.example'"),
    "its extension is unknown": ("-addext 1.2.3.4=critical,ASN1:NULL", "the critical extension 1.2.3.4"),
    "SHA-1": ("-sha1", "'O=theirs' is signed with SHA1"),
}


@pytest.mark.parametrize(("options", "words"), USELESS.values(), ids=USELESS)
def test_no_intermediate_is_called_ready_that_no_peer_would_trust(
    options: str, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A cluster would be moved to a CA whose every certificate is refused."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    made = ("-subj", "/O=theirs", "-keyout", "root-key.pem", "-out", "root-cert.pem")
    openssl(theirs, "req", "-x509", "-newkey", "rsa:2048", "-nodes", *made, *options.split())
    named = ("--name", "i", "--lifetime", "9d", "--constrain", "demo.example")
    assert ca("intermediate", tmp_path / "i", "--root", theirs, *named) == 2
    reported = capfd.readouterr()
    assert words in reported.err
    assert reported.out == ""
    assert not (tmp_path / "i").exists()


def test_a_root_that_the_printed_command_signed_anew_can_be_used(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A peer that trusts the old certificate trusts what is below the new one: name and key are the same."""
    named = ("--root", tmp_path, "--name", "i", "--lifetime", "9d")
    made = ("-subj", "/O=theirs", "-keyout", "root-key.pem", "-out", "root-cert.pem")
    openssl(tmp_path, "req", "-x509", "-newkey", "rsa:2048", "-nodes", *made, "-sha1")
    assert ca("intermediate", tmp_path / "i", *named) == 2
    command = capfd.readouterr().err.split("`")[1].split()
    (tmp_path / "old.pem").write_bytes((tmp_path / "root-cert.pem").read_bytes())
    (tmp_path / "root-cert.pem").write_text(openssl(tmp_path, *command[1:]))
    assert ca("intermediate", tmp_path / "i", *named) == 0
    assert openssl(tmp_path, "verify", "-CAfile", "old.pem", "i/ca-cert.pem") == "i/ca-cert.pem: OK\n"


def test_how_a_root_signed_itself_by_rsa_pss_does_not_matter(tmp_path: Path) -> None:
    """No verifier checks an anchor's own signature: openssl's default, which Envoy refuses elsewhere, is good."""
    made = ("-subj", "/O=theirs", "-keyout", "root-key.pem", "-out", "root-cert.pem")
    pss = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:max")
    openssl(tmp_path, "req", "-x509", "-newkey", "rsa:2048", "-nodes", *made, *pss)
    assert ca("intermediate", tmp_path / "i", "--root", tmp_path, "--name", "i", "--lifetime", "9d") == 0
    assert ca("check", tmp_path / "i") == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("root", "x", "--trust-domain", "Not A Domain"), "--trust-domain"),
        (("root", "x", "--trust-domain", "demo.example", "--lifetime", "10"), "--lifetime"),
        (("root", "x", "--trust-domain", "demo.example", "--lifetime", "999999999d24h"), "from 1s to 10950d"),
        (("root", "x", "--trust-domain", "demo.example", "--ask-passphrase"), "there is no terminal"),
        (("root", "x", "--trust-domain", "demo.example", "--passphrase-file", "nowhere"), "passphrase"),
        (("root", 300 * "x", "--trust-domain", "demo.example"), "File name too long; nothing was left behind"),
        (("intermediate", "x", "--root", "nowhere", "--name", "i"), "the root cannot be read"),
        (("intermediate", "x", "--root", "root", "--name", ""), "needs a name"),
        (("intermediate", "x", "--root", "root", "--name", "i", "--lifetime", "4000d"), "shorter lifetime"),
        (("intermediate", "x", "--root", "root", "--name", "i", "--constrain", "spiffe://x/y"), "--constrain"),
        (("intermediate", "x", "--root", "root", "--name", "i", "--constrain", "10.0.0.1"), "an IP address is not"),
        (("intermediate", "x", "--root", "root", "--name", "i", "--constrain", "a..b"), "an empty label"),
        (("intermediate", "x", "--root", "root", "--name", "i", "--constrain", "demo_x"), "an underscore"),
        (("intermediate", "x", "--root", "root", "--name", "i", "--constrain", "12345"), "a number as its last label"),
        (("intermediate", "x", "--root", "root", "--name", "i", "--constrain", "demo.example."), "an empty label"),
        (("intermediate", "x", "--root", "root", "--name", "i", "--constrain", ".example"), "an empty label"),
        (("check", "nowhere"), "there is no nowhere; name the directory of a CA, or a configuration"),
        (("bundle", "nowhere"), "there is no nowhere; name the directory of a CA, or a configuration"),
        (("check", "/dev/null"), "/dev/null: the file is empty"),
        (("bundle", "/dev/null"), "/dev/null: the file is empty"),
    ],
)
def test_a_wrong_call_is_reported_and_writes_nothing(
    arguments: tuple[str, ...], words: str, root: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "sds_agent", "ca", *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert root.exists()
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "x").exists()


def test_check_says_everything_that_is_wrong_and_shows_no_key(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "i"
    assert ca("intermediate", directory, "--root", root, "--name", "i") == 0
    (directory / "ca-key.pem").write_bytes((root / "root-key.pem").read_bytes())
    (directory / "cert-chain.pem").write_text("")
    capfd.readouterr()
    assert ca("check", directory) == 2
    reported = capfd.readouterr().out
    assert "cannot be plugged in" in reported
    assert "the key is not that of" in reported
    assert "cert-chain.pem: holds no certificate" in reported
    assert not any(line in reported for line in (root / "root-key.pem").read_text().splitlines())


def test_the_openssl_steps_of_the_page_make_what_the_commands_make(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (steps,) = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    done = subprocess.run(["bash", "-euc", steps], cwd=theirs, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ca("check", theirs) == 0
    assert "can be plugged in" in capfd.readouterr().out
    assert ca("root", tmp_path / "r", "--trust-domain", "demo.example") == 0
    below = ("--root", tmp_path / "r", "--name", "cluster1", "--constrain", "demo.example")
    assert ca("intermediate", tmp_path / "i", *below) == 0
    for name in ("ca-cert.pem", "root-cert.pem"):
        assert shape(only(theirs, name)) == shape(only(tmp_path / "i", name))


def shape(certificate: x509.Certificate) -> tuple[str, set[tuple[str, bool]]]:
    """The subject, and which extensions there are, critical or not."""
    extensions = {(each.oid.dotted_string, each.critical) for each in certificate.extensions}
    return certificate.subject.rfc4514_string(), extensions
