"""The socket as a file: its rights, and whose socket may be replaced."""

import errno
import gc
import grp
import os
import pwd
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest
from fakes.events import recorded
from fakes.loops import anyio_backend, loop_of_the_module, one_loop  # noqa: F401 - fixtures
from fakes.peers import connected
from fakes.processes import DAC_OVERRIDE, FOWNER, without_capability

from sds_agent.errors import ConfigurationError
from sds_agent.sds.endpoint import Access, SocketFile, SocketInUseError, access, claim, inherit
from sds_agent.sds.server import Limits, ProbeError, bind, probe, serving
from sds_agent.sds.service import SecretDiscoveryService
from sds_agent.secrets.model import BundleSecret
from sds_agent.secrets.store import SecretStore


@asynccontextmanager
async def server(file: SocketFile, *, check_every: float = 60) -> AsyncIterator[None]:
    store = SecretStore()
    store.publish({"ROOTCA": BundleSecret(b"roots")})
    async with serving(SecretDiscoveryService(store), file, Limits(), check_every=check_every):
        yield


@asynccontextmanager
async def unstarted() -> AsyncIterator[grpc.aio.Server]:
    """A server with nothing in it."""
    made = grpc.aio.server()
    yield made
    await made.stop(None)
    del made
    gc.collect()  # its finalizer needs the event loop


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mode", [0o660, 0o600, 0o770])
@pytest.mark.parametrize("umask", [0o000, 0o077])
async def test_socket_has_the_configured_mode_whatever_the_umask(tmp_path: Path, mode: int, umask: int) -> None:
    path = tmp_path / "run" / "sds-agent" / "sds.sock"
    before = os.umask(umask)
    try:
        async with server(SocketFile(path, mode=mode)):
            assert mode_of(path) == mode
            assert [mode_of(each) for each in path.parents[:2]] == [0o755, 0o755], "or no other user would reach it"
    finally:
        assert os.umask(before) == umask, "the process's own umask is as it was"


# only root may give a file away; for others their own ids have to do
OTHER_USER, OTHER_GROUP = (4711, 4712) if os.geteuid() == 0 else (os.geteuid(), os.getegid())


async def test_socket_gets_the_configured_owner_and_group(tmp_path: Path) -> None:
    path = tmp_path / "sds.sock"
    async with server(SocketFile(path, owner=str(OTHER_USER), group=str(OTHER_GROUP))):
        assert (path.stat().st_uid, path.stat().st_gid) == (OTHER_USER, OTHER_GROUP)
        if os.geteuid() == 0:  # or else the ids have names
            assert access(path) == Access("0660", str(OTHER_USER), str(OTHER_GROUP))


_GIVEN = """
import socket, sys
from pathlib import Path
from sds_agent.sds.endpoint import SocketFile, claim
with claim(SocketFile(Path(sys.argv[1]), owner=sys.argv[2], group=sys.argv[3])) as endpoint:
    with endpoint.listen(1):
        endpoint.publish()
        found = endpoint.path.stat()
        print(found.st_uid, found.st_gid, oct(found.st_mode & 0o777))
"""


def test_the_socket_is_given_away_with_the_right_to_give_alone(tmp_path: Path) -> None:
    """As in a container that has CAP_CHOWN and no CAP_FOWNER."""
    program = [*without_capability(FOWNER), "-c", _GIVEN, str(tmp_path / "sds.sock"), str(OTHER_USER), str(OTHER_GROUP)]
    ended = subprocess.run([sys.executable, *program], check=False, capture_output=True, text=True, timeout=60)
    assert ended.stdout == f"{OTHER_USER} {OTHER_GROUP} 0o660\n", ended.stderr


async def test_socket_gets_owner_and_group_by_name(tmp_path: Path) -> None:
    path = tmp_path / "sds.sock"
    user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
    async with server(SocketFile(path, owner=user, group=group)):
        assert (path.stat().st_uid, path.stat().st_gid) == (os.geteuid(), os.getegid())
        assert access(path) == Access("0660", user, group)


def test_no_other_user_can_connect_before_the_mode_is_set(tmp_path: Path) -> None:
    """A process that connects between bind and chmod would keep that connection."""
    with claim(SocketFile(tmp_path / "sds.sock")) as endpoint, socket.socket(socket.AF_UNIX) as bound:
        with endpoint.private_umask():
            bound.bind(str(endpoint.temporary))
        assert mode_of(endpoint.temporary) & 0o077 == 0
        assert not (tmp_path / "sds.sock").exists()
        endpoint.publish()
        assert mode_of(tmp_path / "sds.sock") == 0o660


async def test_server_binds_where_no_other_user_can_connect_yet(tmp_path: Path) -> None:
    with claim(SocketFile(tmp_path / "sds.sock")) as endpoint:
        before = os.umask(0)
        try:
            async with unstarted() as bound:
                bind(bound, endpoint)
                assert mode_of(endpoint.temporary) & 0o077 == 0
        finally:
            os.umask(before)


def test_place_that_is_taken_in_the_last_moment_is_reported_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "sds.sock"
    with claim(SocketFile(path)) as endpoint, socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(endpoint.temporary))
        path.mkdir()
        with pytest.raises(ConfigurationError, match=r"cannot give .*sds.sock its owner and mode"):
            endpoint.publish()
    assert {p.name for p in tmp_path.iterdir()} == {"sds.sock", "sds.sock.lock"}
    assert path.is_dir()


def test_temporary_names_are_never_the_same(tmp_path: Path) -> None:
    """gRPC removes what is at the name it was bound to when it stops, even if that is a successor's by now."""
    addresses = set()
    for _ in range(5):
        with claim(SocketFile(tmp_path / "sds.sock")) as endpoint:
            addresses.add(endpoint.address)
    assert len(addresses) == 5


async def test_directory_is_made_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "sds-agent" / "sds.sock"
    async with server(SocketFile(path)):
        assert {p.name for p in path.parent.iterdir()} == {"sds.sock", "sds.sock.lock"}
    assert {p.name for p in path.parent.iterdir()} == {"sds.sock.lock"}


async def test_socket_left_by_a_killed_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "sds.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    async with server(SocketFile(path)), connected(path) as peer:
        assert "ROOTCA" in await peer.fetch("ROOTCA")


def test_socket_that_a_killed_server_left_without_a_name_is_removed_and_nothing_else(tmp_path: Path) -> None:
    names = {".0a1b2c": True, ".0a1b2d": False, ".0a1b2c3d": True, "other.sock": True}
    for name, is_old in names.items():
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / name))
        if is_old:
            os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".0a1b2e").touch()
    os.utime(tmp_path / ".0a1b2e", (0, 0))
    with claim(SocketFile(tmp_path / "sds.sock")):
        left = {path.name for path in tmp_path.iterdir()} - {"sds.sock.lock"}
    assert left == {".0a1b2d", ".0a1b2c3d", "other.sock", ".0a1b2e"}


def test_live_socket_of_another_server_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "sds.sock"
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen()
        before = path.stat().st_ino
        with pytest.raises(SocketInUseError, match="another server answers"), claim(SocketFile(path)):
            pass
        assert path.stat().st_ino == before


async def test_second_agent_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "sds.sock"
    async with server(SocketFile(path)), connected(path) as peer:
        with pytest.raises(SocketInUseError, match="another sds-agent"), claim(SocketFile(path)):
            pass
        assert "ROOTCA" in await peer.fetch("ROOTCA")


def test_socket_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    """It is not known whether a server listens there."""
    path = tmp_path / "sds.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(SocketInUseError, match="cannot tell whether a server is alive"), claim(SocketFile(path)):
            pass
        assert path.is_socket()


def test_server_that_is_too_busy_to_answer_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "sds.sock"
    refused: list[BaseException] = []

    def attempt() -> None:
        try:
            with claim(SocketFile(path)):
                pass
        except SocketInUseError as error:
            refused.append(error)

    with ExitStack() as stack:
        busy = stack.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(str(path))
        busy.listen(0)
        with suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(str(path))
        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(20)
        assert "cannot tell whether a server is alive" in str(refused[0])
        assert path.is_socket()


def test_lock_file_that_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    (tmp_path / "sds.sock.lock").symlink_to("elsewhere")
    with pytest.raises(ConfigurationError, match=r"cannot open the lock file .*sds\.sock\.lock: "):
        claim(SocketFile(tmp_path / "sds.sock")).__enter__()
    assert not (tmp_path / "elsewhere").exists()


def test_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "sds.sock"
    path.write_text("precious")
    with pytest.raises(ConfigurationError, match="not a socket"), claim(SocketFile(path)):
        pass
    assert path.read_text() == "precious"


def test_socket_of_a_successor_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "sds.sock"
    with claim(SocketFile(path)) as endpoint:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(endpoint.temporary))
        endpoint.publish()
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
    assert path.exists()


def test_directory_that_every_user_may_write_to_is_refused(tmp_path: Path) -> None:
    open_directory = tmp_path / "open"
    open_directory.mkdir()
    open_directory.chmod(0o1777)
    with pytest.raises(ConfigurationError, match=r"every user may write to .*make one in it"):
        claim(SocketFile(open_directory / "sds.sock")).__enter__()


def test_file_in_the_place_of_the_directory_is_refused_and_to_make_it_writable_would_not_help(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ConfigurationError) as raised, claim(SocketFile(tmp_path / "run" / "sds.sock")):
        pass
    place = tmp_path / "run"
    assert str(raised.value) == f"sds.socket: cannot use the directory {place}: Not a directory; choose another"


_SERVED = """
import asyncio, sys
from pathlib import Path
from sds_agent.sds.endpoint import SocketFile
from sds_agent.sds.server import Limits, serving
from sds_agent.sds.service import SecretDiscoveryService
from sds_agent.secrets.store import SecretStore

async def main() -> None:
    file = SocketFile(Path(sys.argv[1]), owner=sys.argv[2], group=sys.argv[3])
    async with serving(SecretDiscoveryService(SecretStore()), file, Limits()):
        print("serves")

asyncio.run(main())
"""


def test_a_socket_at_which_the_agent_itself_may_not_connect_is_served(tmp_path: Path) -> None:
    """As where it is another user's and group's, and root has lost its rights but for that to give files away."""
    alone = [*without_capability(DAC_OVERRIDE), *without_capability(FOWNER)]
    program = [*alone, "-c", _SERVED, str(tmp_path / "sds.sock"), str(OTHER_USER), str(OTHER_GROUP)]
    ended = subprocess.run([sys.executable, *program], check=False, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "serves\n", ended.stderr


@pytest.mark.parametrize("mode", [0o660, 0o600])
def test_a_socket_that_a_killed_agent_gave_away_is_replaced_and_that_of_another_server_is_not(
    tmp_path: Path, mode: int
) -> None:
    """The agent may not connect to either, to see whether a server is alive."""
    path = tmp_path / "sds.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    path.chmod(mode)
    os.chown(path, OTHER_USER, OTHER_GROUP)
    program = [*without_capability(DAC_OVERRIDE), "-c", _GIVEN, str(path), str(OTHER_USER), str(OTHER_GROUP)]
    ended = subprocess.run([sys.executable, *program], check=False, capture_output=True, text=True, timeout=60)
    if mode == 0o660 or os.geteuid() == OTHER_USER:
        assert ended.stdout == f"{OTHER_USER} {OTHER_GROUP} 0o660\n", ended.stderr
    else:
        assert f"cannot tell whether a server is alive at {path} (Permission denied)" in ended.stderr


def test_a_full_disk_is_to_be_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a /run that other programs have filled."""
    open_file = os.open

    def full(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open_file(path, flags, *mode)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(ConfigurationError, match=r"No space left on device; make room on its disk$"):
        claim(SocketFile(tmp_path / "sds.sock")).__enter__()


def test_a_system_without_proc_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent would listen, and hand no connection on to gRPC."""
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, *how, **by: path != "/proc/self/fd" and may(path, *how, **by))
    path = tmp_path / "sds.sock"
    said = "sds.socket: the agent reaches its own server by /proc/self/fd, which is not there; mount proc at /proc"
    for take in (claim(SocketFile(path)), inherit(SocketFile(path), 3)):
        with pytest.raises(ConfigurationError, match=f"^{said}"), take:
            pass
    assert list(tmp_path.iterdir()) == []


def test_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    if tmp_path.stat().st_uid == 0:
        os.chown(tmp_path, 4712, -1)
    with pytest.raises(ConfigurationError, match=r"^sds\.socket: .* belongs to uid \d+, who could "):
        claim(SocketFile(tmp_path / "sds.sock")).__enter__()


@pytest.mark.parametrize(
    ("directory", "name", "good"), [(90, 16, True), (90, 17, False), (99, 1, True), (100, 1, False)]
)
async def test_path_that_is_too_long_is_refused_in_words_and_no_other(directory: int, name: int, *, good: bool) -> None:
    """The temporary name beside the socket needs room too."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        path = Path(made) / ("d" * (directory - len(made) - 1)) / ("s" * name)
        if good:
            async with server(SocketFile(path)), connected(path) as peer:
                assert "ROOTCA" in await peer.fetch("ROOTCA")
        else:
            with pytest.raises(ConfigurationError, match=r"is too long .* 108 bytes .* 107 are possible"):
                claim(SocketFile(path)).__enter__()


@pytest.mark.parametrize(("field", "value"), [("owner", "no-such-user"), ("group", "no-such-group")])
def test_unknown_owner_or_group_is_named(tmp_path: Path, field: str, value: str) -> None:
    file = SocketFile(tmp_path / "sds.sock", **{field: value})  # type: ignore[arg-type] # a str for either field
    with pytest.raises(ConfigurationError, match=f"sds.{field}: .*'{value}'"):
        claim(file).__enter__()


async def test_path_with_spaces_and_percent_signs(tmp_path: Path) -> None:
    path = tmp_path / "a%20b c" / "sds.sock"
    async with server(SocketFile(path)):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


async def test_directory_that_takes_no_socket_is_reported_in_words(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with claim(SocketFile(directory / "sds.sock")) as endpoint:
        shutil.rmtree(directory)
        async with unstarted() as attempt:
            with pytest.raises(ConfigurationError, match=f"cannot make a socket in {directory}: No such file"):
                bind(attempt, endpoint)


async def test_server_that_cannot_begin_leaves_the_path_to_others(tmp_path: Path) -> None:
    path = tmp_path / "sds.sock"
    with pytest.raises(OverflowError):  # no system has that mode, and the configuration refuses it
        async with server(SocketFile(path, mode=2**40)):
            pass
    assert names_in(tmp_path) == {"sds.sock.lock"}
    async with server(SocketFile(path)), connected(path) as peer:
        assert "ROOTCA" in await peer.fetch("ROOTCA")


# --- the loss of the socket ---


@pytest.mark.parametrize("lost", ["the socket", "the directory", "the directory's name"])
async def test_lost_socket_comes_back_with_its_rights_and_serves_old_and_new_peers(tmp_path: Path, lost: str) -> None:
    """A cleaner of temporary files, or a hasty hand: to every Envoy that starts later the agent would be dead."""
    path = tmp_path / "run" / "sds.sock"
    async with AsyncExitStack() as stack:
        events = stack.enter_context(recorded())
        await stack.enter_async_context(server(SocketFile(path, mode=0o600), check_every=0.01))
        old = await stack.enter_async_context(connected(path))
        stream = await old.stream().ask("ROOTCA")
        await stream.read()
        match lost:
            case "the socket":
                path.unlink()
            case "the directory":
                shutil.rmtree(path.parent)
            case _:
                path.parent.rename(tmp_path / "away")
        await events.wait("socket_restored", socket=str(path), level="warning")
        assert mode_of(path) == 0o600
        assert (await stream.end())[0] is grpc.StatusCode.OK, "an Envoy logs nothing, and comes back"
        new = await stack.enter_async_context(connected(path))
        assert "ROOTCA" in await new.fetch("ROOTCA")
        assert "ROOTCA" in await old.fetch("ROOTCA")
        with pytest.raises(SocketInUseError), claim(SocketFile(path)):
            pass
    assert not path.exists()


async def test_socket_that_another_took_is_logged_once_and_taken_back_when_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "sds.sock"
    with recorded() as events:
        async with server(SocketFile(path), check_every=0.01):
            for count in (1, 2):  # each time
                async with connected(path) as old:
                    await old.fetch("ROOTCA")
                    path.unlink()
                    with socket.socket(socket.AF_UNIX) as other:
                        other.bind(str(path))
                        other.listen()
                        reported = await events.wait("socket_lost", level="error", count=count)
                        assert "another server answers" in reported["cause"]
                        assert "ROOTCA" in await old.fetch("ROOTCA"), "a peer that is connected is still served"
                        before = path.stat().st_ino
                        await anyio.wait_all_tasks_blocked()
                        assert path.stat().st_ino == before
                    await events.wait("socket_restored", count=count)
                    assert len(events.named("socket_lost")) == count
                    async with connected(path) as new:
                        assert "ROOTCA" in await new.fetch("ROOTCA")


# --- no descriptor is left ---


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Inside this context the process can open so many files more, by a real limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as taken:
        taken.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        highest = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2 + count, hard))
        opened = list[int]()
        with suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        for each in opened[:count]:
            os.close(each)
        for each in opened[count:]:
            taken.callback(os.close, each)
        yield


def published(file: SocketFile, bound: socket.socket) -> None:
    """Go all the way of a server, with that socket in the place of gRPC's."""
    with claim(file) as endpoint, ExitStack() as opened:
        bound.bind(str(endpoint.temporary))
        opened.callback(os.close, endpoint.hide())
        opened.enter_context(endpoint.listen(1))
        endpoint.publish()


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_missing_descriptor_is_reported_in_words_wherever_it_is_missing(tmp_path: Path, left: int) -> None:
    file = SocketFile(tmp_path / "sds.sock")
    with socket.socket(socket.AF_UNIX) as bound:
        with socket.socket(socket.AF_UNIX) as dead:  # which is asked whether it is alive
            dead.bind(str(file.path))
        with (
            descriptors_left(left),
            pytest.raises(ConfigurationError, match=r"Too many open files; raise the process's limit"),
        ):
            published(file, bound)
    assert names_in(tmp_path) <= {"sds.sock", "sds.sock.lock"}


def test_descriptors_that_a_socket_takes_are_no_more_than_those(tmp_path: Path) -> None:
    """Or else the test above would not reach the last of them."""
    with socket.socket(socket.AF_UNIX) as bound, descriptors_left(4):
        published(SocketFile(tmp_path / "sds.sock"), bound)


@pytest.mark.parametrize("left", [0, 1])
async def test_socket_that_is_lost_while_no_descriptor_is_left_comes_back_once_there_is_one(
    tmp_path: Path, left: int
) -> None:
    """An agent that ended for it would take the streams of all its Envoys along."""
    path = tmp_path / "sds.sock"
    store = SecretStore()
    store.publish({"ROOTCA": BundleSecret(b"roots")})
    service = SecretDiscoveryService(store)
    with recorded() as events:
        async with serving(service, SocketFile(path), Limits(), check_every=0.01):
            with anyio.fail_after(10):
                while service.connections:  # that of its own probe
                    await anyio.lowlevel.checkpoint()
            with descriptors_left(left):
                path.unlink()
                reported = await events.wait("socket_lost", level="error")
                assert "Too many open files" in reported["cause"]
            await events.wait("socket_restored")


# --- the probe ---


@pytest.mark.parametrize("answers", [True, False])
async def test_server_that_does_not_answer_its_own_probe_is_not_ready(tmp_path: Path, *, answers: bool) -> None:
    address = f"unix:{tmp_path / 's.sock'}"
    async with unstarted() as other:
        if answers:  # with something else
            other.add_insecure_port(address)
            await other.start()
        with pytest.raises(ProbeError, match="UNIMPLEMENTED" if answers else "UNAVAILABLE"):
            await probe(address)
