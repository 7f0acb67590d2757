"""Revocation lists from a CA to real Envoys: a revoked peer is refused, and nobody else ever is."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from cryptography import x509
from fakes.agents import Agent, agent
from fakes.envoys import Client, client, envoy
from fakes.hierarchy import make_ca
from fakes.step_ca_server import StepCaStandIn, write_jwk

from sds_agent.pki.certificates import read_pem

REFUSED = (OSError, anyio.BrokenResourceError, anyio.EndOfStream)
"""What a client sees of a server that refuses its certificate; ssl.SSLError is an OSError."""
SECOND = timedelta(seconds=1)
WORKLOADS = ("default", "client", "revoked")


def write_config(directory: Path, ca: StepCaStandIn, *, client_ttl: str = "24h") -> Path:
    authority = {
        "type": "step-ca",
        "url": ca.server.url,
        "provisioner": "sds",
        "fingerprint": ca.fingerprint,
        **{key: str(file) for key, file in write_jwk(directory, ca).items()},
        "revocation_lists": True,
        "refresh_every": "1s",
    }
    config = {
        "trust_domain": "demo.example",
        "state_dir": str(directory / "state"),
        "sds": {"socket": str(directory / "sds.sock")},
        "authorities": {"step": authority},
        "workloads": [
            {
                "name": name,
                "spiffe_id": f"spiffe://demo.example/{name}",
                "ttl": client_ttl if name == "client" else "24h",
            }
            for name in WORKLOADS
        ],
    }
    file = directory / "sds-agent.yaml"
    file.write_text(json.dumps(config))
    return file


@pytest.fixture
async def ca() -> AsyncIterator[StepCaStandIn]:
    async with StepCaStandIn().serving() as running:
        yield running


class Mesh:
    """An agent, two Envoys and two clients, whose identities are all from the agent."""

    def __init__(self, running: Agent, ports: tuple[int, ...], good: Client, bad: Client) -> None:
        self.running = running
        self.ports = ports
        self.good = good
        self.bad = bad

    @property
    def renewals(self) -> int:
        """How often the good client's certificate was renewed so far."""
        return len(self.running.events("renewed", workload="client"))

    async def everybody_is_taken(self) -> None:
        for port in self.ports:
            for each in (self.good, self.bad):
                await each.request(port)

    async def loaded(self, version: str) -> None:
        """Wait until both Envoys have this bundle."""
        pushes: dict[str, object] = {"names": "ROOTCA", "version": version, "node": "envoy-under-test"}
        await self.running.event("sent", count=len(self.ports), **pushes)
        for each in self.running.events("sent", **pushes):
            await self.running.event("acked", nonce=each["nonce"])


@asynccontextmanager
async def mesh(config: Path) -> AsyncIterator[Mesh]:
    directory = config.parent
    places = (directory / "one", directory / "other")
    for place in places:
        place.mkdir()
    async with (
        agent(config) as running,
        envoy(running.socket, places[0]) as one,
        envoy(running.socket, places[1], api_type="DELTA_GRPC") as other,
    ):
        ports = []
        for each in (one, other):
            await each.ready()
            ports.append(await each.port())
        good, bad = [await client(running.socket, directory, name) for name in ("client", "revoked")]
        yield Mesh(running, tuple(ports), good, bad)
        assert running.events("nacked") == []


def leaf_of(directory: Path, name: str) -> x509.Certificate:
    return read_pem((directory / f"{name}.pem").read_bytes())[0]


async def test_a_revoked_peer_is_refused_and_a_good_one_goes_on(tmp_path: Path, ca: StepCaStandIn) -> None:
    ca.revoke()
    async with mesh(write_config(tmp_path, ca)) as running:
        await running.running.event("revocation_on")
        await running.loaded(str((await running.running.event("lists_changed"))["version"]))
        await running.everybody_is_taken()
        ca.revoke(leaf_of(tmp_path, "revoked"))
        await running.loaded(str((await running.running.event("lists_changed", count=2))["version"]))
        for port in running.ports:
            with pytest.raises(REFUSED):
                await running.bad.request(port)
            await running.good.request(port)
        assert running.running.events("revocation_off") == []


async def test_a_ca_without_a_list_costs_nobody_a_handshake(tmp_path: Path, ca: StepCaStandIn) -> None:
    async with mesh(write_config(tmp_path, ca)) as running:
        cause = (await running.running.event("revocation_off"))["causes"][0]
        assert "no usable revocation list of 'CN=step intermediate'" in cause
        assert 'set "crl": {"enabled": true' in (await running.running.event("lists_not_refreshed"))["cause"]
        await running.everybody_is_taken()


async def test_certificates_without_the_distribution_point_are_all_taken(tmp_path: Path, ca: StepCaStandIn) -> None:
    """Envoy refuses them all beside step-ca's list, so that list does not go out."""
    ca.names_point = False
    ca.revoke()
    async with mesh(write_config(tmp_path, ca)) as running:
        (cause,) = (await running.running.event("lists_left_out"))["causes"]
        assert "have the CA write that CRL distribution point into every certificate" in cause
        await running.running.event("revocation_off")
        await running.everybody_is_taken()


async def test_a_list_that_ends_is_taken_out_before_envoys_refuse_everybody(tmp_path: Path, ca: StepCaStandIn) -> None:
    ca.revoke()
    async with mesh(write_config(tmp_path, ca)) as running:
        await running.running.event("revocation_on")
        ca.revoke(life=8 * SECOND)  # only now: Envoys may take long to start
        await running.running.event("revocation_off")
        await running.loaded(str(running.running.events("lists_changed")[-1]["version"]))
        await running.everybody_is_taken()


async def test_a_peer_below_a_new_intermediate_is_taken_before_and_after_its_list_is_there(
    tmp_path: Path, ca: StepCaStandIn
) -> None:
    """The lists go out of both Envoys before he shows his certificate, and come back with the new one."""
    ca.revoke()
    async with mesh(write_config(tmp_path, ca, client_ttl="6s")) as running:
        await running.running.event("revocation_on")
        ca.signer = make_ca("another intermediate", ca.root, **ca.validity)
        await running.running.event("renewed", workload="client", count=1 + running.renewals)
        while read_pem((tmp_path / "client.pem").read_bytes())[1] != ca.signer.certificate:
            await running.running.event("renewed", workload="client", count=1 + running.renewals)
            running.good = await client(running.running.socket, tmp_path)
        await running.everybody_is_taken()
        assert len(running.running.events("revocation_off")) == 1
        ca.revoke()
        await running.running.event("revocation_on", count=2)
        await running.loaded(str(running.running.events("lists_changed")[-1]["version"]))
        running.good = await client(running.running.socket, tmp_path)
        await running.everybody_is_taken()
