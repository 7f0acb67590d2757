"""Certificates that outlive the agent: served at once after a restart, and believed no more than what a CA sends."""

import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import msgspec
import pytest
from cryptography import x509
from fakes.authorities import ScriptedAuthority, Step, UpstreamCa, answering, failing
from fakes.clocks import HandClock
from fakes.events import Events, recorded
from fakes.hierarchy import URI
from msgspec import structs

from sds_agent.authority.protocol import ErrorKind
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.gate import Gate
from sds_agent.issuance.issuer import Issuer
from sds_agent.issuance.kept import Keeper, KeepError, KeptCertificate
from sds_agent.issuance.offer import Workload
from sds_agent.issuance.trust import Trust
from sds_agent.pki.certificates import read_pem
from sds_agent.pki.keys import KeyType
from sds_agent.secrets.model import BundleSecret
from sds_agent.secrets.store import SecretStore

HOUR = timedelta(hours=1)
WORKLOAD = Workload("default", SpiffeId.parse(URI), KeyType.EC_P256, HOUR, "upstream", ("default",))
DOWN = failing(ErrorKind.TRANSIENT, "the CA is down")


def anchors(store: SecretStore) -> set[x509.Certificate]:
    """What the bundle has in it."""
    bundle = store.snapshot["ROOTCA"]
    assert isinstance(bundle, BundleSecret)
    return set(read_pem(bundle.anchors_pem))


class Machine:
    """What stays when the agent is restarted: the disk, the clock and the CA."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "certificates"
        self.clock = HandClock()
        self.ca = UpstreamCa(self.clock.now)

    @property
    def file(self) -> Path:
        (file,) = self.directory.iterdir()
        return file

    @asynccontextmanager
    async def agent(self, *script: Step) -> AsyncIterator[tuple[SecretStore, Events, ScriptedAuthority]]:
        """One run of the agent, inside this context."""
        store, authority = SecretStore(["default", "ROOTCA"]), ScriptedAuthority(*script)
        self.trust = Trust(store, ["ROOTCA"], self.clock)
        issuer = Issuer(
            WORKLOAD,
            authority,
            store=store,
            trust=self.trust,
            gate=Gate(),
            clock=self.clock,
            keeper=Keeper(self.directory),
        )
        with recorded() as events:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(issuer.run)
                yield store, events, authority
                tasks.cancel_scope.cancel()

    async def issue(self) -> str:
        """Run an agent until its certificate is kept; returns the certificate's version."""
        async with self.agent(answering(self.ca)) as (store, events, _):
            await events.wait("issued")
            with anyio.fail_after(10):
                while not (self.directory.exists() and list(self.directory.glob("*.json"))):
                    await anyio.lowlevel.checkpoint()
            secret = store.snapshot["default"]
            assert secret is not None
            return secret.version


async def test_first_start_has_nothing_to_restore_and_says_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    async with machine.agent(answering(machine.ca)) as (_, events, _authority):
        await events.wait("issued")
        assert events.named("restored") == events.named("not_restored") == []


async def test_what_is_kept_tells_when_it_was_issued(tmp_path: Path) -> None:
    """Not when the CA, that backdates, says it began: its renewal would come early after each restart."""
    machine = Machine(tmp_path)
    await machine.issue()
    kept = Keeper(machine.directory).load(WORKLOAD.identity)
    assert kept is not None
    assert kept.issued == machine.clock.now()


async def test_restored_certificate_is_withheld_when_it_expires_in_an_outage(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    await machine.issue()
    async with machine.agent(DOWN) as (store, events, _):
        await events.wait("restored")
        await machine.clock.asleep(2)
        machine.clock.elapse(HOUR)
        await events.wait("expired")
        assert store.snapshot["default"] is None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_restored_workloads_of_an_old_and_a_new_root_are_all_trusted(
    tmp_path: Path, order: tuple[int, int]
) -> None:
    """The root changed between two renewals: whichever is restored last, peers hold leaves from both."""
    machine = Machine(tmp_path)
    store, cas = SecretStore(["a", "b", "ROOTCA"]), (machine.ca, UpstreamCa(machine.clock.now, "new"))
    trust = Trust(store, ["ROOTCA"], machine.clock)

    def issuer(name: str, script: Step) -> Issuer:
        workload = Workload(name, SpiffeId.parse(f"spiffe://demo.example/{name}"), KeyType.EC_P256, HOUR, "up", (name,))
        keeper, clock = Keeper(machine.directory), machine.clock
        return Issuer(
            workload, ScriptedAuthority(script), store=store, trust=trust, gate=Gate(), clock=clock, keeper=keeper
        )

    for name, ca in zip("ab", cas, strict=True):
        with recorded() as events:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(issuer(name, answering(ca)).run)
                await events.wait("issued")
                await machine.clock.asleep(2)
                tasks.cancel_scope.cancel()
    store, restarted = SecretStore(["a", "b", "ROOTCA"]), "ab"
    trust = Trust(store, ["ROOTCA"], machine.clock)
    with recorded() as events:
        async with anyio.create_task_group() as tasks:
            for number in order:
                tasks.start_soon(issuer(restarted[number], DOWN).run)
            await events.wait("restored", count=2)
            assert anchors(store) == {ca.root.certificate for ca in cas}
            tasks.cancel_scope.cancel()


async def test_what_a_restored_certificate_chains_to_stays_though_the_ca_tells_it_no_more(tmp_path: Path) -> None:
    """The CA got a new root while the agent was away. Peers trust this machine's bundle, and refused it otherwise."""
    machine = Machine(tmp_path)
    await machine.issue()
    new = UpstreamCa(machine.clock.now, "new").root.certificate
    async with machine.agent(DOWN) as (store, events, _):
        await events.wait("restored")
        machine.trust.update("upstream", (new,))
        assert anchors(store) == {machine.ca.root.certificate, new}
        await machine.clock.asleep(2)


async def test_restarted_agent_serves_at_once_what_is_still_valid_though_the_ca_is_down(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    version = await machine.issue()
    async with machine.agent(DOWN) as (store, events, authority):
        await events.wait("restored")
        secret, bundle = store.snapshot["default"], store.snapshot["ROOTCA"]
        assert secret is not None
        assert secret.version == version, "the same content, so no Envoy is disturbed"
        assert bundle is not None
        assert authority.requests == [], "and nothing is asked before it is due"


async def test_it_is_renewed_when_the_first_agent_would_have_renewed_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    await machine.issue()
    machine.clock.elapse(HOUR * 0.56)
    async with machine.agent(answering(machine.ca)) as (_, events, authority):
        await events.wait("restored")
        await events.wait("renewed")
        assert authority.requests[0].current is not None, "a CA that renews over mTLS is shown the current certificate"


async def test_expired_one_is_not_served(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    await machine.issue()
    machine.clock.elapse(HOUR * 2)
    async with machine.agent(DOWN) as (store, events, _):
        assert "expired" in str((await events.wait("not_restored"))["cause"])
        assert store.snapshot["default"] is None


@pytest.mark.parametrize("damage", [b"", b"{", b'{"spiffe_id": 1}', b"\xff\xfe"])
async def test_damaged_file_is_told_and_replaced_by_the_next_certificate(tmp_path: Path, damage: bytes) -> None:
    machine = Machine(tmp_path)
    await machine.issue()
    machine.file.write_bytes(damage)
    async with machine.agent(answering(machine.ca)) as (_, events, _authority):
        assert "damaged" in str((await events.wait("not_restored"))["cause"])
        await events.wait("issued")


async def test_damaged_key_is_told_and_replaced_by_the_next_certificate(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    await machine.issue()
    keeper = Keeper(machine.directory)
    kept = keeper.load(WORKLOAD.identity)
    assert kept is not None
    keeper.save(structs.replace(kept, private_key_pem=kept.private_key_pem.replace("M", "-", 1)))
    async with machine.agent(answering(machine.ca)) as (_, events, _authority):
        assert "the private key kept for" in str((await events.wait("not_restored"))["cause"])
        await events.wait("issued")


async def test_file_that_cannot_be_read_is_told_and_the_ca_asked(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    await machine.issue()
    file = machine.file
    file.unlink()
    file.mkdir()
    async with machine.agent(answering(machine.ca)) as (_, events, _authority):
        assert "cannot read" in str((await events.wait("not_restored"))["cause"])
        await events.wait("issued")


async def test_key_of_another_certificate_is_not_served(tmp_path: Path) -> None:
    machine, other = Machine(tmp_path), Machine(tmp_path / "other")
    await machine.issue()
    await other.issue()
    keeper, foreign = Keeper(machine.directory), Keeper(other.directory)
    ours, theirs = keeper.load(WORKLOAD.identity), foreign.load(WORKLOAD.identity)
    assert ours is not None
    assert theirs is not None
    keeper.save(type(ours)(ours.spiffe_id, ours.issued_at, ours.chain_pem, ours.anchors_pem, theirs.private_key_pem))
    async with machine.agent(DOWN) as (store, events, _):
        await events.wait("not_restored")
        assert store.snapshot["default"] is None


async def test_nobody_else_may_read_it_and_nothing_shows_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    await machine.issue()
    assert stat.S_IMODE(machine.file.stat().st_mode) == 0o600
    assert stat.S_IMODE(machine.directory.stat().st_mode) == 0o700
    kept = Keeper(machine.directory).load(WORKLOAD.identity)
    assert kept is not None
    assert kept.private_key_pem.splitlines()[1] not in repr(kept) + str(kept)


@pytest.mark.parametrize("obstacle", ["a file", "a directory for everybody"])
async def test_disk_that_cannot_be_written_does_not_stop_the_service(tmp_path: Path, obstacle: str) -> None:
    machine = Machine(tmp_path)
    if obstacle == "a file":
        machine.directory.write_text("where the directory should be")
    else:
        machine.directory.mkdir()
        machine.directory.chmod(0o777)
    async with machine.agent(answering(machine.ca)) as (store, events, _):
        assert (await events.wait("not_kept"))["level"] == "error"
        assert obstacle == "a file" or list(machine.directory.iterdir()) == []
        assert store.snapshot["default"] is not None


def test_file_of_another_identity_is_not_taken(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path)
    other = SpiffeId.parse("spiffe://demo.example/other")
    foreign = KeptCertificate("spiffe://demo.example/x", 0.0, "", "", "")
    keeper._file(str(other)).write_bytes(msgspec.json.encode(foreign))
    with pytest.raises(KeepError, match="another identity"):
        keeper.load(other)
