"""A restart without any CA: what Envoys were given before is served at once, from the disk, as the process runs it."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fakes.agents import agent, write_config
from fakes.authorities import UpstreamCa
from fakes.hierarchy import new_key
from fakes.peers import connected

from sds_agent.authority.protocol import IssueRequest
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.anchors_file import AdvertisedAnchors, AnchorsFile, StoredAnchors
from sds_agent.issuance.cache import CachedCertificate, CertificateCache
from sds_agent.pki.certificates import longest_valid_first, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import to_pkcs8_pem
from sds_agent.sealing import Seal
from sds_agent.secrets.model import BundleSecret

URI = "spiffe://demo.example/default"
KEY = bytes(range(32))


def down(directory: Path, encryption: Mapping[str, Any]) -> Path:
    """The configuration of an agent with two CAs, both of which refuse every connection."""
    config = write_config(directory, default="1h")
    (directory / "roots.pem").write_bytes(write_pem([UpstreamCa(lambda: datetime.now(UTC)).root.certificate]))
    ca = {"type": "istio", "address": "127.0.0.1:1", "ca_file": "roots.pem", "token_file": "token"}
    document = {**json.loads(config.read_text()), "authorities": {"one": ca, "two": ca}, **encryption}
    document["workloads"][0]["authority"] = "one"
    config.write_text(json.dumps(document))
    return config


def store(state: Path, seal: Seal | None) -> tuple[bytes, str]:
    """Write what an agent had before; returns the certificate chain and the bundle's version."""
    now = datetime.now(UTC)
    first, second, key = UpstreamCa(lambda: now), UpstreamCa(lambda: now, "of the other CA"), new_key()
    request = IssueRequest(SpiffeId.parse(URI), make_csr(key, URI), timedelta(hours=1), "1")
    chain = write_pem([first.leaf(request), first.lower.certificate, first.upper.certificate])
    roots = [ca.root.certificate for ca in (first, second)]
    state.mkdir(mode=0o700)
    CertificateCache(state / "certificates", seal).save(
        CachedCertificate(
            URI,
            now.timestamp(),
            chain.decode(),
            write_pem(roots[:1]).decode(),
            to_pkcs8_pem(key).decode(),
            "istio one",
        )
    )
    advertised = tuple(AdvertisedAnchors(name, (root,), now) for name, root in zip(("one", "two"), roots, strict=True))
    AnchorsFile(state, {"one": "istio", "two": "istio"}, seal)._write(StoredAnchors((), advertised))
    return chain, BundleSecret(write_pem(longest_valid_first(roots))).version


@pytest.mark.parametrize("seal", [None, Seal(KEY)], ids=["plain", "encrypted"])
async def test_an_agent_whose_cas_are_all_down_serves_certificate_and_whole_bundle_at_once(
    tmp_path: Path, seal: Seal | None
) -> None:
    """Half a bundle refuses half the peers, and an Envoy that starts in an outage has nothing else."""
    (tmp_path / "state.key").write_bytes(KEY)
    (tmp_path / "state.key").chmod(0o600)
    config = down(tmp_path, {} if seal is None else {"state_encryption": {"key_file": "state.key"}})
    chain, bundle = store(tmp_path / "state", seal)
    async with agent(config) as running:
        await running.event("ready")
        assert (await running.event("trust_changed"))["version"] == bundle
        assert running.events("trust_changed")[1:] == [], "nor is the bundle changed on the way"
        async with connected(running.socket) as peer:
            found = await peer.fetch("default", "ROOTCA")
            assert chain in bytes(found["default"])
            assert bytes(found["ROOTCA"]).count(b"BEGIN") == 2
        await running.program.stop()
    for file in (tmp_path / "state").rglob("*.json"):
        assert (b"BEGIN" in file.read_bytes()) == (seal is None), "and nothing was written in another way"


async def test_state_that_no_agent_can_use_costs_a_new_certificate_and_no_start(tmp_path: Path) -> None:
    config, state = write_config(tmp_path, default="1h"), tmp_path / "state"
    async with agent(config) as running:
        await running.event("ready")
        await running.program.stop()
    for file in state.rglob("*.json"):
        file.write_bytes(file.read_bytes()[:100])
    async with agent(config) as running:
        await running.event("not_restored")
        await running.event("anchors_not_restored")
        await running.event("ready")
        await running.program.stop()
    assert len(list(state.rglob("*.unusable"))) == 2
