"""An Envoy that refuses a secret takes everything else: what it refuses does not stand between it and what is good.

An Envoy that has refused a secret refuses the next ones too, with the same words, or gives them to some of its
listeners alone, as long as it is left with what it refused.
"""

import copy
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from cryptography import x509
from fakes.envoys import BINARY, Client, Envoy, bootstrap, holding
from fakes.events import Events, recorded
from fakes.hierarchy import Ca, Extension, make_ca, make_leaf, new_key
from fakes.processes import started

from sds_agent.clock import SystemClock
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import to_pkcs8_pem
from sds_agent.sds.endpoint import SocketFile
from sds_agent.sds.file_secrets import FileSecrets
from sds_agent.sds.refusals import MOST_SENT
from sds_agent.sds.server import Limits, serving
from sds_agent.sds.service import SecretDiscoveryService
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import SecretStore
from sds_agent.tasks import background_tasks

START = datetime.now(UTC).replace(microsecond=0)
TIMES: dict[str, Any] = {"not_before": START - timedelta(hours=1), "not_after": START + timedelta(hours=1)}
OLD, NEW = make_ca("old root", **TIMES), make_ca("new root", **TIMES)
MUST_STAPLE: Extension = (x509.TLSFeature([x509.TLSFeatureType.status_request]), False)
"""What Envoy refuses in a certificate without a staple."""
BOTH = BundleSecret(write_pem([OLD.certificate, NEW.certificate]))
LISTENERS = {"one": "a", "two": "b", "three": "b"}
"""With their certificates. Envoy gives new roots to the first of them first, and to no other if that one fails."""


CORRUPT = b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"


def issued(name: str, *extra: Extension, ca: Ca = OLD) -> CertificateSecret:
    key = new_key()
    leaf = make_leaf(ca, f"spiffe://demo.example/{name}", key=key, extra=extra, **TIMES)
    return CertificateSecret(write_pem([leaf]), to_pkcs8_pem(key), TIMES["not_after"])


def serial(secret: CertificateSecret) -> str:
    return f"{x509.load_pem_x509_certificate(secret.chain_pem).serial_number:x}"


def write(directory: Path, secret: CertificateSecret) -> str:
    """Puts it into files; returns the name of the secret in them."""
    certificate, key = directory / "tls.crt", directory / "tls.key"
    key.touch(0o600)
    certificate.write_bytes(secret.chain_pem)
    key.write_bytes(secret.private_key_pem)
    return f"file-cert:{certificate}~{key}"


def configuration(directory: Path, socket: Path, api_type: str, names: Mapping[str, str]) -> dict[str, Any]:
    http: dict[str, Any] = {"http2_protocol_options": {}}
    config = bootstrap(socket, directory / "admin.sock", api_type=api_type, name="a", http=http)
    (listener,) = config["static_resources"]["listeners"]
    config["static_resources"]["listeners"] = listeners = []
    for name, certificate in LISTENERS.items():
        each = copy.deepcopy(listener)
        each["name"] = name
        tls = each["filter_chains"][0]["transport_socket"]["typed_config"]["common_tls_context"]
        tls["tls_certificate_sds_secret_configs"][0]["name"] = names.get(certificate, certificate)
        listeners.append(each)
    return config


class Proxy:
    """A running Envoy, and peers with a certificate of each root."""

    def __init__(
        self, envoy: Envoy, directory: Path, events: Events, store: SecretStore, service: SecretDiscoveryService
    ) -> None:
        self.events = events
        self.store = store
        self._service = service
        self._envoy = envoy
        self._peers = {name: peer_of(directory, name, ca) for name, ca in {"old": OLD, "new": NEW}.items()}

    async def has(self, name: str) -> None:
        """Wait until it has acknowledged what is served under the name."""
        secret = self.store.secret(name)
        assert secret is not None
        with anyio.fail_after(10):
            while (name, secret.version) not in self._acknowledged:
                await self.events.next()

    @property
    def _acknowledged(self) -> list[tuple[str, str | None]]:
        return [(each.name, each.acked) for stream in self._service.streams for each in stream.names]

    async def taken(self, peer: str) -> list[str]:
        """The listeners that take this peer."""
        ports = await self._envoy.ports()
        return [name for name in LISTENERS if await self._peers[peer].is_taken(ports[name])]

    async def presents(self, listener: str) -> str:
        """The serial that a listener presents."""
        return await self._peers["old"].request((await self._envoy.ports())[listener])


def peer_of(directory: Path, name: str, ca: Ca) -> Client:
    key = new_key()
    leaf = make_leaf(ca, f"spiffe://demo.example/{name}", key=key, **TIMES)
    return holding(directory, [leaf], key, OLD.certificate)


@asynccontextmanager
async def running(directory: Path, api_type: str, *extra: Extension, in_file: bool = False) -> AsyncIterator[Proxy]:
    """An Envoy with its first secrets, below the old root; the certificate of the first listener has `extra`, and is a
    secret of the store or is `in_file`.
    """
    store, first = SecretStore(("a", "b", "ROOTCA")), issued("a", *extra)
    store.publish({"a": first, "b": issued("b"), "ROOTCA": BundleSecret(write_pem([OLD.certificate]))})
    names = {"a": write(directory, first)} if in_file else {}
    files = FileSecrets([directory], store, SystemClock())
    service = SecretDiscoveryService(store, files=files)
    socket, file = directory / "sds.sock", directory / "envoy.json"
    file.write_text(json.dumps(configuration(directory, socket, api_type, names)))
    command = [BINARY, "-c", str(file), "--disable-hot-restart", "--concurrency", "1", "-l", "info"]
    with recorded() as events:
        async with (
            background_tasks() as start,
            serving(service, SocketFile(socket), Limits()),
            started(command) as program,
        ):
            start(files.run())
            proxy = Envoy(program, directory / "admin.sock")
            await proxy.ready()
            if not extra:
                for name in ("a", "b", "ROOTCA"):
                    await events.wait("acked", names=[name])
            yield Proxy(proxy, directory, events, store, service)


@pytest.mark.parametrize("api_type", ["GRPC", "DELTA_GRPC"])
async def test_new_roots_reach_every_listener_beside_a_refused_certificate(tmp_path: Path, api_type: str) -> None:
    async with running(tmp_path, api_type) as proxy:
        first = await proxy.presents("one")
        proxy.store.publish({"a": issued("a", MUST_STAPLE)})
        await proxy.events.wait("nacked", names=["a"])
        proxy.store.publish({"ROOTCA": BOTH})
        await proxy.has("ROOTCA")
        assert await proxy.taken("new") == list(LISTENERS)
        assert await proxy.presents("one") == first
        good = issued("a")
        proxy.store.publish({"a": good})
        await proxy.has("a")
        assert await proxy.presents("one") == serial(good)


@pytest.mark.parametrize("api_type", ["GRPC", "DELTA_GRPC"])
async def test_roots_that_come_together_with_a_refused_certificate_reach_every_listener(
    tmp_path: Path, api_type: str
) -> None:
    """Envoy refuses both, and has given the roots to some listener by then."""
    async with running(tmp_path, api_type) as proxy:
        proxy.store.publish({"a": issued("a", MUST_STAPLE), "ROOTCA": BOTH})
        await proxy.has("ROOTCA")
        assert await proxy.taken("new") == list(LISTENERS)


@pytest.mark.parametrize("api_type", ["GRPC", "DELTA_GRPC"])
async def test_certificates_are_renewed_beside_a_refused_bundle(tmp_path: Path, api_type: str) -> None:
    """They would run out."""
    async with running(tmp_path, api_type) as proxy:
        proxy.store.publish({"ROOTCA": BundleSecret(BOTH.anchors_pem, CORRUPT)})
        await proxy.events.wait("taken_back", names=["ROOTCA"])
        renewed = issued("a")
        proxy.store.publish({"a": renewed})
        await proxy.has("a")
        assert await proxy.presents("one") == serial(renewed)
        assert await proxy.taken("new") == []
        proxy.store.publish({"ROOTCA": BOTH})
        await proxy.has("ROOTCA")
        assert await proxy.taken("new") == list(LISTENERS)


async def test_a_certificate_that_comes_together_with_a_refused_bundle_is_presented(tmp_path: Path) -> None:
    async with running(tmp_path, "GRPC") as proxy:
        renewed = issued("a")
        proxy.store.publish({"ROOTCA": BundleSecret(BOTH.anchors_pem, CORRUPT), "a": renewed})
        await proxy.events.wait("taken_back", names=["ROOTCA"])
        await proxy.has("a")
        assert await proxy.presents("one") == serial(renewed)


async def test_roots_that_are_refused_at_the_start_reach_every_listener_later(tmp_path: Path) -> None:
    """Envoy takes the bad certificate then, and refuses the first roots."""
    async with running(tmp_path, "GRPC", MUST_STAPLE) as proxy:
        await proxy.events.wait("nacked")
        proxy.store.publish({"ROOTCA": BOTH})
        await proxy.events.wait("nacked", count=2)
        proxy.store.publish({"a": issued("a")})
        await proxy.events.wait("sent_anew")
        await proxy.has("ROOTCA")
        assert await proxy.taken("new") == list(LISTENERS)


async def test_roots_reach_every_listener_once_a_certificate_is_good_that_was_renewed_badly(tmp_path: Path) -> None:
    """However often they were refused for its sake until then."""
    async with running(tmp_path, "GRPC", MUST_STAPLE) as proxy:
        await proxy.events.wait("nacked")
        bad = issued("a", MUST_STAPLE)
        proxy.store.publish({"a": bad})
        await proxy.events.wait("nacked", names=["a"], version=[bad.version], count=1 + MOST_SENT)
        await proxy.events.wait("nacked", names=["ROOTCA"], count=1 + MOST_SENT)
        proxy.store.publish({"a": issued("a")})
        await proxy.has("ROOTCA")
        assert await proxy.taken("old") == list(LISTENERS)


async def test_roots_reach_every_listener_once_a_certificate_in_a_file_is_good(tmp_path: Path) -> None:
    """There is none before it that Envoy could be sent again."""
    async with running(tmp_path, "GRPC", MUST_STAPLE, in_file=True) as proxy:
        await proxy.events.wait("nacked")
        proxy.store.publish({"ROOTCA": BOTH})
        await proxy.events.wait("nacked", names=["ROOTCA"], version=[BOTH.version], count=1 + MOST_SENT)
        write(tmp_path, issued("a"))
        await proxy.has("ROOTCA")
        assert await proxy.taken("new") == list(LISTENERS)
