"""A peer that is named beside the benchmarks: its figures carry the name and the version that the user gave."""

import argparse
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.program import OUR_NAMES, Peer
from bench.servers import add_server_arguments, servers

PID = os.getpid()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A socket that a server listens at."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sds.sock"))
        yield tmp_path / "sds.sock"


def parsed(*peers: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_server_arguments(parser)
    return parser.parse_args([word for each in peers for word in ("--peer", each)])


def test_rows_of_a_peer_carry_its_name_and_version(path: Path) -> None:
    arguments = parsed(f"pilot-agent 1.31-alpha={path}:{PID}", f"{path}:{PID}")
    arguments.small = True
    named = [each.name for each in servers(arguments) if each.is_peer]
    assert named == ["pilot-agent 1.31-alpha", f"peer {PID}"]


def test_a_path_with_an_equals_sign_is_no_name(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(odd / "sds.sock"))
        assert Peer.parse(f"{odd}/sds.sock:{PID}") == Peer(f"peer {PID}", odd / "sds.sock", PID)
        assert Peer.parse(f"SPIRE 1.15={odd}/sds.sock:{PID}").name == "SPIRE 1.15"


@pytest.mark.parametrize("name", OUR_NAMES)
def test_a_peer_does_not_take_the_name_of_a_row_of_ours(name: str, path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="what rows of ours are called: give the peer another name"):
        Peer.parse(f"{name}={path}:{PID}")


def test_figures_of_two_peers_are_not_mixed(path: Path) -> None:
    with pytest.raises(argparse.ArgumentError, match=r"two peers called 'SPIRE 1\.15': name each of them"):
        parsed(f"SPIRE 1.15={path}:{PID}", f"SPIRE 1.15={path}:{PID}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{path}", "is not NAME=SOCKET:PID, such as 'pilot-agent 1.31=/run/peer/sds.sock:4711'"),
        ("SPIRE={path}:", "is not NAME=SOCKET:PID"),
        (" ={path}:1", "there is no name before the ="),
        ("SPIRE=/nowhere/sds.sock:1", "there is no socket at /nowhere/sds.sock"),
        ("SPIRE={path}:99999999", "there is no process 99999999"),
    ],
)
def test_a_peer_that_cannot_be_measured_is_refused_with_what_is_wrong(text: str, words: str, path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        Peer.parse(text.format(path=path))
