"""An agent whose CA is Vault: what Envoys get over renewals, a restart of the server, a new root and an outage."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from fakes.clocks import HAND_LOOP, HandClock
from fakes.configurations import settings
from fakes.events import Events, recorded
from fakes.vault_server import VaultServer

from sds_agent import app
from sds_agent.live.agent import Agent
from sds_agent.pki.certificates import read_pem
from sds_agent.pki.validation.revocation import read_crls
from sds_agent.secrets.model import BundleSecret, CertificateSecret

TTL = timedelta(hours=1)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return HAND_LOOP


@pytest.fixture
def clock() -> HandClock:
    return HandClock(datetime.now(UTC))


@pytest.fixture
def vault(clock: HandClock) -> VaultServer:
    return VaultServer(now=clock.now, login_ttl=timedelta(minutes=90))


class VaultNode:
    """An agent with one workload, and its clock."""

    def __init__(self, parts: Agent, clock: HandClock, events: Events) -> None:
        self.parts = parts
        self.clock = clock
        self.events = events

    @property
    def chain(self) -> tuple[x509.Certificate, ...]:
        """What an Envoy gets."""
        served = self.parts.store.snapshot["web"]
        assert isinstance(served, CertificateSecret)
        return read_pem(served.chain_pem)

    @property
    def bundle(self) -> set[x509.Certificate]:
        """The trust bundle that an Envoy gets."""
        served = self.parts.store.snapshot["ROOTCA"]
        assert isinstance(served, BundleSecret)
        return set(read_pem(served.anchors_pem))

    @property
    def lists(self) -> dict[x509.Name, x509.CertificateRevocationList]:
        """The revocation lists that an Envoy gets, by their CAs."""
        served = self.parts.store.snapshot["ROOTCA"]
        assert isinstance(served, BundleSecret)
        return {each.issuer: each for each in read_crls(served.lists_pem)}

    async def next_attempt(self) -> None:
        """Let the time come at which the agent asks next."""
        (status,) = self.parts.workloads
        when = status.failure.next_attempt if status.failure is not None else status.renew_at
        assert when is not None
        self.clock.elapse(max(when - self.clock.now(), timedelta()) + timedelta(seconds=0.001))

    async def renewed(self) -> x509.Certificate:
        """Let the next renewal succeed."""
        before = len(self.events.named("renewed"))
        await self.next_attempt()
        await self.events.wait("renewed", count=before + 1)
        return self.chain[0]


@asynccontextmanager
async def running(folder: Path, vault: VaultServer, clock: HandClock, more: str = "") -> AsyncIterator[VaultNode]:
    """The agent as a configuration file has it, with its first certificate. `more` is a key of the authority."""
    (folder / "roots.pem").write_bytes(vault.http.roots_pem)
    (folder / "secret-id").write_text("the-secret-id")
    (folder / "secret-id").chmod(0o600)
    text = f"""
trust_domain: demo.example
state_dir: {folder / "state"}
sds: {{socket: {folder / "s"}}}
authorities:
  vault:
    type: vault
    url: {vault.http.url}
    ca_file: roots.pem
    role: web
    refresh_every: 1m
    auth: {{type: approle, role_id: the-role-id, secret_id_file: secret-id}}
    {more}
workloads: [{{name: web, spiffe_id: "spiffe://demo.example/web", ttl: 1h}}]
"""
    read = settings(folder, text)
    with recorded() as events:
        async with app.authorities(read, clock) as cas, app.agent(read, cas, clock) as parts:
            await events.wait("issued")
            yield VaultNode(parts, clock, events)


async def test_a_first_certificate_and_three_renewals(tmp_path: Path, vault: VaultServer, clock: HandClock) -> None:
    vault.login_ttl = timedelta(days=1)  # a renewal moves the clock by half an hour at once, past two thirds of an hour
    async with vault.serving(), running(tmp_path, vault, clock) as node:
        serials = {node.chain[0].serial_number} | {(await node.renewed()).serial_number for _ in range(3)}
        assert len(serials) == 4
        assert node.bundle == vault.roots
    assert vault.count("auth/approle/login") == 1


@pytest.mark.parametrize("token_lost", [False, True])
async def test_a_restart_of_the_server_ends_with_the_next_attempt(
    tmp_path: Path, vault: VaultServer, clock: HandClock, port: int, *, token_lost: bool
) -> None:
    vault.login_ttl = timedelta(days=1)  # as above
    async with AsyncExitStack() as server, AsyncExitStack() as agent:
        await server.enter_async_context(vault.serving(port=port))
        node = await agent.enter_async_context(running(tmp_path, vault, clock))
        first = node.chain[0]
        await server.aclose()
        await node.next_attempt()
        failed = await node.events.wait("retrying")
        assert "cannot be reached" in failed["cause"]
        assert node.chain[0] == first
        if token_lost:
            vault.tokens.clear()
        await server.enter_async_context(vault.serving(port=port))
        assert await node.renewed() != first
    assert vault.count("auth/approle/login") == 1 + token_lost


async def test_a_new_root_is_trusted_before_it_signs_and_the_old_one_while_it_is_needed(
    tmp_path: Path, vault: VaultServer, clock: HandClock
) -> None:
    (old,) = vault.roots
    async with vault.serving(), running(tmp_path, vault, clock) as node:
        new = vault.add_root("root two", default=False)
        changed = len(node.events.named("trust_changed"))
        clock.elapse(timedelta(minutes=1, seconds=1))
        await node.events.wait("trust_changed", count=changed + 1)
        assert node.bundle == {old, new}
        (vault.default,) = [number for number, each in vault.issuers.items() if each.certificate == new]
        leaf = await node.renewed()
        assert leaf.issuer == new.subject
        assert node.bundle == {old, new}


async def test_an_outage_costs_no_envoy_its_certificate(tmp_path: Path, vault: VaultServer, clock: HandClock) -> None:
    async with vault.serving(), running(tmp_path, vault, clock) as node:
        valid, vault.sealed = node.chain[0], True
        for number in range(1, 4):
            await node.next_attempt()
            failed = await node.events.wait("retrying", count=number)
            assert "Vault is sealed" in failed["cause"]
            assert node.chain[0] == valid
        vault.sealed = False
        assert await node.renewed() != valid


async def test_a_new_roots_list_comes_with_it_or_no_list_does(
    tmp_path: Path, vault: VaultServer, clock: HandClock
) -> None:
    """Beside the old list alone Envoys would refuse every certificate below the new root."""
    pushes: list[tuple[int, int]] = []

    async with vault.serving(), running(tmp_path, vault, clock, "revocation_lists: true") as node:

        def seen(_names: frozenset[str]) -> None:
            pushes.append((len(node.bundle), len(node.lists)))

        await node.events.wait("revocation_on", lists=1)
        old = node.chain[0]
        vault.revoked.append(old)
        with node.parts.store.watching(seen):
            new = vault.add_root("root two", default=False)
            clock.elapse(timedelta(minutes=1, seconds=1))
            await node.events.wait("revocation_on", lists=2)
            await node.events.wait("trust_changed", anchors=2)
            (vault.default,) = [number for number, each in vault.issuers.items() if each.certificate == new]
            (await node.renewed()).verify_directly_issued_by(new)
        assert (2, 1) not in pushes
        listing = node.lists[old.issuer]
        assert listing.get_revoked_certificate_by_serial_number(old.serial_number) is not None
        assert node.lists.keys() == {each.subject for each in vault.roots}
