"""`sds-agent ca bundle`: the roots of every CA that signs here, and never a key."""

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from fakes.configurations import MINIMAL
from fakes.disks import late_full_disk
from fakes.hierarchy import NOW, make_ca

from sds_agent.cli.main import main
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.signing.bundle import read_roots

KEY = "PRIVATE KEY"
UPSTREAM = "{type: istio, address: 'ca.example:15012', ca_file: roots.pem, token_file: token}"
Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """A root, an intermediate below it, and the state of an agent with an embedded CA, each as the commands make it."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        assert main(["ca", "root", str(folder / "root"), "--trust-domain", "demo.example"]) == 0
        below = ["--root", str(folder / "root"), "--name", "one"]
        assert main(["ca", "intermediate", str(folder / "one"), *below]) == 0
        (folder / "agent.yaml").write_text(f"{MINIMAL}state_dir: state\nauthorities: {{local: {{type: embedded}}}}\n")
        assert main(["issue", str(folder / "agent.yaml"), "--output", "-"]) == 0
        (folder / "self.yaml").write_text(ca("self_signed: state/authorities/local"))
        (folder / "plugged.yaml").write_text(ca("cacerts: one"))
        (folder / "both.yaml").write_text(
            f"{MINIMAL}    authority: [a, local, c]\nstate_dir: state\nauthorities:\n"
            "  a: {type: cacerts, directory: one}\n  local: {type: embedded}\n  c: {type: cacerts, directory: one}\n"
        )
        yield folder


def ca(signer: str) -> str:
    return f"trust_domain: demo.example\nlisten: 127.0.0.1:0\nsigner: {{{signer}}}\ncallers: {{join_tokens: tokens}}\n"


def embedded(made: Path) -> bytes:
    stored = (made / "state/authorities/local/roots.pem").read_bytes()
    assert KEY.encode() in stored, "the reason for the command"
    return write_pem(read_pem(stored))


@pytest.mark.parametrize("named", ["agent.yaml", "self.yaml", "state/authorities/local"])
def test_the_roots_leave_and_the_key_beside_them_does_not(named: str, made: Path, capsys: Printed) -> None:
    assert main(["ca", "bundle", str(made / named)]) == 0
    said = capsys.readouterr()
    assert said.out.encode() == embedded(made)
    assert KEY not in said.out + said.err


@pytest.mark.parametrize("named", ["root", "one", "plugged.yaml"])
def test_a_plugged_in_directory_and_a_root_have_theirs_in_a_file(named: str, made: Path, capsys: Printed) -> None:
    assert main(["ca", "bundle", str(made / named)]) == 0
    assert capsys.readouterr().out == (made / "root/root-cert.pem").read_text()


@pytest.mark.parametrize("option", [[], ["--config"]])
@pytest.mark.parametrize("named", ["agent.yaml", "plugged.yaml"])
def test_a_configuration_may_come_by_a_pipe(
    named: str, option: list[str], made: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `<(sops -d ca.yaml)` of the shell makes one, which gives its content once."""
    monkeypatch.chdir(made)
    reader, writer = os.pipe()
    os.write(writer, (made / named).read_bytes())
    os.close(writer)
    try:
        assert main(["ca", "bundle", *option, f"/dev/fd/{reader}"]) == 0
    finally:
        os.close(reader)
    expected = embedded(made) if named == "agent.yaml" else (made / "root/root-cert.pem").read_bytes()
    assert capsys.readouterr().out.encode() == expected


def test_an_agent_with_several_cas_gives_each_root_once(made: Path, capsys: Printed) -> None:
    assert main(["ca", "bundle", "--config", str(made / "both.yaml")]) == 0
    assert capsys.readouterr().out.encode() == (made / "root/root-cert.pem").read_bytes() + embedded(made)


def test_the_agent_of_the_working_directory_is_meant_without_a_name(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    (tmp_path / "sds-agent.yaml").write_text(f"{MINIMAL}state_dir: {made}/state\n")
    monkeypatch.chdir(tmp_path)
    assert main(["ca", "bundle"]) == 0
    assert capsys.readouterr().out.encode() == embedded(made)


def test_a_file_that_others_may_read_is_written_whole(made: Path, tmp_path: Path, capsys: Printed) -> None:
    target = tmp_path / "roots.pem"
    target.write_text("old")
    target.chmod(0o600)
    assert main(["ca", "bundle", str(made / "agent.yaml"), "--output", str(target)]) == 0
    assert (capsys.readouterr().out, target.read_bytes()) == ("", embedded(made))
    assert target.stat().st_mode & 0o777 == 0o644
    assert [each.name for each in tmp_path.iterdir()] == ["roots.pem"]


def test_a_full_disk_is_to_be_emptied_and_no_other_file_to_be_named(
    made: Path, tmp_path: Path, capsys: Printed
) -> None:
    place = tmp_path / "roots.pem"
    with late_full_disk():
        assert main(["ca", "bundle", str(made / "root"), "--output", str(place)]) == 2
    said = f"sds-agent: --output: cannot write {place}: No space left on device; make room on its disk\n"
    assert capsys.readouterr().err == said
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_looked_at_is_refused_in_words(made: Path, capsys: Printed) -> None:
    """As in a directory of another user's; a name that is too long is one for root too."""
    place = made / ("x" * 300) / "roots.pem"
    assert main(["ca", "bundle", str(made / "root"), "--output", str(place)]) == 2
    assert f"--output: cannot write {place}: File name too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("named", "own"),
    [
        ("agent.yaml", "state/authorities/local/roots.pem"),
        ("plugged.yaml", "one/ca-key.pem"),
        ("root", "root/root-key.pem"),
    ],
)
def test_the_cas_own_file_is_not_written_over(named: str, own: str, made: Path, capsys: Printed) -> None:
    """It has the only copy of the key."""
    before = (made / own).read_bytes()
    assert KEY.encode() in before
    assert main(["ca", "bundle", str(made / named), "--output", str(made / own)]) == 2
    assert "is the CA's own file; name another" in capsys.readouterr().err
    assert (made / own).read_bytes() == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{MINIMAL}state_dir: empty\n", "empty/authorities/local holds no CA's roots; name one with"),
        (f"{MINIMAL}state_dir: damaged\n", "roots.pem has no root that is valid: there is no certificate in it"),
        (
            f"{MINIMAL}authorities: {{up: {UPSTREAM}}}\n",
            "every CA of this agent is elsewhere; `sds-agent secret ROOTCA",
        ),
        ("trust_domain: demo.example\nsigner: {}\n", "signer names no directory"),
    ],
)
def test_what_has_no_roots_is_refused_in_words(text: str, words: str, tmp_path: Path, capsys: Printed) -> None:
    (tmp_path / "damaged/authorities/local").mkdir(parents=True)
    (tmp_path / "damaged/authorities/local/roots.pem").write_text(f"-----BEGIN {KEY}-----\nAAAA\n-----END {KEY}-----\n")
    (tmp_path / "file.yaml").write_text(text)
    assert main(["ca", "bundle", str(tmp_path / "file.yaml")]) == 2
    assert words in capsys.readouterr().err


def test_an_expired_root_is_left_out_and_named(tmp_path: Path) -> None:
    """For Envoy's statistics an expired one is an alarm, and it vouches for no certificate."""
    old, new = make_ca("old", not_after=NOW - timedelta(days=1)), make_ca("new")
    (tmp_path / "roots.pem").write_bytes(write_pem([old.certificate, new.certificate]))
    read = read_roots(tmp_path, NOW)
    assert read.certificates == (new.certificate,)
    (cause,) = read.left_out
    assert "old" in cause
    assert "expired at" in cause
