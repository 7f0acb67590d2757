"""Files that Envoys ask for by name: pushed as they change, and none but those that the configuration allows."""

import asyncio
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryRequest
from fakes import der
from fakes.clocks import HandClock
from fakes.events import Events, recorded
from fakes.hierarchy import DAY, HOUR, NOW, make_ca, make_leaf, new_key
from fakes.peers import Peer, bundle_of, chain_of, connected
from fakes.raw_http2 import RawPeer
from fakes.replacing import WAYS, Replace

from sds_agent.file_sets import LARGEST_FILE
from sds_agent.files import OutsideError, read_below
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import to_pkcs8_pem
from sds_agent.sds import file_secrets
from sds_agent.sds.endpoint import SocketFile
from sds_agent.sds.file_secrets import FileSecrets
from sds_agent.sds.journal import LINES
from sds_agent.sds.protocol import Absence
from sds_agent.sds.server import Limits, serving
from sds_agent.sds.service import SecretDiscoveryService
from sds_agent.secrets.store import SecretStore

TIMES = 3
ROOT = make_ca("root")


def files(**leaf: object) -> dict[str, bytes]:
    """A new certificate for a DNS name, which no SVID has."""
    signer, key = make_ca("signer", ROOT), new_key()
    made = make_leaf(signer, None, key=key, names=[x509.DNSName("web.example")], **leaf)  # type: ignore[arg-type]
    chain = write_pem([made, signer.certificate])
    return {"tls.crt": chain, "tls.key": to_pkcs8_pem(key), "ca.crt": write_pem([ROOT.certificate])}


class Bench:
    """Allowed directories, whose files a client asks for."""

    def __init__(
        self, allowed: Path, service: SecretDiscoveryService, secrets: FileSecrets, peer: Peer, clock: HandClock
    ) -> None:
        self.allowed = allowed
        self.service = service
        self.secrets = secrets
        self.peer = peer
        self.clock = clock
        self.events = Events()

    def certificate(self, directory: Path | None = None) -> str:
        directory = directory or self.allowed
        return f"file-cert:{directory}/tls.crt~{directory}/tls.key"

    def roots(self, directory: Path | None = None) -> str:
        return f"file-root:{directory or self.allowed}/ca.crt"

    def write(self, content: dict[str, bytes]) -> None:
        for name, data in content.items():
            (self.allowed / name).write_bytes(data)

    async def later(self) -> None:
        """Let the agent's patience with half-written files be over."""
        for _ in range(20):
            await self.clock.asleep()
            self.clock.elapse(timedelta(seconds=1))
        await self.clock.asleep()

    async def followed(self, *names: str) -> None:
        """Wait until these names alone are followed."""
        with anyio.fail_after(10):
            while set(self.secrets.names) != set(names):
                await anyio.lowlevel.checkpoint()


@asynccontextmanager
async def bench(
    folder: Path, allowed: Path | None = None, *, streams: int = 1000, names: int = 100
) -> AsyncIterator[Bench]:
    clock, store = HandClock(), SecretStore(("default",))
    allowed = allowed or folder / "allowed"
    allowed.mkdir(exist_ok=True)
    secrets = FileSecrets([allowed], store, clock)
    service = SecretDiscoveryService(store, clock, files=secrets, most_streams=streams, most_names=names)
    socket = folder / "sds.sock"
    following = asyncio.create_task(secrets.run())
    with recorded() as events:
        async with serving(service, SocketFile(socket), Limits()), connected(socket) as peer:
            made = Bench(allowed, service, secrets, peer, clock)
            made.events = events
            yield made
        following.cancel()
        await asyncio.wait([following])


async def refused(peer: Peer, name: str) -> str:
    """That a name is unknown, by the status of its stream."""
    stream = await peer.stream().ask(name)
    code, said = await stream.end()
    assert code is grpc.StatusCode.NOT_FOUND, said
    return said


# What is served


async def test_a_certificate_and_roots_are_served_by_their_paths(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        made.write(content := files())
        got = await made.peer.fetch(made.certificate(), made.roots())
        assert chain_of(got[made.certificate()]) == content["tls.crt"]
        assert bundle_of(got[made.roots()]) == content["ca.crt"]
        await made.followed()


@pytest.mark.parametrize("way", WAYS)
async def test_each_replacement_is_pushed_however_it_is_made_again_and_again(
    way: Callable[[Path], tuple[Path, Replace]], tmp_path: Path
) -> None:
    (tmp_path / "allowed").mkdir()
    directory, replace = way(tmp_path / "allowed")
    replace(content := files())
    async with bench(tmp_path) as made:
        name = made.certificate(directory)
        stream = await made.peer.stream().ask(name)
        for _ in range(TIMES):
            assert chain_of((await stream.read())[name]) == content["tls.crt"]
            await stream.ack(name)
            replace(content := files())
        assert chain_of((await stream.read())[name]) == content["tls.crt"]


async def test_an_envoy_that_refuses_a_file_is_sent_the_one_before_again(tmp_path: Path) -> None:
    """Or else it would refuse every other secret too."""
    async with bench(tmp_path) as made:
        made.write(first := files())
        name = made.certificate()
        stream = await made.peer.stream().ask(name)
        for content in (first, files()):
            made.write(content)
            assert chain_of((await stream.read())[name]) == content["tls.crt"]
            await stream.ack(name, error=None if content is first else "no")
        assert chain_of((await stream.read())[name]) == first["tls.crt"]


async def test_delta_gets_a_file_as_soon_as_it_is_there_and_when_it_changes(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        stream = await made.peer.delta().subscribe(made.roots())
        await made.followed(made.roots())
        made.write(files())
        first = await stream.read()
        await stream.ack()
        made.write({"ca.crt": write_pem([make_ca("next").certificate])})
        second = await stream.read()
        assert [each.name for each in (*first.resources, *second.resources)] == [made.roots()] * 2
        assert first.resources[0].version != second.resources[0].version


async def test_a_file_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        asked = asyncio.create_task(made.peer.fetch(made.certificate()))
        await made.followed(made.certificate())
        made.write(content := files())
        assert chain_of((await asked)[made.certificate()]) == content["tls.crt"]


async def test_who_waits_for_a_file_or_has_one_that_has_ended_is_seen_to_wait_and_not_to_ask_in_vain(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path) as made:
        stream = await made.peer.stream().ask(made.certificate(), f"file-root:{tmp_path}/elsewhere.pem")
        asked = asyncio.create_task(made.peer.fetch(made.roots()))
        await made.followed(made.certificate(), made.roots())
        assert [[each.waits for each in found.names] for found in made.service.streams] == [[True, False], [True]]
        made.write(files(not_after=NOW + HOUR))
        await stream.read()
        await asked
        assert [each.waits for each in made.service.streams[0].names] == [False, False]
        made.clock.elapse(2 * HOUR)
        await made.later()
        assert [each.waits for each in made.service.streams[0].names] == [True, False]


async def test_who_does_not_read_a_file_that_has_come_is_not_said_to_wait_for_it(tmp_path: Path) -> None:
    """It would be said for as long as it does not, though the file is there."""
    async with bench(tmp_path) as made:
        peer = await RawPeer.connect(tmp_path / "sds.sock")
        await peer.open(1, "StreamSecrets")
        await peer.say(1, bytes(DiscoveryRequest(resource_names=[made.roots()])))
        await made.followed(made.roots())
        made.write({"ca.crt": write_pem([ROOT.certificate]) * 200})  # larger than the peer makes room for
        with anyio.fail_after(10):
            while (found := made.service.streams[0].names[0]).sent is None:
                await anyio.lowlevel.checkpoint()
        assert not found.waits
        await peer.connection.aclose()


async def test_one_reading_serves_all_streams_and_the_last_to_leave_drops_the_key(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        made.write(files())
        name = made.certificate()
        streams = [await made.peer.stream().ask(name) for _ in range(3)]
        for each in streams:
            await each.read()
            await each.ack(name)
        assert made.secrets.names == (name,)
        for each in streams[1:]:
            each.leave()
        with anyio.fail_after(10):
            while len(made.service.streams) > 1:
                await anyio.lowlevel.checkpoint()
        made.write(content := files())
        assert chain_of((await streams[0].read())[name]) == content["tls.crt"]
        await streams[0].ack(name, made.roots())
        await made.followed(name, made.roots())
        await streams[0].read()
        await streams[0].ack(made.roots())
        await made.followed(made.roots())
        streams[0].leave()
        await made.followed()


# What is not served


async def test_a_half_written_set_keeps_the_old_one_and_is_reported_when_it_stays_so(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        made.write(files())
        name = made.certificate()
        stream = await made.peer.stream().ask(name)
        await stream.read()
        await stream.ack(name)
        made.write({"tls.crt": (content := files())["tls.crt"]})
        await made.clock.asleep()
        assert made.events.named("file_secret_unusable") == []
        await made.later()
        (event,) = made.events.named("file_secret_unusable")
        assert "no certificate in it has the key" in event["cause"]
        assert event["serving"] == "what was read before"
        made.write({"tls.key": content["tls.key"]})
        assert chain_of((await stream.read())[name]) == content["tls.crt"]


def for_pss() -> dict[str, bytes]:
    """As files, by a CA that wrote the key as one for RSA-PSS."""
    key, ca = rsa.generate_private_key(65537, 2048), der.entity("root")
    leaf, numbers = der.entity("web", key), key.public_key().public_numbers()
    modulus = der.sequence(der.integer(numbers.n), der.integer(numbers.e))
    spki = der.sequence(der.sequence(der.oid("1.2.840.113549.1.1.10")), der.bits(modulus))
    made = der.certificate(leaf, ca, extensions=der.leaf_extensions(leaf, ca, "spiffe://demo.example/web"), spki=spki)
    return {"tls.crt": der.pem(made), "tls.key": to_pkcs8_pem(key)}


BAD: dict[str, tuple[dict[str, bytes], str]] = {
    "expired": (files(not_before=NOW - 2 * DAY, not_after=NOW - HOUR), "the certificate expired at 2026-03-14"),
    "not valid yet": (files(not_before=NOW + DAY, not_after=NOW + 2 * DAY), "is valid only from 2026-03-15"),
    "no key": ({**files(), "tls.key": b""}, "tls.key is empty"),
    "no certificate": ({**files(), "tls.crt": b"x"}, "tls.crt holds no certificate"),
    "a key for RSA-PSS": (for_pss(), "tls.crt has its key in a form that Envoy does not load"),
    "huge": ({**files(), "tls.crt": b"x" * (LARGEST_FILE + 1)}, "tls.crt has more than"),
}


@pytest.mark.parametrize(("content", "said"), BAD.values(), ids=BAD)
async def test_what_cannot_be_used_is_not_served(content: dict[str, bytes], said: str, tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        made.write(content)
        await made.peer.stream().ask(made.certificate())
        await made.followed(made.certificate())
        await made.later()
        assert said in made.events.named("file_secret_unusable")[0]["cause"]
        assert made.secrets[made.certificate()] is Absence.PENDING


async def test_a_certificate_that_has_ended_is_offered_to_nobody_any_more(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        made.write(files(not_after=NOW + timedelta(seconds=3)))
        stream = await made.peer.stream().ask(made.certificate())
        await stream.read()
        await made.later()
        assert made.secrets[made.certificate()] is Absence.PENDING


@pytest.mark.parametrize(
    "name",
    ["file-root:/etc/passwd", "file-root:{}/../secret", "file-cert:{}/tls.crt", "file-cert:/etc/a~{}/tls.key"],
)
async def test_names_that_lead_elsewhere_are_unknown_and_nothing_is_opened(name: str, tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        said = await refused(made.peer, name.format(made.allowed))
        assert "file-cert: and file-root: names of files below" in said
        assert made.secrets.names == ()


async def test_without_the_setting_no_file_is_served(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(write_pem([ROOT.certificate]))
    store = SecretStore(("default",))
    async with (
        serving(SecretDiscoveryService(store), SocketFile(tmp_path / "sds.sock"), Limits()),
        connected(tmp_path / "sds.sock") as peer,
    ):
        assert "file-cert" not in (await refused(peer, f"file-root:{tmp_path}/ca.crt")).partition(";")[2]


def _absolute(allowed: Path, outside: Path) -> None:
    (allowed / "ca.crt").symlink_to(outside / "ca.crt")


def _relative(allowed: Path, _outside: Path) -> None:
    (allowed / "ca.crt").symlink_to("../outside/ca.crt")


def _chained(allowed: Path, outside: Path) -> None:
    (allowed / "one").symlink_to(outside)
    (allowed / "ca.crt").symlink_to("one/ca.crt")


def _magic(allowed: Path, outside: Path) -> None:
    descriptor = os.open(outside / "ca.crt", os.O_RDONLY)
    (allowed / "ca.crt").symlink_to(f"/proc/self/fd/{descriptor}")


def _pipe(allowed: Path, _outside: Path) -> None:
    os.mkfifo(allowed / "ca.crt")


def _device(allowed: Path, _outside: Path) -> None:
    (allowed / "ca.crt").symlink_to("/dev/zero")


def _directory(allowed: Path, _outside: Path) -> None:
    (allowed / "ca.crt").mkdir()


@pytest.mark.parametrize("lead_out", [_absolute, _relative, _chained, _magic, _pipe, _device, _directory])
async def test_a_symlink_leads_nowhere_but_below_the_allowed_directories(
    lead_out: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "ca.crt").write_bytes(write_pem([ROOT.certificate]))
    async with bench(tmp_path) as made:
        lead_out(made.allowed, outside)
        await refused(made.peer, made.roots())
        assert made.events.named("file_secret_unusable", serving="nothing")


async def test_a_file_that_is_exchanged_for_a_way_out_keeps_what_was_read_before(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "ca.crt").write_bytes(write_pem([make_ca("stolen").certificate]))
    async with bench(tmp_path) as made:
        made.write(content := files())
        stream = await made.peer.stream().ask(made.roots())
        await stream.read()
        (made.allowed / "ca.crt").unlink()
        (made.allowed / "ca.crt").symlink_to(outside / "ca.crt")
        await made.events.wait("file_secret_unusable", serving="what was read before")
        assert bundle_of((await made.peer.fetch(made.roots()))[made.roots()]) == content["ca.crt"]


async def test_an_allowed_directory_may_itself_be_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    async with bench(tmp_path, tmp_path / "link") as made:
        made.write(content := files())
        assert bundle_of((await made.peer.fetch(made.roots()))[made.roots()]) == content["ca.crt"]


def test_a_race_for_the_path_never_gives_a_file_from_outside(tmp_path: Path) -> None:
    """Another process swaps a directory on the way for a symlink and back, as fast as it can."""
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    for directory, content in ((allowed / "in", b"public"), (outside, b"secret")):
        directory.mkdir(parents=True)
        (directory / "file").write_bytes(content)
    (allowed / "way").symlink_to("in")
    with subprocess.Popen([sys.executable, "-c", SWAP, str(outside)], cwd=allowed) as swapping:
        try:
            outcomes = Counter[str]()
            for _ in range(1_000_000):
                outcomes[_read_once(allowed)] += 1
                if min(outcomes["public"], outcomes["kept out"]) >= 500:
                    break
        finally:
            swapping.kill()
    assert outcomes.keys() == {"public", "kept out"}


SWAP = """
import os, sys
while True:
    for target in (sys.argv[1], "in"):
        os.symlink(target, "new")
        os.replace("new", "way")
"""


def _read_once(allowed: Path) -> str:
    try:
        return read_below(allowed / "way" / "file", [allowed], 100).decode()
    except OutsideError:
        return "kept out"


async def test_the_number_of_names_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_secrets, "MOST_NAMES", 2)
    async with bench(tmp_path) as made:
        first = await made.peer.stream().ask(*(f"file-root:{made.allowed}/{n}" for n in range(2)))
        await made.followed(*(f"file-root:{made.allowed}/{n}" for n in range(2)))
        await refused(made.peer, made.roots())
        first.leave()
        await made.followed()
        made.write(files())
        await made.peer.fetch(made.roots())


async def test_names_for_which_there_was_no_room_are_served_once_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An Envoy does not ask again for a name that it was told is not served, over Delta or among others."""
    monkeypatch.setattr(file_secrets, "MOST_NAMES", 1)
    async with bench(tmp_path) as made:
        made.write(content := files())
        first = await made.peer.stream().ask(made.certificate())
        await first.read()
        gone = await made.peer.stream().ask(made.certificate(), f"file-root:{made.allowed}/gone.crt")
        await gone.read()
        late = await made.peer.delta().subscribe(made.roots())
        assert list((await late.read()).removed_resources) == [made.roots()]
        await late.ack()
        gone.leave()
        first.leave()
        await made.followed(made.roots())
        (found,) = (await late.read()).resources
        assert found.name == made.roots()
        assert content["ca.crt"] in bytes(found)
        late.leave()
        await made.followed()


async def test_who_is_let_in_to_a_file_that_is_not_there_yet_is_seen_to_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_secrets, "MOST_NAMES", 1)
    async with bench(tmp_path) as made:
        first = await made.peer.stream().ask(made.certificate())
        await made.followed(made.certificate())
        late = await made.peer.delta().subscribe(made.roots())
        await late.read()
        await late.ack()
        assert not made.service.streams[-1].names[0].waits
        first.leave()
        with anyio.fail_after(10):
            while not made.service.streams[-1].names[0].waits:
                await anyio.lowlevel.checkpoint()


async def test_a_file_is_followed_for_all_that_were_left_out_and_not_for_the_first_of_them_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_secrets, "MOST_NAMES", 1)
    secrets = FileSecrets([tmp_path], SecretStore(("default",)), HandClock())
    first, wanted, another = (f"file-root:{tmp_path}/{name}" for name in ("first", "wanted", "another"))
    secrets.want("first", [first])
    for client, name in (("second", wanted), ("third", another), ("fourth", wanted)):
        secrets.want(client, [name])
    secrets.want("first", [])
    assert secrets.names == (wanted,)
    secrets.want("second", [])
    assert secrets.names == (wanted,), "the fourth was sent it, and would not be sent the next"
    secrets.want("fourth", [])
    assert secrets.names == (another,)


async def test_peers_choose_the_names_and_cannot_fill_the_log(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        for batch in range(3):
            await made.peer.stream().ask(*(f"file-root:{made.allowed}/{batch}-{n}" for n in range(90)))
        with anyio.fail_after(10):
            while len(made.secrets.names) < 270:
                await anyio.lowlevel.checkpoint()
        await made.later()
        assert len(made.events.named("file_secret_unusable")) == file_secrets.LINES.burst


async def test_a_peer_that_asks_for_a_file_again_and_again_cannot_fill_the_log(tmp_path: Path) -> None:
    """Each time the file is read anew, and pushed: that is the peer's doing, and counts against what it may log."""
    async with bench(tmp_path, streams=2, names=1) as made:
        made.write(files())
        stream = await made.peer.stream().ask(made.certificate())
        for _ in range(LINES + 1):
            await stream.read()
            await stream.ack()
            await made.followed()
            await stream.ask(made.certificate())
        await stream.read()
        written = [made.events.named(name) for name in ("subscribed", "sent", "acked", "unsubscribed")]
        assert 0 < sum(map(len, written)) <= LINES
        assert 0 < len(made.events.named("pushed")) <= LINES


async def test_no_key_reaches_the_log_or_a_repr(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        content = files()
        made.write({**content, "tls.crt": files()["tls.crt"]})
        await made.peer.stream().ask(made.certificate())
        await made.followed(made.certificate())
        await made.later()
        made.write(content)
        await made.peer.fetch(made.certificate())
        secret = content["tls.key"].split(b"\n")[1].decode()
        assert secret not in f"{made.events.seen} {made.secrets!r} {made.secrets[made.certificate()]!r}"


async def test_a_directory_that_does_not_answer_delays_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung, good = tmp_path / "hung", tmp_path / "good"
    for each in (hung, good):
        each.mkdir()
    (good / "ca.crt").write_bytes(write_pem([ROOT.certificate]))
    hangs, released, genuine = threading.Event(), threading.Event(), read_below

    def reading(file: Path, directories: list[Path], most: int) -> bytes:
        if file.is_relative_to(hung):
            hangs.set()
            assert released.wait(30)
        return genuine(file, directories, most)

    monkeypatch.setattr(file_secrets, "read_below", reading)
    store = SecretStore(())
    secrets = FileSecrets([hung, good], store, HandClock())
    following = asyncio.create_task(secrets.run())
    told = asyncio.Event()
    try:
        secrets.want(self := object(), [f"file-root:{hung}/ca.crt"])
        assert await asyncio.to_thread(hangs.wait, 30)
        with store.watching(lambda _names: told.set()), anyio.fail_after(10):
            secrets.want(self, [f"file-root:{hung}/ca.crt", f"file-root:{good}/ca.crt"])
            await told.wait()
        assert secrets[f"file-root:{hung}/ca.crt"] is Absence.PENDING
        assert secrets[f"file-root:{good}/ca.crt"] is not Absence.PENDING
    finally:
        released.set()
        secrets.want(self, ())
        following.cancel()
        await asyncio.wait([following])
