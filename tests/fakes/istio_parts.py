"""Istio's own programs, unchanged, as scripts/istio-interop builds them: the whole istiod, and pilot-agent."""

import base64
import json
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from fakes.ca_servers import AUDIENCE, ISSUER, TRUST_DOMAIN
from fakes.envoys import BINARY, Envoy, bootstrap
from fakes.hierarchy import Ca
from fakes.kubernetes import KEY_SET, Kubernetes
from fakes.processes import Program, started

from sds_agent.cli.main import main
from sds_agent.pki.certificates import read_pem
from sds_agent.pki.keys import PrivateKey

ISTIOD = "istiod.istio-system.svc"
"""The name in istiod's own certificate."""
ANYWHERE = "127.0.0.1:0"
SDS_SOCKET = Path("var/run/secrets/workload-spiffe-uds/socket")


def part(name: str) -> str:
    """The path of one of the programs."""
    path = Path(os.environ.get("ISTIO_PARTS", ""), name)
    assert path.is_file(), f"there is no {name}: scripts/istio-interop builds it and then runs these tests"
    return str(path)


def plugged(folder: Path, key: str = "ec-p256") -> Path:
    """An intermediate below an offline root, as our commands make them."""
    made = ("--trust-domain", TRUST_DOMAIN, "--key", key)
    assert main(["ca", "root", str(folder / "root"), *made]) == 0
    return intermediate(folder, "cluster1", key)


def intermediate(folder: Path, name: str, key: str = "ec-p256") -> Path:
    """Another intermediate below that root."""
    made = ("--root", str(folder / "root"), "--name", name, "--key", key)
    assert main(["ca", "intermediate", str(folder / name), *made]) == 0
    return folder / name


def add_root(folder: Path, directory: Path) -> bytes:
    """A second root beside the one that is there; the whole bundle."""
    assert main(["ca", "root", str(folder / "other"), "--trust-domain", TRUST_DOMAIN]) == 0
    bundle = (directory / "root-cert.pem").read_bytes() + (folder / "other/root-cert.pem").read_bytes()
    (directory / "root-cert.pem").write_bytes(bundle)
    return bundle


def replace(directory: Path, other: Path) -> None:
    """Put another CA's files in the place of a directory's, one after another."""
    for file in other.iterdir():
        file.replace(directory / file.name)


def signer_of(directory: Path) -> Ca:
    """The signer in a directory."""
    key = load_pem_private_key((directory / "ca-key.pem").read_bytes(), None)
    assert isinstance(key, PrivateKey)
    return Ca(read_pem((directory / "ca-cert.pem").read_bytes())[0], key)


@dataclass(frozen=True)
class Istiod:
    """A running istiod, and the roots of its CA."""

    program: Program
    address: str
    roots: bytes


@asynccontextmanager
async def istiod(
    folder: Path,
    cluster: Kubernetes,
    cacerts: Path,
    *,
    port: int = 0,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[Istiod]:
    """An istiod with the CA that `cacerts` holds, or with one of its own where there is no such directory."""
    place = folder / "istiod"
    (place / "etc/istio/config").mkdir(parents=True, exist_ok=True)
    (place / "etc/istio/config/mesh").write_text(f"trustDomain: {TRUST_DOMAIN}\n")
    rule = {"issuer": ISSUER, "jwks_uri": f"{cluster.address}{KEY_SET}", "audiences": [AUDIENCE]}
    env = {
        "ROOT_CA_DIR": str(cacerts),
        "JWT_RULE": json.dumps(rule),
        "POD_NAMESPACE": "istio-system",
        "POD_NAME": "istiod-1",
        "INJECT_ENABLED": "false",
        **(environment or {}),
    }
    places = {"httpAddr": ANYWHERE, "monitoringAddr": ANYWHERE, "httpsAddr": "", "grpcAddr": "", "ctrlz_port": "0"}
    places["secureGRPCAddr"] = f"127.0.0.1:{port}"
    command = [
        part("pilot-discovery"),
        "discovery",
        "--log_target=stderr",
        f"--kubeconfig={cluster.kubeconfig(folder)}",
    ]
    async with started([*command, *(f"--{name}={value}" for name, value in places.items())], env, place) as program:
        line = await program.line("starting secure gRPC discovery service at")
        yield Istiod(program, line.split()[-1], _roots(cluster, cacerts))


def _roots(cluster: Kubernetes, cacerts: Path) -> bytes:
    """What is plugged in, or else what istiod made for itself and keeps in a secret."""
    if cacerts.exists():
        return (cacerts / "root-cert.pem").read_bytes()
    secret = cluster.created["/api/v1/namespaces/istio-system/secrets/istio-ca-secret"]
    return base64.b64decode(secret["data"]["ca-cert.pem"])


@dataclass(frozen=True)
class PilotAgent:
    """A running pilot-agent, in a directory of its own, with the real Envoy that it started."""

    program: Program
    place: Path
    envoy: Envoy

    @property
    def socket(self) -> Path:
        """Where it serves SDS."""
        return self.place / SDS_SOCKET


@asynccontextmanager
async def pilot_agent(
    place: Path, address: str, roots: bytes, token: str | None, environment: Mapping[str, str]
) -> AsyncIterator[PilotAgent]:
    """A pilot-agent that asks the CA at `address`, and its Envoy with one mTLS listener, whose secrets are the agent's.

    `place` has to be short: the path of a socket below it has 107 bytes at most.
    """
    _write(place, "var/run/secrets/istio/root-cert.pem", roots)
    if token is not None:
        _write(place, "var/run/secrets/tokens/istio-token", token.encode())
    config = bootstrap(
        SDS_SOCKET, place / "admin.sock", api_type="GRPC", name="default", http={"http2_protocol_options": {}}
    )
    _write(place, "envoy.json", json.dumps(config).encode())
    proxy = {
        "binaryPath": BINARY,
        "customConfigFile": str(place / "envoy.json"),
        "statusPort": free_port(),
        "discoveryAddress": "127.0.0.1:1",  # there is no XDS
        "terminationDrainDuration": "0s",
        "concurrency": 1,
    }
    env = {
        "CA_ADDR": address,
        "TRUST_DOMAIN": TRUST_DOMAIN,
        "POD_NAMESPACE": "default",
        "SERVICE_ACCOUNT": "web",
        "POD_NAME": "web-1",
        "INSTANCE_IP": "127.0.0.1",
        "PROXY_CONFIG": json.dumps(proxy),
        **environment,
    }
    command = [part("pilot-agent"), "proxy", "sidecar", "--log_target=stderr", "--proxyLogLevel=info"]
    async with started(command, env, place) as program:
        try:
            yield PilotAgent(program, place, Envoy(program, place / "admin.sock"))
        finally:
            with anyio.CancelScope(shield=True):
                await program.stop()  # if it is killed, its Envoy goes on


def _write(place: Path, name: str, content: bytes) -> None:
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(content)


def free_port() -> int:
    """A port that no process listens at now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
