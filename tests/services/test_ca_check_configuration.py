"""`sds-agent ca check` on the CA server's configuration: the file, and what signs for its trust domain."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cryptography import x509
from fakes.ca_servers import TokenIssuer, fresh, plug
from fakes.hierarchy import make_ca

from sds_agent.cli.main import main

Printed = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, capsys: Printed) -> Path:
    """A root and an intermediate that signs for demo.example alone, with an encrypted key."""
    (tmp_path / "passphrase").write_text("correct horse\n")
    assert main(["ca", "root", str(tmp_path / "root"), "--trust-domain", "demo.example"]) == 0
    above = ["--root", str(tmp_path / "root"), "--name", "one", "--constrain", "demo.example"]
    key = ["--passphrase-file", str(tmp_path / "passphrase")]
    assert main(["ca", "intermediate", str(tmp_path / "one"), *above, *key]) == 0
    capsys.readouterr()
    return tmp_path


def ca(folder: Path, signer: str, trust_domain: str = "demo.example") -> str:
    path = folder / "ca.yaml"
    path.write_text(
        f"trust_domain: {trust_domain}\nlisten: 127.0.0.1:0\nsigner: {{{signer}}}\ncallers: {{join_tokens: tokens}}\n"
    )
    return str(path)


@pytest.mark.parametrize("option", [[], ["--config"]])
def test_what_the_configuration_names_is_checked_with_its_passphrase(
    option: list[str], folder: Path, capsys: Printed
) -> None:
    path = ca(folder, "cacerts: one, passphrase_file: passphrase")
    assert main(["ca", "check", *option, path]) == 0
    assert capsys.readouterr().out.startswith(f"{path} is good.\n{folder}/one can be plugged in.\n")


def test_a_signer_for_another_trust_domain_is_found_before_the_server_starts(folder: Path, capsys: Printed) -> None:
    path = ca(folder, "cacerts: one, passphrase_file: passphrase", trust_domain="other.example")
    assert main(["ca", "check", path]) == 2
    said = capsys.readouterr().out
    assert f"{folder}/one cannot be plugged in:" in said
    assert "other.example" in said


@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_system_without_proc_is_refused_in_words(
    command: str, folder: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the server ends with a traceback, as OpenSSL finds no certificate."""
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, *how, **by: path != "/proc/self/fd" and may(path, *how, **by))
    assert main(["ca", command, ca(folder, "self_signed: own")]) == 2
    said = "by /proc/self/fd, which is not there; mount proc at /proc, in a container or a chroot too\n"
    assert capsys.readouterr().err.endswith(said)
    assert not (folder / "own").exists()


def test_a_wrong_key_of_the_file_is_named_with_its_line(folder: Path, capsys: Printed) -> None:
    assert main(["ca", "check", ca(folder, "cacert: one")]) == 2
    assert "ca.yaml:3: signer.cacert is not a known key" in capsys.readouterr().err


def test_a_self_signed_ca_needs_a_directory_that_no_other_user_may_change(folder: Path, capsys: Printed) -> None:
    path = ca(folder, "self_signed: own")
    assert main(["ca", "check", path]) == 0
    assert f"a root of its own in {folder}/own" in capsys.readouterr().out
    assert not (folder / "own").exists(), "a check makes nothing"
    (folder / "own").mkdir()
    (folder / "own").chmod(0o777)
    assert main(["ca", "check", path]) == 2
    assert f"signer.self_signed: every user may write to {folder}/own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("callers", "content", "words"),
    [
        ("jwt: [{issuer: i, audience: a, jwks: named}]", None, "callers.jwt: the key set"),
        ("jwt: [{issuer: i, audience: a, jwks: named}]", "[]", "it is not a JSON Web Key Set"),
        ("join_tokens: tokens, deny_file: named", None, "callers.deny_file:"),
        ("join_tokens: tokens, deny_file: named", "spiffe://demo.example/vm/db1", "its last line has no end"),
        ("join_tokens: tokens, deny_file: named", "spiffe://other.example/vm/db1\n", "line 1:"),
    ],
)
def test_a_file_with_which_no_server_would_start_is_found_before(
    folder: Path, capsys: Printed, callers: str, content: str | None, words: str
) -> None:
    """Who stops a server that runs because its new configuration is called good has none then."""
    path = Path(ca(folder, "self_signed: own"))
    path.write_text(path.read_text().replace("join_tokens: tokens", callers))
    if content is not None:
        (folder / "named").write_text(content)
    assert main(["ca", "check", str(path)]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert str(folder / "named") in said.err
    assert "is good" not in said.out


def test_a_signer_with_which_no_client_would_reach_the_server_is_found_before(folder: Path, capsys: Printed) -> None:
    root, now = fresh("root"), datetime.now(UTC).replace(microsecond=0)
    constraints = x509.NameConstraints([x509.DNSName("corp.example")], None)
    begin, end = now - timedelta(hours=1), now + timedelta(hours=9)
    narrow = make_ca("narrow", root, constraints=constraints, not_before=begin, not_after=end)
    plug(folder / "narrow", narrow, [narrow], [root])
    path = Path(ca(folder, "cacerts: narrow"))
    assert main(["ca", "check", str(path)]) == 2
    assert "server_names: cannot all be used: the name constraints of 'CN=narrow' permit" in capsys.readouterr().out
    path.write_text(path.read_text() + "server_names: [ca.corp.example]\n")
    assert main(["ca", "check", str(path)]) == 0
    assert main(["ca", "check", str(folder / "narrow")]) == 0, "a directory alone is for agents too"


def test_a_url_is_asked_by_the_server_alone(folder: Path, capsys: Printed) -> None:
    """Which starts before its issuer too."""
    path = Path(ca(folder, "self_signed: own"))
    jwt = 'jwt: [{issuer: i, audience: a, jwks: "https://localhost:1/keys"}]'
    path.write_text(path.read_text().replace("join_tokens: tokens", jwt))
    assert main(["ca", "check", str(path)]) == 0
    assert "is good" in capsys.readouterr().out


def test_root_checks_the_directory_of_a_service_as_the_service(folder: Path, capsys: Printed) -> None:
    """It would call a directory unusable that only the server's own account may write to, as it should be."""
    with state_of_a_service() as state:
        assert main(["ca", "check", ca(folder, f"self_signed: {state}/root")]) == 0
        whose = " where it runs as uid 4711, to whom that belongs" if os.geteuid() == 0 else ""
        assert f"can use that directory{whose}.\n" in capsys.readouterr().out
        state.chmod(0o500)
        assert main(["ca", "check", ca(folder, f"self_signed: {state}/root")]) == 2
        assert os.geteuid() != 4711


@pytest.mark.parametrize("name", ["setgroups", "setegid", "seteuid"])
def test_root_that_may_not_act_as_the_service_checks_as_itself(
    name: str, folder: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container without the capabilities for it the server is root too, and that is what counts there."""

    def refuse(_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    before = os.getgroups(), os.getegid(), os.geteuid()
    with state_of_a_service() as state:
        monkeypatch.setattr(os, name, refuse)
        assert main(["ca", "check", ca(folder, f"self_signed: {state}/root")]) == (2 if os.geteuid() == 0 else 0)
        assert (f"{state} belongs to uid 4711" in capsys.readouterr().err) is (os.geteuid() == 0)
    assert (os.getgroups(), os.getegid(), os.geteuid()) == before


def test_root_checks_what_the_service_may_without_groups_of_its_own(folder: Path, capsys: Printed) -> None:
    """With root's every directory that only root's group may enter would seem to be open to the service."""
    with state_of_a_service() as state, of_group(os.getegid()):
        state.parent.chmod(0o750)
        assert main(["ca", "check", ca(folder, f"self_signed: {state}/root")]) == (2 if os.geteuid() == 0 else 0)
        assert ("Permission denied" in capsys.readouterr().err) is (os.geteuid() == 0)


@pytest.mark.parametrize(
    ("callers", "content"),
    [
        ("jwt: [{issuer: i, audience: a, jwks: FILE}]", TokenIssuer().key_set()),
        ("join_tokens: tokens, deny_file: FILE", b"# nobody\n"),
    ],
    ids=["key set", "deny list"],
)
def test_root_checks_that_the_service_may_read_its_files(
    callers: str, content: bytes, folder: Path, capsys: Printed
) -> None:
    with state_of_a_service() as state:
        given = state.parent / "given"
        given.write_bytes(content)
        path = Path(ca(folder, f"self_signed: {state}/root"))
        path.write_text(path.read_text().replace("join_tokens: tokens", callers.replace("FILE", str(given))))
        given.chmod(0o644)
        assert main(["ca", "check", str(path)]) == 0
        given.chmod(0o600)
        assert main(["ca", "check", str(path)]) == (2 if os.geteuid() == 0 else 0)
        assert (f"{given} cannot be read as uid 4711" in capsys.readouterr().err) is (os.geteuid() == 0)


@contextmanager
def state_of_a_service() -> Iterator[Path]:
    """An empty directory, of another user where root runs the test, the only one who can give it away."""
    with TemporaryDirectory() as name:  # unlike the test's own folder it may be open to another user
        state = Path(name).resolve() / "state"
        state.mkdir(0o700)
        state.parent.chmod(0o755)
        if os.geteuid() == 0:
            os.chown(state, 4711, 4711)
        yield state


@contextmanager
def of_group(group: int) -> Iterator[None]:
    """In that group beside the process's own, as after a login, where root runs the test."""
    if os.geteuid() != 0:
        yield
        return
    before = os.getgroups()
    os.setgroups([group])
    try:
        yield
    finally:
        os.setgroups(before)


def test_a_path_that_is_not_there_is_named(folder: Path, capsys: Printed) -> None:
    assert main(["ca", "check", str(folder / "none")]) == 2
    assert f"there is no {folder}/none" in capsys.readouterr().err
