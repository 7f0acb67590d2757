"""SPIRE's own server and agent behind the kind `spiffe`: from a join token to a rotation of the authority."""

import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
from ca_interop.driver import TRUST_DOMAIN, URI, Running, Server, agent, free_port, program, server
from cryptography import x509
from fakes.hierarchy import make_ca

from sds_agent.pki.certificates import extension, read_pem, san_values, serial_hex, write_pem
from sds_agent.pki.keys import public_bytes
from sds_agent.secrets.model import BundleSecret

NODE = f"spiffe://{TRUST_DOMAIN}/node"
API = f"spiffe://{TRUST_DOMAIN}/api"
HOUR = 3600
LIFE = 20
"""Seconds that a certificate lives: SPIRE's agent replaces it after some half of that."""

SERVER = """
server {{
    bind_address = "127.0.0.1"
    bind_port = "{port}"
    socket_path = "{folder}/server.sock"
    trust_domain = "{trust_domain}"
    data_dir = "{folder}"
    log_level = "INFO"
}}
plugins {{
    DataStore "sql" {{
        plugin_data {{
            database_type = "postgres"
            connection_string = "host={database} user=spire dbname=postgres sslmode=disable"
        }}
    }}
    NodeAttestor "join_token" {{ plugin_data {{}} }}
    KeyManager "disk" {{ plugin_data {{ keys_path = "{folder}/keys.json" }} }}
}}
"""
AGENT = """
agent {{
    server_address = "127.0.0.1"
    server_port = "{port}"
    socket_path = "{folder}/agent.sock"
    trust_domain = "{trust_domain}"
    data_dir = "{folder}/agent"
    log_level = "INFO"
    insecure_bootstrap = true
    experimental {{ sync_interval = "1s" }}
}}
plugins {{
    NodeAttestor "join_token" {{ plugin_data {{}} }}
    KeyManager "disk" {{ plugin_data {{ directory = "{folder}/agent" }} }}
    WorkloadAttestor "unix" {{ plugin_data {{}} }}
}}
"""


class Database:
    """PostgreSQL on a Unix socket, without a port. It refuses to run as root, so it then runs as `nobody`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._as_user = list[str]()
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody", "nogroup")
            self._as_user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Run it inside this context."""
        data = self.folder / "data"
        made = [program("initdb"), "-D", str(data), "-U", "spire", "--auth=trust", "--no-sync"]
        await anyio.run_process([*self._as_user, *made])
        options = ["-k", str(self.folder), "-c", "listen_addresses=", "-c", "fsync=off"]
        ready = "database system is ready to accept connections"
        command = [*self._as_user, program("postgres"), "-D", str(data), *options]
        async with server(Server(self.folder / "postgres.log", command, says=ready)):
            yield


class Spire:
    """A server and an agent of SPIRE, in a directory of their own."""

    def __init__(self, folder: Path, database: Path) -> None:
        folder.mkdir()
        (folder / "agent").mkdir()
        self.folder = folder
        self.port = free_port()
        values = {"folder": folder, "port": self.port, "trust_domain": TRUST_DOMAIN, "database": database}
        (folder / "server.conf").write_text(SERVER.format(**values))
        (folder / "agent.conf").write_text(AGENT.format(**values))
        run = ["run", "-config"]
        self.server = Server(
            folder / "server.log",
            [program("spire-server"), *run, str(folder / "server.conf")],
            port=self.port,
            says="Starting Server APIs",
        )
        self.agent = Server(
            folder / "agent.log",
            [program("spire-agent"), *run, str(folder / "agent.conf")],
            says="Starting Workload and SDS APIs",
        )

    @property
    def socket(self) -> Path:
        """The Workload API's."""
        return self.folder / "agent.sock"

    async def ask(self, *words: str) -> dict[str, object]:
        """What the server's own command answers, in JSON."""
        more = ["-socketPath", str(self.folder / "server.sock"), "-output", "json"]
        done = await anyio.run_process([program("spire-server"), *words, *more], check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        read: dict[str, object] = json.loads(done.stdout)
        return read

    async def joined(self) -> None:
        """Start the agent with a new token."""
        token = (await self.ask("token", "generate", "-spiffeID", NODE))["value"]
        command = list(self.agent.command)
        self.agent.command = [*command, "-joinToken", str(token)]
        await self.agent.start()
        self.agent.command = command

    async def authority(self, *words: str) -> str:
        """Prepare, activate, taint or revoke an authority of the server; returns the ID of the one that it is about."""
        step, *name = words
        answer = await self.ask("localauthority", "x509", step, *(["-authorityID", *name] if name else []))
        return next(str(each["authority_id"]) for each in answer.values() if isinstance(each, dict))

    async def register(self, spiffe_id: str = URI, *more: str, life: int = LIFE) -> str:
        """Register an entry for this test's own process; returns its ID."""
        selector = f"unix:uid:{os.geteuid()}"
        words = ["-parentID", NODE, "-spiffeID", spiffe_id, "-selector", selector, "-x509SVIDTTL", str(life)]
        made = await self.ask("entry", "create", *words, *more)
        results = made["results"]
        assert isinstance(results, list)
        assert results[0]["status"]["code"] == 0, results
        return str(results[0]["entry"]["id"])


@asynccontextmanager
async def spire(place: Path) -> AsyncIterator[Spire]:
    """A server of SPIRE, and an agent that has joined it, inside this context."""
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        async with Database(Path(folder)).serving():
            made = Spire(place / "spire", Path(folder))
            async with server(made.server):
                try:
                    await made.joined()
                    yield made
                finally:
                    with anyio.CancelScope(shield=True):
                        await made.agent.stop()


def follows(place: Path, made: Spire, **keys: object) -> AbstractAsyncContextManager[Running]:
    """The agent, which takes its certificates from that Workload API."""
    return agent(place, {"type": "spiffe", "socket": str(made.socket), **keys})


def key_id(certificate: x509.Certificate) -> str:
    """How SPIRE names the authority that signed it."""
    found = extension(certificate, x509.AuthorityKeyIdentifier)
    assert found is not None
    assert found.key_identifier is not None
    return found.key_identifier.hex()


async def federated(running: Running, name: str) -> tuple[x509.Certificate, ...]:
    """Wait for the bundle of another trust domain."""
    await running.event("federated_trust_changed", trust_domain=name)
    served = running.parts.store.snapshot[f"spiffe://{name}"]
    assert isinstance(served, BundleSecret)
    return read_pem(served.anchors_pem)


async def test_first_certificate_and_three_renewals_by_its_id(place: Path) -> None:
    async with spire(place) as made:
        await made.register(API)
        await made.register()
        async with follows(place, made) as running:
            leaves = [await running.first()]
            assert str(leaves[0].subject.rfc4514_string()) == "O=SPIRE,C=US"
            assert [name.value for name in san_values(leaves[0])] == [URI]
            while len(leaves) < 4:
                leaves.append(await running.more())
            assert len({leaf.serial_number for leaf in leaves}) == 4
            assert len({public_bytes(leaf.public_key()) for leaf in leaves}) == 4  # type: ignore[arg-type]
            status = running.status()
            assert status.attempt in {"waiting", None}  # None for a second after each certificate
            assert (status.failure, status.renew_at) == (None, None)
            assert not running.events.named("expired")


async def test_an_entry_that_comes_late_or_goes_is_followed_and_what_is_served_stays(place: Path) -> None:
    async with spire(place) as made, follows(place, made) as running:
        refused = await running.event("retrying", kind="denied")
        assert "(PERMISSION_DENIED: no identity issued); register an entry" in refused["cause"]
        entry = await made.register(life=HOUR)
        first = await running.first()
        await made.ask("entry", "delete", "-entryID", entry)
        await running.event("retrying", kind="denied", serving="the current certificate")
        assert running.chain()[0] == first
        await made.register()
        assert await running.more() != first


async def test_of_two_entries_with_one_id_the_hint_decides(place: Path) -> None:
    async with spire(place) as made:
        await made.register(URI, "-hint", "external", life=2 * HOUR)
        # SPIRE takes a second entry with the same ID and parent only with other selectors
        await made.register(URI, "-hint", "internal", "-selector", f"unix:gid:{os.getegid()}", life=HOUR)
        async with follows(place, made, hint="internal") as running:
            leaf = await running.first()
            assert leaf.not_valid_after_utc - leaf.not_valid_before_utc < 1.5 * timedelta(seconds=HOUR)


async def test_a_restart_of_its_agent_costs_no_certificate(place: Path) -> None:
    async with spire(place) as made:
        await made.register(life=HOUR)
        async with follows(place, made) as running:
            first = await running.first()
            await made.agent.stop()
            away = await running.event("retrying", kind="transient", serving="the current certificate")
            assert "UNAVAILABLE" in away["cause"]
            assert running.chain()[0] == first
            await made.agent.start()
            assert await running.more() != first
            assert running.status().failure is None


async def test_an_outage_of_its_server_is_silent_and_ends_by_itself(place: Path) -> None:
    async with spire(place) as made:
        await made.register()
        async with follows(place, made) as running:
            await running.first()
            await running.more()
            await made.server.stop()
            before = len(running.events.named("retrying"))
            await anyio.sleep(LIFE / 2)  # the time in which it would have renewed
            assert len(running.events.named("retrying")) == before
            await made.server.start()
            await running.more()
            assert not running.events.named("expired")


async def test_its_agent_restarted_without_its_server_keeps_what_is_served_and_so_does_a_restart_of_ours(
    place: Path,
) -> None:
    async with spire(place) as made:
        await made.register(life=HOUR)
        async with follows(place, made) as running:
            first = await running.first()
        await made.server.stop()
        await made.agent.stop()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(made.agent.start)  # it opens no socket before the server is back
            async with follows(place, made) as running:
                restored = await running.event("restored")
                assert restored["serial"] == serial_hex(first)
                await running.event("retrying", kind="transient", serving="the current certificate")
                assert running.chain()[0] == first
                assert running.bundle
                await made.server.start()
                assert await running.more() != first


async def test_a_rotation_of_its_authority_is_in_the_bundle_before_the_first_leaf(place: Path) -> None:
    async with spire(place) as made:
        await made.register()
        async with follows(place, made) as running:
            first = await running.first()
            old = await made.authority("prepare")
            await running.event("trust_changed", anchors=2)
            assert key_id(running.chain()[0]) == key_id(first)
            new = await made.authority("activate", old)
            while key_id(running.chain()[0]) == key_id(first):
                await running.more()
            assert key_id(running.chain()[0]) == new
            await made.authority("taint", key_id(first))
            await made.authority("revoke", key_id(first))
            await running.event("old_anchors_kept")
            await running.event("trust_changed", anchors=1)
            assert [key_id(anchor) for anchor in running.bundle if extension(anchor, x509.AuthorityKeyIdentifier)] in (
                [],
                [new],
            )
            await running.more()
            assert not running.events.named("expired")


async def test_a_federated_trust_domain_has_a_bundle_of_its_own(place: Path) -> None:
    now = datetime.now(UTC)
    root = make_ca("other root", not_before=now - timedelta(days=1), not_after=now + timedelta(days=1)).certificate
    (place / "other.pem").write_bytes(write_pem([root]))
    async with spire(place) as made:
        theirs = ["-id", "spiffe://other.example", "-path", str(place / "other.pem"), "-format", "pem"]
        await made.ask("bundle", "set", *theirs)
        await made.register(URI, "-federatesWith", "spiffe://other.example")
        async with follows(place, made, federated=["other.example"]) as running:
            await running.first()
            assert await federated(running, "other.example") == (root,)
            assert root not in running.bundle
            await made.ask("bundle", "delete", "-id", "spiffe://other.example", "-mode", "dissociate")
            await running.event("federated_trust_withdrawn")
            assert running.parts.store.snapshot["spiffe://other.example"] is None
