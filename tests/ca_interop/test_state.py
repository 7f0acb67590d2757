"""What outlives a restart, and one certificate for files, with a real step-ca."""

import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from ca_interop.driver import TRUST_DOMAIN, URI, agent
from ca_interop.step_ca import RealStepCa, serving

from sds_agent.pki.certificates import has_key, read_pem, serial_hex
from sds_agent.pki.keyfile import read_private_key

PATHS = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.fixture
async def ca(place: Path) -> AsyncIterator[RealStepCa]:
    async with serving(RealStepCa(place / "ca")) as running:
        yield running


def authority(ca: RealStepCa, place: Path) -> dict[str, object]:
    return {
        "type": "step-ca",
        "url": ca.url,
        "provisioner": "sds",
        "fingerprint": ca.fingerprint,
        **ca.jwk_files(place),
    }


async def run(*arguments: object, code: int) -> tuple[str, str]:
    """Run the command, which has to end with this exit code; returns what it wrote."""
    command = [sys.executable, "-m", "sds_agent", *map(str, arguments)]
    done = await anyio.run_process(command, env=PATHS, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout.decode(), done.stderr.decode()


async def test_an_encrypted_agent_restarts_in_an_outage_with_its_certificate_and_whole_bundle(
    ca: RealStepCa, place: Path
) -> None:
    (place / "state.key").write_bytes(os.urandom(32))
    key = {"key_file": "state.key"}
    async with agent(place, authority(ca, place), ttl="1h", state_encryption=key) as running:
        leaf, bundle = await running.first(), running.bundle
    await ca.server.stop()
    assert all(b"PRIVATE KEY" not in each.read_bytes() for each in (place / "state").rglob("*.json"))
    async with agent(place, authority(ca, place), ttl="1h", state_encryption=key) as running:
        await running.events.wait("restored", serial=serial_hex(leaf))
        assert running.bundle == bundle


async def test_issue_writes_a_set_renews_it_by_its_own_certificate_and_says_why_it_cannot(
    ca: RealStepCa, place: Path
) -> None:
    config, output = place / "sds-agent.yaml", place / "out"
    config.write_text(
        json.dumps(
            {
                "trust_domain": TRUST_DOMAIN,
                "state_dir": str(place / "state"),
                "sds": {"socket": str(place / "sds.sock")},
                "authorities": {"upstream": authority(ca, place)},
                "workloads": [{"name": "default", "spiffe_id": URI, "ttl": "1h"}],
            }
        )
    )
    said, _ = await run("check", "--probe", config, code=0)
    assert "The authority upstream is good: it issued a certificate" in said
    serials = {json.loads((await run("issue", config, "--output", output, code=0))[0])["serial"] for _ in range(2)}
    assert len(serials) == 2
    assert len(ca.requests("/1.0/rekey")) == 1, "the second run shows the certificate of the first"
    leaf = read_pem((output / "cert-chain.pem").read_bytes())[0]
    assert has_key(leaf, read_private_key((output / "key.pem").read_bytes()).public_key())
    await ca.server.stop()
    _, errors = await run("issue", config, "--output", output, "--timeout", "2s", code=1)
    assert "sds-agent: no certificate for default within 2s; " in errors
    assert read_pem((output / "cert-chain.pem").read_bytes())[0] == leaf
    _, errors = await run("check", "--probe", config, code=3)
    assert "sds-agent: the authority upstream does not issue: transient: " in errors
