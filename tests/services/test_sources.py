"""Roots, tokens and a CA's directory: the log names who could change them, and they are read all the same."""

import os
import socket
from pathlib import Path

import pytest
from fakes.configurations import MINIMAL, settings
from fakes.events import recorded

from sds_agent import preflight
from sds_agent.clock import SystemClock
from sds_agent.directories import Role, Step
from sds_agent.sources import MOST_FILES, find_readable, judge, warn, who_could_change

US, OTHER = 1000, 1001
TARGET = Path("/etc/ca")


@pytest.mark.parametrize(
    ("owner", "mode", "role", "said"),
    [
        (US, 0o600, Role.FILE, None),
        (0, 0o644, Role.FILE, None),
        (None, 0o644, Role.FILE, None),
        (OTHER, 0o600, Role.FILE, "uid 1001 could change what is read from /etc/ca: /step belongs to that user"),
        (
            0,
            0o666,
            Role.FILE,
            "every user could change what is read from /etc/ca: others may write to /step (chmod o-w /st",
        ),
        (
            0,
            0o664,
            Role.FILE,
            "the group 50 could change what is read from /etc/ca: it may write to /step (chmod g-w",
        ),
        (0, 0o777, Role.ABOVE, "every user could change"),
        (0, 0o1777, Role.ABOVE, None),
        (0, 0o2775, Role.LAST, "the group 50 could change"),
        (0, 0o3777, Role.LAST, None),
        (OTHER, 0o755, Role.LAST, "uid 1001 could change"),
        (0, 0o777, Role.LINK, None),
        (OTHER, 0o777, Role.LINK, "uid 1001 could change"),
        (0, 0o777, Role.SOCKET, None),
        (OTHER, 0o700, Role.SOCKET, "uid 1001 could change"),
    ],
)
def test_who_could_change_it_is_named(owner: int | None, mode: int, role: Role, said: str | None) -> None:
    found = judge(Step(Path("/step"), owner, 50, mode, role), TARGET, US)
    assert (found or "").startswith(said or "")
    assert (found is None) == (said is None)


def test_a_socket_that_everybody_may_connect_to_is_no_source_that_everybody_could_change(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as api:
        api.bind(str(tmp_path / "api.sock"))
        (tmp_path / "api.sock").chmod(0o777)
        assert not [each for each in who_could_change(tmp_path / "api.sock") if "api.sock (chmod" in each]


def volume(place: Path, mode: int) -> Path:
    """A Secret as Kubernetes mounts it: links to a directory of the moment, in one that is open to all."""
    (place / "..2026").mkdir(parents=True)
    (place / "..data").symlink_to("..2026")
    for name in ("ca-cert.pem", "ca-key.pem"):
        (place / "..2026" / name).touch(0o640)
        (place / name).symlink_to(f"..data/{name}")
    place.chmod(mode)
    return place


@pytest.mark.parametrize("mode", [0o1777, 0o3777])
def test_a_secret_that_kubernetes_mounts_is_good(tmp_path: Path, mode: int) -> None:
    assert who_could_change(volume(tmp_path / "secret", mode)) == ()


def test_a_file_that_a_link_leads_to_is_checked(tmp_path: Path) -> None:
    place = volume(tmp_path / "secret", 0o1777)
    (place / "..2026" / "ca-key.pem").chmod(0o660)
    (reported,) = who_could_change(place)
    assert f"could change what is read from {place}: it may write to {place / '..2026' / 'ca-key.pem'}" in reported


def test_one_directory_on_the_way_to_many_files_is_reported_once(tmp_path: Path) -> None:
    place = tmp_path / "ca"
    place.mkdir()
    for name in "abc":
        (place / name).touch(0o600)
    place.chmod(0o770)
    assert len(who_could_change(place)) == 1


def test_a_directory_of_very_many_files_is_not_checked_for_ever(tmp_path: Path) -> None:
    for number in range(MOST_FILES + 1):
        (tmp_path / str(number)).touch()
        (tmp_path / str(number)).chmod(0o666)
    assert len(who_could_change(tmp_path)) == MOST_FILES


@pytest.mark.parametrize("kind", ["missing", "a link to nothing", "a pipe"])
def test_what_cannot_be_read_is_left_to_its_reader(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "token"
    match kind:
        case "a link to nothing":
            path.symlink_to("nothing")
        case "a pipe":
            os.mkfifo(path, 0o600)
        case _:
            pass
    assert who_could_change(path) == ()


def test_of_a_directory_with_a_ca_the_keys_that_every_user_can_read_are_named(tmp_path: Path) -> None:
    """A Secret that Kubernetes mounts has the mode 0644 unless its `defaultMode` says otherwise."""
    place = volume(tmp_path / "secret", 0o1777)
    for each in ("ca-cert.pem", "ca-key.pem"):
        (place / "..2026" / each).chmod(0o644)
    (reported,) = find_readable([("directory", place)])
    assert reported == f"directory: every user can read the secret in {place}/ca-key.pem (chmod o-r {place}/ca-key.pem)"
    (place / "..2026" / "ca-key.pem").chmod(0o640)
    assert find_readable([("directory", place), ("token_file", tmp_path / "none")]) == []


@pytest.mark.parametrize("kind", ["cacerts", "files"])
def test_the_directories_with_keys_are_looked_at(tmp_path: Path, kind: str) -> None:
    (tmp_path / "ca").mkdir()
    (tmp_path / "ca" / "tls.key").touch()
    (tmp_path / "ca" / "tls.key").chmod(0o644)
    read = settings(tmp_path, f"{MINIMAL}authorities: {{a: {{type: {kind}, directory: ca}}}}\n")
    found, *_ = preflight.credentials(read, SystemClock())
    assert found.startswith(f"authorities.a.directory: every user can read the secret in {tmp_path}/ca/tls.key")


async def test_the_agent_says_it_by_the_name_of_the_setting(tmp_path: Path) -> None:
    for name in ("token", "roots.pem"):
        (tmp_path / name).touch()
    (tmp_path / "token").chmod(0o666)
    authority = "{type: istio, address: 'ca.example:15012', ca_file: roots.pem, token_file: token}"
    read = settings(tmp_path, f"{MINIMAL}authorities:\n  a: {authority}\n")
    with recorded() as events:
        await warn(preflight.sources(read))
    (reported,) = events.named("source_shared", level="warning")
    assert reported["setting"] == "authorities.a.token_file"
    assert reported["cause"].startswith(
        f"every user could change what is read from {tmp_path / 'token'}: others may write"
    )


async def test_the_directories_whose_files_envoys_may_ask_for_are_among_them(tmp_path: Path) -> None:
    (tmp_path / "certs").mkdir()
    (tmp_path / "certs").chmod(0o777)
    read = settings(tmp_path, f"{MINIMAL}sds: {{files: [certs]}}\n")
    with recorded() as events:
        await warn(preflight.sources(read))
    assert events.named("source_shared", setting="sds.files[0]")


def test_roots_of_a_cas_server_that_may_still_come_refuse_no_reload(tmp_path: Path) -> None:
    """A reload takes no authority of which this says something."""
    keys = "type: est, url: 'https://127.0.0.1:1', ca_file: roots.pem, username: agent, password_file: password"
    (tmp_path / "password").write_text("secret")
    chosen = settings(tmp_path, f"{MINIMAL}authorities: {{up: {{{keys}}}}}\n")
    assert not list(preflight.unusable_credentials(chosen, SystemClock()))
    (tmp_path / "roots.pem").touch()
    (found,) = preflight.unusable_credentials(chosen, SystemClock())
    assert found.startswith("authorities.up.ca_file: cannot be used: ")
