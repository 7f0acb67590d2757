"""The whole agent and a real Envoy with the whole istiod, through renewals, new CAs and restarts."""

import json
from pathlib import Path

from cryptography import x509
from fakes.agents import agent, agent_by_environment
from fakes.ca_servers import TRUST_DOMAIN, WEB
from fakes.envoys import client, envoy
from fakes.istio_parts import ISTIOD, SDS_SOCKET, Istiod, add_root, intermediate, istiod, pilot_agent, plugged, replace
from fakes.kubernetes import Kubernetes

from sds_agent.pki.certificates import read_pem, subject_alternative_uris

CLIENT = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/client"


def configured(folder: Path, cluster: Kubernetes, server: Istiod, socket: Path = Path("sds.sock")) -> Path:
    """The agent's configuration: two workloads, each with a token of its own."""
    (folder / "roots.pem").write_bytes(server.roots)
    names = ("default", "client")
    for name, account in zip(names, ("web", "client"), strict=True):
        token = cluster.issuer.token("RS256", sub=f"system:serviceaccount:default:{account}")
        (folder / f"{name}.token").write_text(token)
    istio = {"type": "istio", "address": server.address, "ca_file": "roots.pem", "server_name": ISTIOD}
    config = {
        "trust_domain": TRUST_DOMAIN,
        "state_dir": "state",
        "sds": {"socket": str(socket)},
        "authorities": {name: {**istio, "token_file": f"{name}.token"} for name in names},
        "workloads": [
            {"name": "default", "spiffe_id": WEB, "ttl": "6s", "authority": "default", "output": "certs"},
            {"name": "client", "spiffe_id": CLIENT, "ttl": "1h", "authority": "client"},
        ],
    }
    file = folder / "sds-agent.yaml"
    file.write_text(json.dumps(config))
    return file


def chain(folder: Path) -> tuple[x509.Certificate, ...]:
    """The certificates in the files that the agent keeps."""
    return read_pem((folder / "certs/cert-chain.pem").read_bytes())


async def test_an_envoy_gets_the_certificates_of_istiod_and_their_renewals(tmp_path: Path, cluster: Kubernetes) -> None:
    """The first by a token, the rest by the current certificate: there is no token any more."""
    async with (
        istiod(tmp_path, cluster, plugged(tmp_path)) as server,
        agent(configured(tmp_path, cluster, server)) as running,
        envoy(running.socket, tmp_path) as proxy,
    ):
        await proxy.ready()
        (tmp_path / "default.token").unlink()
        visitor, port = await client(running.socket, tmp_path), await proxy.port()
        seen = []
        for count in (1, 2, 3):
            await running.event("acked", names="default", count=count)
            seen.append(await visitor.request(port))
        assert len(set(seen)) == 3
        assert running.events("certificate_not_taken") == running.events("retrying") == []


async def test_a_running_agent_follows_the_new_intermediate_and_roots_of_istiod(
    tmp_path: Path, cluster: Kubernetes
) -> None:
    directory = plugged(tmp_path)
    several = {"ISTIO_MULTIROOT_MESH": "true"}
    async with (
        istiod(tmp_path, cluster, directory, environment=several) as server,
        agent(configured(tmp_path, cluster, server)) as running,
    ):
        await running.event("ready")
        both = add_root(tmp_path, intermediate(tmp_path, "again"))
        replace(directory, tmp_path / "again")
        await running.event("trust_changed", authority="default", anchors=2)
        await running.event("output_written", secret="default", count=len(running.events("output_written")) + 1)
        assert set(read_pem((tmp_path / "certs/root-cert.pem").read_bytes())) == set(read_pem(both))
        assert chain(tmp_path)[1:] == read_pem((directory / "ca-cert.pem").read_bytes())
        assert running.events("retrying") == []


async def test_the_agent_uses_its_token_at_an_istiod_that_comes_back_with_another_root(
    tmp_path: Path, cluster: Kubernetes
) -> None:
    """While istiod is down the agent serves the current certificate; the new istiod does not accept that one."""
    (tmp_path / "new").mkdir()
    async with istiod(tmp_path, cluster, plugged(tmp_path)) as before:
        config = configured(tmp_path, cluster, before)
        port = int(before.address.rpartition(":")[2])
        async with agent(config) as running:
            await running.event("ready")
            await before.program.stop()
            reported = await running.event("retrying", workload="default")
            assert (reported["kind"], reported["serving"]) == ("transient", "the current certificate")
            async with istiod(tmp_path, cluster, plugged(tmp_path / "new"), port=port) as after:
                (tmp_path / "roots.pem").write_bytes(after.roots)
                await running.event("certificate_not_taken", status="UNAVAILABLE")
                await running.event("trust_changed", authority="default", anchors=2)
                await running.event("renewed", workload="default")


async def test_the_environment_of_a_pilot_agent_configures_ours(tmp_path: Path, cluster: Kubernetes) -> None:
    async with istiod(tmp_path, cluster, plugged(tmp_path)) as server:
        (tmp_path / "token").write_text(cluster.issuer.token("RS256"))
        (tmp_path / "roots.pem").write_bytes(server.roots)
        environment = {
            "CA_ADDR": server.address.replace("127.0.0.1", "localhost"),
            "CA_ROOT_CA": str(tmp_path / "roots.pem"),
            "TRUST_DOMAIN": TRUST_DOMAIN,
            "POD_NAMESPACE": "default",
            "SERVICE_ACCOUNT": "web",
            "SECRET_TTL": "0h0m6s",
            "ECC_SIGNATURE_ALGORITHM": "ECDSA",
            "OUTPUT_CERTS": str(tmp_path / "certs"),
            "ISTIO_META_CLUSTER_ID": "Kubernetes",
            "SDS_AGENT__AUTHORITIES__ISTIO__TOKEN_FILE": str(tmp_path / "token"),
            "SDS_AGENT__STATE_DIR": str(tmp_path / "state"),
        }
        async with agent_by_environment(environment, tmp_path / "sds.sock") as running:
            await running.event("output_written", secret="default", count=3)
    assert subject_alternative_uris(chain(tmp_path)[0]) == (WEB,)


async def test_pilot_agent_leaves_the_certificates_to_our_agent(
    tmp_path: Path, place: Path, cluster: Kubernetes
) -> None:
    """It finds a socket where its own would be, asks no CA, and its Envoy gets and renews what is served there."""
    (place / SDS_SOCKET.parent).mkdir(parents=True)
    async with (
        istiod(tmp_path, cluster, plugged(tmp_path)) as server,
        agent(configured(tmp_path, cluster, server, place / SDS_SOCKET)) as running,
    ):
        await running.event("ready")
        async with pilot_agent(place, "127.0.0.1:1", server.roots, None, {}) as other:
            await other.program.line("Existing workload SDS socket found")
            await other.envoy.ready()
            visitor, port = await client(other.socket, tmp_path), await other.envoy.port()
            seen = []
            for count in (1, 2):
                await running.event("acked", names="default", count=count)
                seen.append(await visitor.request(port))
    assert len(set(seen)) == 2
