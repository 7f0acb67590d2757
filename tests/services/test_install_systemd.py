"""`sds-agent install systemd`: the unit has to let the agent at everything that its configuration names."""

import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.configurations import MINIMAL, settings
from fakes.disks import late_full_disk

from sds_agent.authority import registry
from sds_agent.authority.istio.kind import JOIN_TOKEN
from sds_agent.cli.install_systemd import credentials, kept_from_others, out_of_reach, unreadable
from sds_agent.cli.main import main

Printed = pytest.CaptureFixture[str]
VAULT = (
    "type: vault, url: 'https://vault.example', role: web, ca_file: roots.pem, auth: {type: token, token_file: token}"
)


@pytest.fixture
def printed(tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch) -> "Units":
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = tmp_path / "sds-agent"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return Units(tmp_path, capsys)


class Units:
    """Prints the units for a configuration."""

    def __init__(self, folder: Path, capsys: Printed) -> None:
        self.folder = folder
        self._capsys = capsys

    def __call__(self, text: str, *options: str) -> list[str]:
        """The lines of the files, for MINIMAL and this text."""
        (self.folder / "sds-agent.yaml").write_text(f"{MINIMAL}{text}")
        assert main(["install", "systemd", str(self.folder / "sds-agent.yaml"), *options]) == 0
        return self._capsys.readouterr().out.splitlines()


def credentials_of(folder: Path, authorities: str) -> tuple[dict[str, Path], Path]:
    """Those of the service for a configuration with these authorities, and the token that all of them have."""
    token = folder / "token"
    token.write_text("secret")
    token.chmod(0o600)
    chosen = settings(
        folder, f"{MINIMAL}    authority: {authorities.partition(':')[0]}\nauthorities: {{{authorities}}}\n"
    )
    return dict(credentials(chosen, "sds-agent", root=os.geteuid())), token


@pytest.mark.parametrize(
    ("name", "part"), [("vault", "VAULT"), ("my_ca", "MY_CA"), ("my-ca", "MY_CA"), ("a-b_c-1", "A_B_C_1")]
)
def test_a_secret_of_root_comes_as_a_credential_whatever_its_authority_is_called(
    name: str, part: str, tmp_path: Path, capsys: Printed
) -> None:
    found, token = credentials_of(tmp_path, f"{name}: {{{VAULT}}}")
    assert found == {f"SDS_AGENT__AUTHORITIES__{part}__AUTH__TOKEN_FILE": token}
    changed = settings(
        tmp_path, (tmp_path / "sds-agent.yaml").read_text(), **dict.fromkeys(found, "/run/credentials/x/token")
    )
    files = registry.kind_of(changed.authorities[name]).files(changed.authorities[name])
    assert files["auth.token_file"] == Path("/run/credentials/x/token")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "other"), [("a__b", "c"), ("ca_", "c"), ("my-ca", "my_ca")])
def test_a_secret_that_no_variable_can_name_is_reported(name: str, other: str, tmp_path: Path, capsys: Printed) -> None:
    found, token = credentials_of(tmp_path, f"{name}: {{{VAULT}}}, {other}: {{type: embedded}}")
    assert found == {}
    said = f"sds-agent: authorities.{name}.auth.token_file: only root can read {token}, and no variable"
    assert said in capsys.readouterr().err


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user can enter, which pytest's is not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_what_root_alone_can_read_and_no_credential_replaces_is_named(public: Path) -> None:
    """`ca intermediate` makes such a key, and an editor such a file: the service would end at once, again and again."""
    plugged, written = public / "cacerts", public / "written"
    for directory, key in ((plugged, "ca-key.pem"), (written, "tls.key")):
        directory.mkdir(0o755)
        (directory / "roots.pem").touch(0o644)
        (directory / key).touch(0o600)
    (public / "key.pem").touch(0o600)
    chosen = settings(
        public,
        f"{MINIMAL}    authority: plugged\nauthorities:\n"
        "  plugged: {type: cacerts, directory: cacerts}\n"
        "  written: {type: files, directory: written}\n"
        "  pair: {type: files, certificate_file: cert.pem, key_file: key.pem, roots_file: written/roots.pem}\n"
        f"  vault: {{{VAULT}}}\n",
    )
    file = public / "sds-agent.yaml"
    me = os.geteuid()
    file.chmod(0o644)
    expected = {
        "authorities.plugged.directory": plugged / "ca-key.pem",
        "authorities.written.directory": written / "tls.key",
        "authorities.pair.key_file": public / "key.pem",
    }
    assert dict(kept_from_others(chosen, file, root=me)) == expected
    assert dict(credentials(chosen, "sds-agent", root=me)) == {}, "each renewal would have a certificate of another key"
    file.chmod(0o600)
    assert dict(kept_from_others(chosen, file, root=me)) == {"": file, **expected}
    public.chmod(0o700)
    assert set(dict(kept_from_others(chosen, file, root=me)).values()) == {public}


def test_nobody_is_advised_to_give_a_directory_away_that_holds_more_than_the_service_needs(public: Path) -> None:
    """As /root: its owner can read all that is in it, and sshd trusts no home that belongs to another user."""
    (public / "cacerts").mkdir(0o700)
    chosen = settings(
        public, f"{MINIMAL}    authority: plugged\nauthorities:\n  plugged: {{type: cacerts, directory: cacerts}}\n"
    )
    file, me = public / "sds-agent.yaml", os.geteuid()
    file.chmod(0o600)
    own = [
        f"only root can read {file}, and the service runs as a; let it read that (chown a {file})",
        f"authorities.plugged.directory: only root can read {public}/cacerts, and the service runs as a; "
        f"let it read that (chown a {public}/cacerts)",
    ]
    assert list(unreadable(chosen, file, "a", root=me)) == own
    public.chmod(0o700)
    above = [
        f"only root can enter {public}, and the service runs as a; "
        f"put {file} where that can read it, such as in /etc/sds-agent",
        f"authorities.plugged.directory: only root can enter {public}, and the service runs as a; "
        f"put {public}/cacerts where that can read it, such as in /etc/sds-agent",
    ]
    assert list(unreadable(chosen, file, "a", root=me)) == above
    assert not list(unreadable(chosen, file, "root", root=me))


def test_a_program_that_the_account_cannot_run_is_named(public: Path) -> None:
    """As pipx installs it for one user: systemd would start the service again and again, and find no program."""
    home, program = public / "home", public / "sds-agent"
    (home / "bin").mkdir(parents=True)
    installed = home / "bin" / "sds-agent"
    installed.touch(0o755)
    program.symlink_to(installed)
    assert not list(out_of_reach([installed, program], "nobody"))
    home.chmod(0o700)
    for path in (installed, program):
        (line,) = out_of_reach([Path("/bin/sh"), path], "nobody" if os.geteuid() == 0 else "not-made-yet")
        assert f"cannot enter {home}, and so cannot run {path}; install sds-agent where every user can run it" in line
    assert not list(out_of_reach([installed], pwd.getpwuid(os.geteuid()).pw_name))


def test_nothing_is_said_of_a_directory_whose_access_control_list_may_let_the_account_in(
    public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = public / "home"
    home.mkdir(0o700)
    user = "nobody" if os.geteuid() == 0 else "not-made-yet"
    assert list(out_of_reach([home / "sds-agent"], user))
    # not every file system has them
    monkeypatch.setattr(os, "listxattr", lambda path: ["system.posix_acl_access"] if path == home else [])
    assert not list(out_of_reach([home / "sds-agent"], user))


def test_what_lies_in_a_directory_that_systemd_makes_needs_no_line(printed: Units) -> None:
    """A line for a directory that is not there yet would keep the service from starting."""
    lines = printed("    output: /var/lib/sds-agent/certs/web\nsds: {socket: /var/run/sds-agent/web/sds.sock}\n")
    assert {"RuntimeDirectory=sds-agent/web", "StateDirectory=sds-agent"} <= set(lines)
    assert not any(line.startswith("ReadWritePaths=") for line in lines)


def test_what_lies_elsewhere_is_writable_and_has_to_be_made(printed: Units) -> None:
    place, there = printed.folder / "new certs", printed.folder
    text = f"    output: '{place}'\nadmin: {{socket: {there}/admin.sock}}\n"
    paths = [line for line in printed(text) if line.startswith("ReadWritePaths=")]
    assert paths == [f'ReadWritePaths="{place}"', f"ReadWritePaths={there}"]
    steps = printed(text, "--write", "--root", str(printed.folder / "root"))
    assert [line.strip() for line in steps if "install -d" in line] == [f"install -d -o sds-agent '{place}'"]


def test_a_directory_that_this_user_may_not_look_at_is_named(printed: Units) -> None:
    """As where a user builds a package; the name is too long for an answer, which a test by root can have."""
    place = printed.folder / ("x" * 300)
    steps = printed(f"    output: '{place}'\n", "--write", "--root", str(printed.folder / "root"))
    assert f"  # see that {place} is there and belongs to sds-agent (File name too long)" in steps


def test_a_unit_that_is_masked_is_replaced_and_not_what_it_leads_to(printed: Units, capsys: Printed) -> None:
    """Else --replace would write to /dev/null, and let nobody but root use it."""
    root, leads_to = printed.folder / "root", printed.folder / "null"
    unit = root / "etc/systemd/system/sds-agent.service"
    unit.parent.mkdir(parents=True)
    leads_to.touch(0o666)
    leads_to.chmod(0o666)
    unit.symlink_to(leads_to)
    (printed.folder / "a.yaml").write_text(MINIMAL)
    call = ["install", "systemd", str(printed.folder / "a.yaml"), "--write", "--root", str(root)]
    assert main(call) == 2
    assert f"{unit}: there already, with another content" in capsys.readouterr().err
    assert main([*call, "--replace"]) == 0
    assert (leads_to.stat().st_mode & 0o777, leads_to.read_bytes()) == (0o666, b"")
    assert (unit.is_symlink(), unit.stat().st_mode & 0o777) == (False, 0o644)
    assert "ExecStart=" in unit.read_text()


def test_where_one_file_cannot_be_written_none_is(printed: Units, capsys: Printed) -> None:
    """The help says so."""
    root = printed.folder / "root"
    (root / "etc/systemd").mkdir(parents=True)
    (root / "etc/systemd/system").touch()
    (printed.folder / "a.yaml").write_text(MINIMAL)
    assert main(["install", "systemd", str(printed.folder / "a.yaml"), "--write", "--root", str(root)]) == 2
    said = capsys.readouterr()
    assert (said.out, "etc/systemd/system/sds-agent.service" in said.err) == ("", True)
    assert [each for each in root.rglob("*") if each.is_file()] == [root / "etc/systemd/system"]


def test_a_package_brings_no_directory_that_others_cannot_enter(printed: Units) -> None:
    """It would be the /etc of the machine on which it is unpacked."""
    root, before = printed.folder / "root", os.umask(0o077)
    try:
        printed("", "--write", "--root", str(root))
    finally:
        os.umask(before)
    found = {str(each.relative_to(root)): each.stat().st_mode & 0o777 for each in root.rglob("*") if each.is_dir()}
    assert found == dict.fromkeys(("etc", "etc/systemd", "etc/systemd/system", "etc/sysusers.d"), 0o755)


def test_on_a_full_disk_nobody_is_told_to_be_root(printed: Units, capsys: Printed) -> None:
    root = printed.folder / "root"
    (printed.folder / "a.yaml").write_text(MINIMAL)
    with late_full_disk():
        assert main(["install", "systemd", str(printed.folder / "a.yaml"), "--write", "--root", str(root)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("No space left on device; make room on its disk")
    assert not [each for each in root.rglob("*") if each.is_file()]


@pytest.mark.usefixtures("printed")
def test_who_stops_reading_has_all_files_or_none(tmp_path: Path) -> None:
    """As `head -1` may: a unit without the one that it belongs to is not what was asked for."""
    root, (reads, writes) = tmp_path / "root", os.pipe()
    os.close(reads)
    (tmp_path / "a.yaml").write_text(MINIMAL)
    call = ["install", "systemd", str(tmp_path / "a.yaml"), "--socket-unit", "--write", "--root", str(root)]
    with os.fdopen(writes) as closed:
        command = [sys.executable, "-m", "sds_agent", *call]
        assert subprocess.run(command, stdout=closed, stderr=subprocess.DEVNULL, check=False).returncode != 0
    made = sorted(each.suffix for each in root.rglob("*") if each.is_file())
    assert made == [".conf", ".service", ".socket"]


def test_a_join_token_is_no_credential(public: Path) -> None:
    """It is removed once the machine has joined, and systemd would not start the service after the next boot."""
    token = public / "token"
    mesh = "mesh: {type: istio, address: 'ca.example:15012', ca_file: roots.pem, token_file: token}"
    chosen = settings(public, f"{MINIMAL}authorities: {{{mesh}}}\n")
    file, me = public / "sds-agent.yaml", os.geteuid()
    file.chmod(0o644)
    for text, is_credential in (("a.b.c", True), (f"{JOIN_TOKEN}x", False)):
        token.write_text(text)
        token.chmod(0o600)
        assert bool(dict(credentials(chosen, "sds-agent", root=me))) is is_credential
        kept = dict(kept_from_others(chosen, file, root=me))
        assert kept == ({} if is_credential else {"authorities.mesh.token_file": token})


def test_the_credentials_beside_those_of_authorities_are_in_the_unit(printed: Units) -> None:
    lines = printed("state_encryption: {credential: sds-agent-state}\n")
    assert "LoadCredentialEncrypted=sds-agent-state" in lines
    headers = printed.folder / "headers"
    headers.touch(0o600)
    chosen = settings(
        printed.folder, f"{MINIMAL}telemetry: {{otlp_endpoint: 'http://127.0.0.1:1', headers_file: headers}}\n"
    )
    assert dict(credentials(chosen, "sds-agent", root=os.geteuid())) == {"SDS_AGENT__TELEMETRY__HEADERS_FILE": headers}


def test_files_of_another_user_are_refused_before_the_service_cannot_write_them(
    printed: Units, capsys: Printed
) -> None:
    assert printed("    output: {directory: /srv/certs, owner: sds-agent}\n")
    (printed.folder / "other.yaml").write_text(f"{MINIMAL}    output: {{directory: /srv/certs, owner: nginx}}\n")
    assert main(["install", "systemd", str(printed.folder / "other.yaml")]) == 2
    assert "workloads[0].output.owner is nginx, and a service without capabilities" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--replace",), "add --write"),
        (("--root", "/tmp"), "add --write"),
        (("--user", "a b"), "'a b' is no name of an account"),
        (("--user", ""), "'' is no name of an account"),
        (("--user", "1000"), "'1000' is no name of an account"),
    ],
)
def test_a_call_that_says_less_than_it_seems_to_is_refused(
    options: tuple[str, ...], said: str, tmp_path: Path, capsys: Printed
) -> None:
    (tmp_path / "a.yaml").write_text(MINIMAL)
    assert main(["install", "systemd", str(tmp_path / "a.yaml"), *options]) == 2
    assert said in capsys.readouterr().err
