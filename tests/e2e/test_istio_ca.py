"""The agent as a client of our own CA server, in Istio's protocol, with a real Envoy at the end of it."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fakes.agents import COMMAND, PATHS, agent, made
from fakes.envoys import client, envoy
from fakes.processes import Program, started

from sds_agent.pki.certificates import read_pem, subject_alternative_uris

WEB = "spiffe://demo.example/ns/default/sa/web"
CLIENT = "spiffe://demo.example/ns/default/sa/client"


@dataclass(frozen=True)
class Server:
    """A running CA, its configuration and its root."""

    file: Path
    address: str
    roots: Path

    def token(self, identity: str) -> Path:
        """A new join token, in a file."""
        path = self.file.with_name(identity.rpartition("/")[2] + ".token")
        made("ca", "token", str(self.file), identity, "--output", str(path))
        return path


@asynccontextmanager
async def ca_server(folder: Path) -> AsyncIterator[tuple[Server, Program]]:
    """`sds-agent ca serve` on an intermediate below an offline root, inside this context."""
    made("ca", "root", str(folder / "root"), "--trust-domain", "demo.example")
    made("ca", "intermediate", str(folder / "cluster1"), "--root", str(folder / "root"), "--name", "cluster1")
    file = folder / "ca.yaml"
    config = {
        "trust_domain": "demo.example",
        "listen": "127.0.0.1:0",
        "server_names": ["istiod.istio-system.svc"],
        "signer": {"cacerts": str(folder / "cluster1")},
        "callers": {"mtls": True, "join_tokens": str(folder / "tokens")},
        "audit": str(folder / "audit.jsonl"),
    }
    file.write_text(json.dumps(config))
    async with started([*COMMAND, "ca", "serve", str(file)], PATHS) as program:
        listening = json.loads(await program.line('"listening"'))
        yield Server(file, str(listening["address"]), folder / "cluster1" / "root-cert.pem"), program


def configured(folder: Path, server: Server) -> Path:
    """The agent's configuration: two workloads, each with an authority for its own token."""
    identities = {"default": (WEB, "6s"), "client": (CLIENT, "1h")}
    config = {
        "trust_domain": "demo.example",
        "state_dir": str(folder / "state"),
        "sds": {"socket": str(folder / "sds.sock")},
        "authorities": {
            name: {
                "type": "istio",
                "address": server.address,
                "ca_file": str(server.roots),
                "server_name": "istiod.istio-system.svc",
                "token_file": str(server.token(identity)),
            }
            for name, (identity, _) in identities.items()
        },
        "workloads": [
            {
                "name": name,
                "spiffe_id": identity,
                "ttl": ttl,
                "authority": name,
                "output": str(folder / f"{name}-certs"),
            }
            for name, (identity, ttl) in identities.items()
        ],
    }
    file = folder / "sds-agent.yaml"
    file.write_text(json.dumps(config))
    return file


def audited(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def chain(folder: Path) -> tuple[str, ...]:
    return subject_alternative_uris(read_pem((folder / "default-certs" / "cert-chain.pem").read_bytes())[0])


async def test_an_envoy_gets_certificates_of_our_ca_and_their_renewals(tmp_path: Path) -> None:
    """The first by a join token, which is spent then, and the rest by the current certificate."""
    async with (
        ca_server(tmp_path) as (server, _),
        agent(configured(tmp_path, server)) as running,
        envoy(running.socket, tmp_path) as proxy,
    ):
        await proxy.ready()
        visitor, port = await client(running.socket, tmp_path), await proxy.port()
        seen: list[str] = []
        for _ in range(3):  # on a busy machine some have been renewed before the first request
            count = 1 + len(running.events("acked", names="default")) if seen else 1
            await running.event("acked", names="default", count=count)
            seen.append(await visitor.request(port))
        assert len(set(seen)) == 3
        assert running.events("certificate_not_taken") == running.events("retrying") == []
        await running.event("output_written", secret="default", count=3)
    assert chain(tmp_path) == (WEB,)
    assert len(audited(tmp_path)) >= 4


async def test_the_agent_serves_the_current_certificate_while_the_ca_is_down(tmp_path: Path) -> None:
    async with ca_server(tmp_path) as (server, program), agent(configured(tmp_path, server)) as running:
        await running.event("ready")
        await program.stop()
        reported = await running.event("retrying", workload="default")
        assert (reported["kind"], reported["serving"]) == ("transient", "the current certificate")
        assert (tmp_path / "client.token").read_text().strip() not in "".join(running.program.lines)
