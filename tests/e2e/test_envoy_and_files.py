"""A real Envoy, the real agent, and certificates in files that another program replaces: each is seen on the wire."""

import json
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from fakes.agents import agent
from fakes.envoys import Client, envoy
from fakes.hierarchy import Ca, make_ca, make_leaf, new_key
from fakes.replacing import Replace, certbot, in_place, kubernetes

from sds_agent.pki.certificates import read_pem, serial_hex, write_pem
from sds_agent.pki.keys import to_pkcs8_pem

TIMES = 3
LONG_AGO, FAR = datetime.now(UTC) - timedelta(days=1), datetime.now(UTC) + timedelta(days=1)
Ways = Callable[[Path], tuple[Path, Replace]]


def root_ca(name: str) -> Ca:
    return make_ca(name, not_before=LONG_AGO, not_after=FAR)


def secret(root: Ca, *roots: Ca, uri: str | None = None) -> dict[str, bytes]:
    """The files of a new certificate: an SVID for `uri`, or one for a DNS name."""
    key = new_key()
    names = [] if uri else [x509.DNSName("web.example")]
    leaf = make_leaf(root, uri, key=key, names=names, not_before=LONG_AGO, not_after=FAR)
    trusted = write_pem(each.certificate for each in (root, *roots))
    return {"tls.crt": write_pem([leaf]), "tls.key": to_pkcs8_pem(key), "ca.crt": trusted}


def serial(files: dict[str, bytes]) -> str:
    return serial_hex(read_pem(files["tls.crt"])[0])


def visitor(folder: Path, ca: Ca, trusts: Ca) -> Client:
    """A client with a certificate of `ca`."""
    files = secret(ca, uri="spiffe://demo.example/client")
    pem = folder / "visitor.pem"
    pem.touch(0o600)
    pem.write_bytes(files["tls.crt"] + files["tls.key"])
    context = ssl.create_default_context(cadata=write_pem([trusts.certificate]).decode())
    context.check_hostname = False
    context.load_cert_chain(pem)
    return Client(context)


def configuration(folder: Path, **more: object) -> Path:
    file = folder / "sds-agent.yaml"
    config = {
        "trust_domain": "demo.example",
        "state_dir": str(folder / "state"),
        "sds": {"socket": str(folder / "sds.sock")},
        "workloads": [{"name": "default", "spiffe_id": "spiffe://demo.example/web"}],
        **more,
    }
    file.write_text(json.dumps(config))
    return file


@pytest.mark.parametrize("api_type", ["GRPC", "DELTA_GRPC"])
@pytest.mark.parametrize("way", [in_place, certbot, kubernetes])
async def test_an_envoy_that_asks_for_files_presents_each_new_certificate(
    way: Ways, api_type: str, tmp_path: Path
) -> None:
    root, allowed = root_ca("root"), tmp_path / "certs"
    allowed.mkdir()
    directory, replace = way(allowed)
    replace(files := secret(root))
    config = configuration(tmp_path, sds={"socket": str(tmp_path / "sds.sock"), "files": [str(allowed)]})
    name, roots = f"file-cert:{directory}/tls.crt~{directory}/tls.key", f"file-root:{directory}/ca.crt"
    async with (
        agent(config) as running,
        envoy(running.socket, tmp_path, api_type=api_type, name=name, roots=roots) as proxy,
    ):
        await proxy.ready()
        client, port = visitor(tmp_path, root, root), await proxy.port()
        assert await client.request(port) == serial(files)
        for count in range(TIMES):
            replace(files := secret(root))
            await running.event("acked", names=name, count=count + 2)
            assert await client.request(port) == serial(files)
        other = root_ca("another root")
        replace(files := secret(root, other))
        await running.event("acked", names=roots, count=2)
        await running.event("acked", names=name, count=TIMES + 2)
        assert await visitor(tmp_path, other, root).request(port) == serial(files)
        assert running.events("nacked") == []


async def test_an_envoy_that_asks_for_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "certs").mkdir()
    (tmp_path / "outside").mkdir()
    for name, content in secret(root_ca("root")).items():
        (tmp_path / "outside" / name).write_bytes(content)
    (tmp_path / "certs" / "link").symlink_to(tmp_path / "outside")
    config = configuration(tmp_path, sds={"socket": str(tmp_path / "sds.sock"), "files": [str(tmp_path / "certs")]})
    name, roots = (
        f"file-cert:{tmp_path}/outside/tls.crt~{tmp_path}/outside/tls.key",
        f"file-root:{tmp_path}/certs/link/ca.crt",
    )
    async with agent(config) as running, envoy(running.socket, tmp_path, name=name, roots=roots):
        await running.event("refused", names=name)
        await running.event("refused", names=roots)
        assert running.events("sent", names=name) == running.events("pushed", names=roots) == []


@pytest.mark.parametrize("way", [in_place, certbot, kubernetes])
async def test_a_workload_whose_certificate_is_in_files_follows_them(way: Ways, tmp_path: Path) -> None:
    root, uri = root_ca("root"), "spiffe://demo.example/web"
    directory, replace = way(tmp_path)
    replace(files := secret(root, uri=uri))
    config = configuration(tmp_path, authorities={"mounted": {"type": "files", "directory": str(directory)}})
    async with agent(config) as running, envoy(running.socket, tmp_path) as proxy:
        await proxy.ready()
        client, port = visitor(tmp_path, root, root), await proxy.port()
        assert await client.request(port) == serial(files)
        for count in range(TIMES):
            replace(files := secret(root, uri=uri))
            await running.event("acked", names="default", count=count + 2)
            assert await client.request(port) == serial(files)
        other = root_ca("another root")
        (directory / "ca.crt").write_bytes(files["ca.crt"] + write_pem([other.certificate]))
        await running.event("acked", names="ROOTCA", count=2)
        assert await visitor(tmp_path, other, root).request(port) == serial(files)
        assert running.events("fault") == running.events("nacked") == []


async def test_a_restart_serves_the_files_at_once_and_an_outage_of_their_writer_changes_nothing(tmp_path: Path) -> None:
    root, uri = root_ca("root"), "spiffe://demo.example/web"
    directory, replace = in_place(tmp_path)
    replace(files := secret(root, uri=uri))
    config = configuration(tmp_path, authorities={"mounted": {"type": "files", "directory": str(directory)}})
    async with agent(config) as running:
        await running.event("ready")
    for name in files:
        (directory / name).unlink()
    async with agent(config) as running, envoy(running.socket, tmp_path) as proxy:
        await proxy.ready()
        client, port = visitor(tmp_path, root, root), await proxy.port()
        assert await client.request(port) == serial(files)
        replace(newer := secret(root, uri=uri))
        await running.event("acked", names="default", count=2)
        assert await client.request(port) == serial(newer)


async def test_another_authority_steps_in_for_missing_files_until_they_come(tmp_path: Path) -> None:
    root, uri = root_ca("root"), "spiffe://demo.example/web"
    directory, replace = in_place(tmp_path)
    config = configuration(
        tmp_path,
        authorities={"mounted": {"type": "files", "directory": str(directory)}, "local": {"type": "embedded"}},
        workloads=[{"name": "default", "spiffe_id": uri, "authority": ["mounted", "local"]}],
        failover={"back_after": "10s"},
    )
    async with agent(config) as running, envoy(running.socket, tmp_path) as proxy:
        away = await running.event("authority_changed", to="local")
        assert "holds no certificate under a known name" in away["why"]
        await proxy.ready()
        replace(files := secret(root, uri=uri))
        await running.event("authority_changed", to="mounted")
        await running.event("acked", names="default", count=2)
        assert await visitor(tmp_path, root, root).request(await proxy.port()) == serial(files)
        assert running.events("fault") == running.events("nacked") == []
