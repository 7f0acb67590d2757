"""What systemd tells a service, and what the service tells it."""

import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest
from fakes.clocks import HandClock

from sds_agent.errors import ConfigurationError
from sds_agent.secrets.model import BundleSecret
from sds_agent.secrets.store import SecretStore
from sds_agent.supervision import summary, supervised
from sds_agent.systemd import HandedOverSocket, Notifier, at, handed_over, notifier

PID = str(os.getpid())


class Manager:
    """A stand-in for the service manager: what was sent to its socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)
        self.path = path

    def said(self) -> list[str]:
        """Everything since the last call, a line each."""
        lines = []
        while True:
            try:
                lines += self.socket.recv(4096).decode().split("\n")
            except BlockingIOError:
                return lines

    async def hears(self, line: str) -> None:
        """Wait until it is said."""
        with anyio.fail_after(10):
            while line not in self.said():
                await anyio.wait_readable(self.socket)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    with made.socket:
        yield made


def test_a_start_a_reload_and_the_end_are_told(manager: Manager) -> None:
    environ = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "4000000", "WATCHDOG_PID": PID, "HOME": "/"}
    told = notifier(environ)
    assert environ == {"HOME": "/"}, "a hook must not speak in the agent's place"
    assert told.watchdog == timedelta(seconds=4)
    told.ready("serving")
    told.reloading()
    told.stopping()
    told.alive()
    reloading, *times = [line for line in manager.said() if line not in {"READY=1", "STATUS=serving"}][:2]
    assert (reloading, times[0].partition("=")[0]) == ("RELOADING=1", "MONOTONIC_USEC")


def test_a_line_break_in_a_status_tells_nothing_else(manager: Manager) -> None:
    Notifier(str(manager.path)).status("a\nSTOPPING=1")
    assert manager.said() == ["STATUS=a STOPPING=1"]


def test_the_abstract_namespace_is_a_place_too(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        name = f"sds-agent-test-{tmp_path.name}-{PID}"
        listening.bind(f"\0{name}")
        Notifier(f"@{name}").stopping()
        assert listening.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/at/all"])
def test_without_a_manager_nothing_happens(address: str) -> None:
    notifier({"NOTIFY_SOCKET": address}).ready("serving")


def test_a_manager_that_does_not_read_holds_nothing_up(manager: Manager) -> None:
    told = Notifier(str(manager.path))
    for _ in range(10_000):
        told.alive()
    assert len(manager.said()) < 10_000, "the queue was full, and the sender went on"


async def test_a_manager_that_reads_late_hears_all_the_same_that_the_start_is_done(manager: Manager) -> None:
    """One that does not hear it ends the service after a while: systemd is slow to read when a machine boots."""
    told, store = Notifier(str(manager.path)), SecretStore(["web"])
    for _ in range(10_000):  # other services have much to say
        Notifier(str(manager.path)).alive()
    async with supervised(told, store, lambda _now: "serving", HandClock()):
        assert "READY=1" not in manager.said()
        store.publish({"web": BundleSecret(b"x")})
        await manager.hears("READY=1")
        told.alive()
        assert manager.said().count("READY=1") == 0, "it was said"


def test_a_start_is_not_said_to_be_done_once_a_reload_has_begun(manager: Manager) -> None:
    told = Notifier(str(manager.path))
    for _ in range(10_000):
        told.alive()
    told.ready()
    told.reloading()
    manager.said()
    told.alive()
    assert manager.said() == ["WATCHDOG=1"]


@pytest.mark.parametrize("micros", ["", "0", "-1", "soon", "18446744073709551615", "9" * 26, "9" * 5000])
def test_no_watchdog_is_no_watchdog(micros: str) -> None:
    assert notifier({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": micros}).watchdog is None


def test_the_watchdog_of_another_process_is_not_ours() -> None:
    assert notifier({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}).watchdog is None


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": PID, "LISTEN_FDS": "many"},
        {"LISTEN_PID": PID, "LISTEN_FDS": "9" * 5000},
        {"LISTEN_PID": PID},
    ],
)
def test_descriptors_of_another_process_are_not_taken(environ: dict[str, str]) -> None:
    assert handed_over(environ) == ()
    assert environ == {}


def handed(tmp_path: Path, name: str = "sds.sock") -> HandedOverSocket:
    return HandedOverSocket(3, tmp_path / name, "sds")


def test_the_socket_at_the_configured_path_is_the_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    other, wanted = handed(tmp_path, "other.sock"), handed(tmp_path / "real")
    assert at(tmp_path / "link" / "sds.sock", [other, wanted]) is wanted
    assert at(tmp_path / "sds.sock", []) is None


def test_a_socket_elsewhere_is_refused_as_envoys_would_connect_in_the_wrong_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        at(tmp_path / "sds.sock", [handed(tmp_path, "other.sock")])
    assert f"write ListenStream={tmp_path}/sds.sock" in str(caught.value)


NOW = datetime(2026, 1, 2, tzinfo=UTC)


def test_the_line_says_what_is_served_or_what_is_missing() -> None:
    assert summary(2, [None, None], [], 1) == "serving 2 workloads to 1 stream"
    following = "; the next renewal is at 2026-01-02 00:00:00 UTC"
    assert summary(1, [NOW + timedelta(days=1), None, NOW], [], 0) == f"serving 1 workload to 0 streams{following}"
    assert summary(1, [], ["web: not issued yet"], 0) == "not ready: web: not issued yet"
    assert summary(1, [], ["web: not issued yet", "db: expired"], 0) == "not ready: web: not issued yet, and 1 more"


async def test_the_manager_hears_of_the_start_of_each_change_and_of_the_end(manager: Manager) -> None:
    store, clock = SecretStore(["web"]), HandClock()
    told = Notifier(str(manager.path))
    async with supervised(told, store, lambda _now: f"missing {len(store.missing)}", clock):
        assert manager.said()[:2] == ["READY=1", "STATUS=missing 1"]
        store.publish({"web": BundleSecret(b"x")})
        await manager.hears("STATUS=missing 0")
    assert manager.said()[-1] == "STOPPING=1"


async def test_a_sign_of_life_comes_twice_as_often_as_the_watchdog_wants(manager: Manager) -> None:
    told = Notifier(str(manager.path), timedelta(milliseconds=20))
    async with supervised(told, SecretStore(), lambda _now: "", HandClock()):
        for _ in range(3):
            await manager.hears("WATCHDOG=1")
