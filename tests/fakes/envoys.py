"""A real Envoy with one mTLS listener whose secrets come from the agent's socket, and a real TLS client for it."""

import json
import os
import ssl
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx
from anyio.streams.tls import TLSAttribute, TLSStream
from cryptography import x509
from fakes.peers import connected
from fakes.processes import Program, started

from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import to_pkcs8_pem

BINARY = os.environ.get("ENVOY_BINARY") or str(Path(sys.executable).with_name("envoy"))
TYPES = "type.googleapis.com/envoy"


class Envoy:
    """A running Envoy."""

    def __init__(self, program: Program, admin: Path) -> None:
        self.program = program
        self.place = admin

    async def ready(self) -> None:
        """Wait until every listener has its secrets."""
        await self.program.line("all dependencies initialized. starting workers")

    async def admin(self, path: str) -> Any:
        """The admin interface's answer, as JSON."""
        transport = httpx.AsyncHTTPTransport(uds=str(self.place))
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
            return (await client.get(path)).raise_for_status().json()

    async def port(self) -> int:
        """The listener's port."""
        (found,) = (await self.ports()).values()
        return found

    async def ports(self) -> dict[str, int]:
        """The port of each listener."""
        statuses = (await self.admin("/listeners?format=json"))["listener_statuses"]
        return {each["name"]: int(each["local_address"]["socket_address"]["port_value"]) for each in statuses}


def sds(api_type: str) -> dict[str, Any]:
    """The source of a secret, as in Envoy's configuration."""
    return {
        "resource_api_version": "V3",
        "initial_fetch_timeout": "0s",
        "api_config_source": {
            "api_type": api_type,
            "transport_api_version": "V3",
            "set_node_on_first_message_only": True,
            "grpc_services": [{"envoy_grpc": {"cluster_name": "sds-agent"}}],
        },
    }


def bootstrap(
    socket: Path, admin: Path, *, api_type: str, name: str, http: dict[str, Any], roots: str = "ROOTCA"
) -> dict[str, Any]:
    """The configuration of an Envoy that answers 200 to every caller with a certificate of the trust domain."""
    tls = {
        "@type": f"{TYPES}.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": {
            "tls_certificate_sds_secret_configs": [{"name": name, "sds_config": sds(api_type)}],
            "validation_context_sds_secret_config": {"name": roots, "sds_config": sds(api_type)},
        },
    }
    return _bootstrap(
        admin,
        [_listener({"direct_response": {"status": 200}}, tls)],
        [_cluster("sds-agent", {"pipe": {"path": str(socket)}}, {"explicit_http_config": http})],
    )


def bootstrap_of_client(socket: Path, admin: Path, port: int) -> dict[str, Any]:
    """The configuration of an Envoy that passes plaintext requests on to the mTLS listener at `port`, each over a new
    connection with a whole handshake, with the certificate `default`.
    """
    tls = {
        "@type": f"{TYPES}.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "max_session_keys": 0,  # resumption would ask for no certificate
        "common_tls_context": {
            "tls_certificate_sds_secret_configs": [{"name": "default", "sds_config": sds("GRPC")}],
            "validation_context_sds_secret_config": {"name": "ROOTCA", "sds_config": sds("GRPC")},
        },
    }
    once = {
        "explicit_http_config": {"http_protocol_options": {}},
        "common_http_protocol_options": {"max_requests_per_connection": 1},
    }
    behind = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    return _bootstrap(
        admin,
        [_listener({"route": {"cluster": "behind"}})],
        [
            _cluster(
                "sds-agent", {"pipe": {"path": str(socket)}}, {"explicit_http_config": {"http2_protocol_options": {}}}
            ),
            {
                **_cluster("behind", behind, once),
                "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": tls},
            },
        ],
    )


def _bootstrap(admin: Path, listeners: list[dict[str, Any]], clusters: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "node": {"id": "envoy-under-test", "cluster": "tests"},
        "admin": {"address": {"pipe": {"path": str(admin)}}},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }


def _listener(action: dict[str, Any], tls: dict[str, Any] | None = None) -> dict[str, Any]:
    manager = {
        "@type": f"{TYPES}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "route_config": {
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, **action}]}]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{TYPES}.extensions.filters.http.router.v3.Router"},
            }
        ],
    }
    chain: dict[str, Any] = {
        "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    }
    if tls is not None:
        chain["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": tls}
    return {
        "name": "in",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
        "filter_chains": [chain],
    }


def _cluster(name: str, address: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return {
        "name": name,
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
        "typed_extension_protocol_options": {kind: {"@type": f"type.googleapis.com/{kind}", **options}},
    }


@asynccontextmanager
async def envoy(
    socket: Path,
    directory: Path,
    *,
    api_type: str = "GRPC",
    name: str = "default",
    roots: str = "ROOTCA",
    http2: dict[str, Any] | None = None,
    http1: bool = False,
    node_always: bool = False,
) -> AsyncIterator[Envoy]:
    """Run an Envoy that takes the secrets `name` and `roots` from `socket`, inside this context."""
    admin = directory / "admin.sock"
    http = {"http_protocol_options": {}} if http1 else {"http2_protocol_options": http2 or {}}
    config = bootstrap(socket, admin, api_type=api_type, name=name, http=http, roots=roots)
    text = json.dumps(config)
    if node_always:
        text = text.replace('"set_node_on_first_message_only": true', '"set_node_on_first_message_only": false')
    file = directory / "envoy.json"
    file.write_text(text)
    async with _running(file, admin) as running:
        yield running


@asynccontextmanager
async def envoy_client(socket: Path, directory: Path, port: int) -> AsyncIterator[Envoy]:
    """Run an Envoy that takes its secrets from `socket` and passes requests on to the mTLS listener at `port`."""
    admin = directory / "client-admin.sock"
    file = directory / "envoy-client.json"
    file.write_text(json.dumps(bootstrap_of_client(socket, admin, port)))
    async with _running(file, admin) as running:
        yield running


@asynccontextmanager
async def _running(file: Path, admin: Path) -> AsyncIterator[Envoy]:
    command = [BINARY, "-c", str(file), "--disable-hot-restart", "--concurrency", "1", "-l", "info"]
    async with started(command) as program:
        yield Envoy(program, admin)


@dataclass(frozen=True, slots=True)
class Client:
    """A TLS client with an identity of its own from the agent."""

    context: ssl.SSLContext

    async def request(self, port: int) -> str:
        """One request over a new connection; returns the serial that the server presented, in hexadecimal.

        Raises OSError, ssl.SSLError or anyio's stream errors when the handshake or the request fails.
        """
        connection = await anyio.connect_tcp("127.0.0.1", port)
        async with await TLSStream.wrap(
            connection, server_side=False, ssl_context=self.context, standard_compatible=False
        ) as tls:
            presented = tls.extra(TLSAttribute.peer_certificate_binary)
            await tls.send(b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
            answer = await tls.receive()
            assert answer.startswith(b"HTTP/1.1 200"), answer
        assert presented is not None
        return f"{x509.load_der_x509_certificate(presented).serial_number:x}"

    async def is_taken(self, port: int) -> bool:
        """Whether a request succeeds."""
        try:
            await self.request(port)
        except (OSError, anyio.BrokenResourceError, anyio.EndOfStream):
            return False
        return True


def holding(directory: Path, chain: Sequence[x509.Certificate], key: Any, root: x509.Certificate) -> Client:
    """A client with this certificate, which trusts this root."""
    file = directory / f"{chain[0].serial_number}.pem"
    file.touch(0o600)
    file.write_bytes(write_pem(chain) + to_pkcs8_pem(key))
    context = ssl.create_default_context(cadata=write_pem([root]).decode())
    context.check_hostname = False
    context.load_cert_chain(file)
    return Client(context)


async def client(socket: Path, directory: Path, name: str = "client") -> Client:
    """A client with the identity `name`, fetched from the agent like an Envoy would."""
    async with connected(socket) as peer:
        secrets = await peer.fetch(name, "ROOTCA")
    certificate, bundle = secrets[name].tls_certificate, secrets["ROOTCA"].validation_context
    assert certificate is not None
    assert certificate.certificate_chain is not None
    assert certificate.private_key is not None
    assert bundle is not None
    assert bundle.trusted_ca is not None
    pem = directory / f"{name}.pem"
    pem.touch(0o600)
    pem.write_bytes((certificate.certificate_chain.inline_bytes or b"") + (certificate.private_key.inline_bytes or b""))
    context = ssl.create_default_context(cadata=(bundle.trusted_ca.inline_bytes or b"").decode())
    context.check_hostname = False
    context.load_cert_chain(pem)
    return Client(context)
