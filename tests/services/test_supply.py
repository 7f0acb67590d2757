"""Certificates that something else makes, with their keys: served as they come, without an attempt that times out."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from fakes.authorities import ScriptedSupplier, UpstreamCa, made
from fakes.clocks import HAND_LOOP, HandClock
from fakes.events import Events, recorded
from fakes.hierarchy import DAY, HOUR, URI, Key, new_key
from msgspec import structs

from sds_agent.authority.protocol import AuthorityError, ErrorKind, Issuance, Supplied, Supplier
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.cache import CertificateCache, WorkloadCache
from sds_agent.issuance.issuer import Issuer
from sds_agent.issuance.publication import PublicationTarget
from sds_agent.issuance.queue import IssuanceQueue
from sds_agent.issuance.requester import CA_TIMEOUT
from sds_agent.issuance.schedule import FLOOR, LONGEST_RETRY_SUPPLIED, Renewal
from sds_agent.issuance.source import Upstream
from sds_agent.issuance.trust import Trust
from sds_agent.issuance.workload import Workload
from sds_agent.pki.certificates import has_key, read_pem, write_pem
from sds_agent.pki.keys import KeyType, PublicKey
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import SecretStore

SECOND = timedelta(seconds=1)
LONG = timedelta(seconds=10 * CA_TIMEOUT)
DOWN = AuthorityError(ErrorKind.TRANSIENT, "the source is down")


class Bench:
    """One workload whose certificates are supplied; the cache, if there is a directory, outlives an agent."""

    def __init__(self, events: Events, directory: Path | None = None) -> None:
        self.events = events
        self.directory = directory
        self.clock = HandClock()
        self.ca = UpstreamCa(self.clock.now)
        self.queue = IssuanceQueue(slots=1)
        self.changes: list[frozenset[str]] = []

    @asynccontextmanager
    async def serving(self, supplier: Supplier, *, name: str = "upstream") -> AsyncIterator[Issuer]:
        """An agent, inside this context."""
        workload = Workload("default", SpiffeId.parse(URI), KeyType.EC_P256, HOUR, name, ("default",))
        self.store = SecretStore(["default", "ROOTCA"])
        self.trust = Trust(self.store, ["ROOTCA"], self.clock)
        self.issuer = Issuer(
            structs.replace(workload, renewal=Renewal(jitter=0)),
            Upstream(supplier, self.queue),
            PublicationTarget(self.store, self.trust),
            clock=self.clock,
            cache=None if self.directory is None else WorkloadCache(workload, CertificateCache(self.directory)),
            randomness=lambda: 0.999,
        )
        with self.store.watching(self.changes.append):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.issuer.run)
                yield self.issuer
                tasks.cancel_scope.cancel()

    @property
    def leaf(self) -> x509.Certificate:
        """The leaf that is served, with its key."""
        secret = self.store.snapshot["default"]
        assert isinstance(secret, CertificateSecret)
        leaf = read_pem(secret.chain_pem)[0]
        key = load_pem_private_key(secret.private_key_pem, None).public_key()
        assert isinstance(key, PublicKey)
        assert has_key(leaf, key)
        return leaf

    @property
    def anchors(self) -> set[x509.Certificate]:
        """What the bundle has in it."""
        bundle = self.store.snapshot["ROOTCA"]
        assert isinstance(bundle, BundleSecret)
        return set(read_pem(bundle.anchors_pem))

    async def waiting(self, supplier: ScriptedSupplier) -> None:
        """Let time pass in small steps until the attempt waits for what comes next."""
        with anyio.fail_after(10):
            while not supplier.waiting:
                await checkpoint()
                await self.clock.asleep()
                self.clock.elapse(FLOOR / 4)
            await anyio.wait_all_tasks_blocked()

    def forget(self) -> None:
        """Count changes of the store from here on."""
        self.changes.clear()


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return HAND_LOOP


@pytest.fixture
def bench() -> Iterator[Bench]:
    with recorded() as events:
        yield Bench(events)


async def test_a_source_that_is_silent_for_long_is_waited_for_without_an_error(bench: Bench) -> None:
    supplier = ScriptedSupplier()
    async with bench.serving(supplier) as issuer:
        await bench.waiting(supplier)
        bench.clock.elapse(LONG)
        await anyio.wait_all_tasks_blocked()
        assert (issuer.status.attempt, issuer.status.failure, supplier.calls) == ("waiting", None, 1)
        given = made(bench.ca)
        supplier.give(given)
        event = await bench.events.wait("issued")
        assert write_pem([bench.leaf]) in given.issuance.chain_pem
        assert (event["serial"], "renew_at" in event, "took_ms" in event) == (
            f"{bench.leaf.serial_number:x}",
            False,
            False,
        )
    assert bench.events.named("retrying") == []


async def test_a_source_that_waits_takes_no_turn_of_others(bench: Bench) -> None:
    """A CA answers a few at a time; as many workloads that only wait would starve all the others."""
    supplier = ScriptedSupplier()
    async with bench.serving(supplier):
        await bench.waiting(supplier)
        with anyio.fail_after(1):
            async with bench.queue.slot(lambda: (False, bench.clock.now())):
                pass


async def test_the_next_certificate_is_served_when_it_comes_and_not_when_half_the_life_is_over(bench: Bench) -> None:
    supplier = ScriptedSupplier(made(bench.ca))
    async with bench.serving(supplier) as issuer:
        await bench.events.wait("issued")
        for count in (1, 2, 3):
            await bench.waiting(supplier)
            assert (issuer.status.renew_at, issuer.status.attempt) == (None, "waiting")
            before = bench.leaf
            supplier.give(made(bench.ca))
            await bench.events.wait("renewed", count=count)
            assert bench.leaf != before
        await bench.waiting(supplier)
        calls = supplier.calls
        for _ in range(30):
            bench.clock.elapse(timedelta(minutes=1))
            await anyio.wait_all_tasks_blocked()
        assert supplier.calls == calls


async def test_the_same_certificate_again_changes_nothing(bench: Bench) -> None:
    given = made(bench.ca)
    supplier = ScriptedSupplier(given)
    async with bench.serving(supplier) as issuer:
        await bench.waiting(supplier)
        supplier.give(DOWN)
        await bench.events.wait("retrying")
        bench.forget()
        supplier.give(given)
        await bench.waiting(supplier)
        assert (bench.changes, issuer.status.failure) == ([], None)
        assert bench.events.named("renewed") == []


async def test_new_anchors_with_the_same_certificate_are_served(bench: Bench) -> None:
    given, new = made(bench.ca), UpstreamCa(bench.clock.now, "new").root.certificate
    supplier = ScriptedSupplier(given)
    async with bench.serving(supplier):
        await bench.waiting(supplier)
        supplier.give(DOWN)
        await bench.events.wait("retrying")
        bench.forget()
        both = write_pem([bench.ca.root.certificate, new])
        supplier.give(structs.replace(given, issuance=Issuance(given.issuance.chain_pem, both)))
        await bench.waiting(supplier)
        assert bench.changes == [{"ROOTCA"}]
        assert bench.anchors == {bench.ca.root.certificate, new}


async def test_a_source_that_repeats_itself_without_end_keeps_no_processor_busy(bench: Bench) -> None:
    class Endless(ScriptedSupplier):
        async def supply(self, identity: SpiffeId, _held: bytes | None) -> Supplied:
            return await super().supply(identity, None)

    supplier = Endless(made(bench.ca))
    async with bench.serving(supplier):
        await bench.events.wait("issued")
        for _ in range(10):
            await bench.clock.asleep()
            bench.clock.elapse(FLOOR)
            await anyio.wait_all_tasks_blocked()
        assert supplier.calls <= 11


@pytest.mark.parametrize("kind", ErrorKind)
async def test_a_source_that_fails_is_asked_again_within_seconds_whatever_the_cause(
    bench: Bench, kind: ErrorKind
) -> None:
    """It is on this machine: a certificate that comes after all is to be served soon."""
    supplier = ScriptedSupplier(made(bench.ca))
    async with bench.serving(supplier) as issuer:
        await bench.waiting(supplier)
        supplier.give(AuthorityError(kind, "no"))
        for count in range(1, 10):
            event = await bench.events.wait("retrying", count=count)
            assert event["serving"] == "the current certificate"
            failure = issuer.status.failure
            assert failure is not None
            assert failure.next_attempt - failure.at <= LONGEST_RETRY_SUPPLIED
            if count == 9:
                supplier.give(made(bench.ca))
            for _ in range(2):  # the clock's longest sleep is half of it
                await bench.clock.asleep()
                bench.clock.elapse(LONGEST_RETRY_SUPPLIED / 2)
        await bench.events.wait("renewed")


async def test_a_certificate_that_ends_is_withheld_while_the_next_is_waited_for(bench: Bench) -> None:
    supplier = ScriptedSupplier(made(bench.ca))
    async with bench.serving(supplier) as issuer:
        await bench.events.wait("issued")
        await bench.waiting(supplier)
        bench.clock.elapse(HOUR)
        await bench.events.wait("expired")
        assert bench.store.snapshot["default"] is None
        assert issuer.status.attempt == "waiting"
        supplier.give(made(bench.ca))
        await bench.events.wait("renewed")
        assert bench.leaf.not_valid_after_utc > bench.clock.now()


KEYS: dict[str, tuple[Key, str]] = {
    "P-521": (ec.generate_private_key(ec.SECP521R1()), "mismatch"),
    "P-224": (ec.generate_private_key(ec.SECP224R1()), "invalid"),
    "Ed25519": (ed25519.Ed25519PrivateKey.generate(), "invalid"),
    "RSA 1024": (rsa.generate_private_key(65537, 1024), "invalid"),  # noqa: S505 - weak on purpose
}


@pytest.mark.parametrize("name", KEYS)
async def test_a_key_that_envoys_refuse_of_each_other_is_not_served(bench: Bench, name: str) -> None:
    key, kind = KEYS[name]
    supplier = ScriptedSupplier(made(bench.ca, key=key))
    async with bench.serving(supplier):
        event = await bench.events.wait("retrying")
        assert event["kind"] == kind
        assert "the private key that came with the certificate is " in event["cause"]
        assert "make" in event["cause"]
        assert bench.store.snapshot["default"] is None


async def test_a_certificate_for_another_key_is_not_served(bench: Bench) -> None:
    """As while files are replaced one after the other."""
    good = made(bench.ca)
    supplier = ScriptedSupplier(structs.replace(good, private_key_pem=made(bench.ca).private_key_pem))
    async with bench.serving(supplier):
        assert (await bench.events.wait("retrying"))["kind"] == "mismatch"
        supplier.give(good)
        await bench.clock.asleep()
        bench.clock.elapse(SECOND)
        await bench.events.wait("issued")


async def test_a_certificate_that_is_not_valid_yet_is_served_once_it_is(bench: Bench) -> None:
    """The source has nothing else to give: what was refused has to be judged again."""
    begin = bench.clock.now() + timedelta(minutes=10)
    supplier = ScriptedSupplier(made(bench.ca, key=new_key(), not_before=begin, not_after=begin + DAY))
    async with bench.serving(supplier):
        await bench.events.wait("retrying")
        await bench.clock.asleep()
        bench.clock.elapse(timedelta(minutes=11))
        await bench.events.wait("issued")


async def test_a_key_that_is_garbage_is_refused_and_never_shown(bench: Bench) -> None:
    supplier = ScriptedSupplier(structs.replace(made(bench.ca), private_key_pem=b"very secret"))
    async with bench.serving(supplier):
        event = await bench.events.wait("retrying")
        assert event["kind"] == "invalid"
        assert "secret" not in str(event)


async def test_a_fault_in_an_adapter_is_reported_and_does_not_end_the_agent(bench: Bench) -> None:
    class Faulty(ScriptedSupplier):
        async def supply(self, identity: SpiffeId, held: bytes | None) -> Supplied:
            if not self.calls:
                self.calls += 1
                raise KeyError(held)
            return await super().supply(identity, held)

    supplier = Faulty(made(bench.ca))
    async with bench.serving(supplier):
        await bench.events.wait("fault")
        assert "the event fault" in (await bench.events.wait("retrying"))["cause"]
        await bench.clock.asleep()
        bench.clock.elapse(SECOND)
        await bench.events.wait("issued")


async def test_after_a_restart_the_certificate_is_served_before_the_source_speaks(tmp_path: Path) -> None:
    with recorded() as events:
        bench = Bench(events, tmp_path / "certificates")
        given = made(bench.ca)
        first = ScriptedSupplier(given)
        async with bench.serving(first):
            await events.wait("issued")
            await bench.waiting(first)
            leaf = bench.leaf
        silent = ScriptedSupplier()
        async with bench.serving(silent):
            await events.wait("restored")
            await bench.waiting(silent)
            assert bench.leaf == leaf
            silent.give(given)
            await bench.waiting(silent)
        assert [each["event"] for each in events.seen if each["event"] in {"issued", "renewed", "restored"}] == [
            "issued",
            "restored",
        ]
