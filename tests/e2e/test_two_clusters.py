"""Two clusters with intermediates under one root trust each other, and go on doing so when a CA is replaced: real
agents, real Envoys.
"""

import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fakes.agents import agent
from fakes.envoys import client, envoy
from fakes.peers import bundle_of, chain_of, connected

from sds_agent.cli.main import main
from sds_agent.pki.certificates import read_pem
from sds_agent.pki.validation.path import has_path


def cluster(
    directory: Path, root: Path, name: str, *, names: Sequence[str] = ("default", "client"), keep: bool = False
) -> Path:
    """An intermediate for the cluster, and the configuration of an agent that signs with it."""
    directory.mkdir(exist_ok=True)
    made = ["ca", "intermediate", str(directory / "ca"), "--root", str(root), "--name", name]
    assert main([*made, "--constrain", "demo.example"]) == 0
    config = {
        "trust_domain": "demo.example",
        "state_dir": str(directory / "state"),
        "keep_certificates": keep,
        "sds": {"socket": str(directory / "sds.sock")},
        "authorities": {"plugged": {"type": "cacerts", "directory": str(directory / "ca")}},
        "workloads": [{"name": each, "spiffe_id": f"spiffe://demo.example/{name}/{each}"} for each in names],
    }
    file = directory / "sds-agent.yaml"
    file.write_text(json.dumps(config))
    return file


async def test_envoys_of_two_clusters_under_one_root_accept_each_others_clients(tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert main(["ca", "root", str(root), "--trust-domain", "demo.example"]) == 0
    first, second = (cluster(tmp_path / name, root, name) for name in ("cluster1", "cluster2"))
    async with (
        agent(first) as one,
        agent(second) as two,
        envoy(one.socket, first.parent) as envoy_one,
        envoy(two.socket, second.parent) as envoy_two,
    ):
        await envoy_one.ready()
        await envoy_two.ready()
        from_one = await client(one.socket, first.parent)
        from_two = await client(two.socket, second.parent)
        for visitor, proxy, running in ((from_one, envoy_two, two), (from_two, envoy_one, one)):
            issued = await running.event("issued", workload="default", authority="plugged")
            assert await visitor.request(await proxy.port()) == issued["serial"]


async def test_a_running_agent_takes_a_new_intermediate(tmp_path: Path) -> None:
    """Noticed within seconds, without a restart; what is issued next comes from it."""
    root = tmp_path / "root"
    assert main(["ca", "root", str(root), "--trust-domain", "demo.example"]) == 0
    config = cluster(tmp_path / "cluster1", root, "cluster1")
    async with agent(config) as running:
        await running.event("ready")
        again = tmp_path / "again"
        assert main(["ca", "intermediate", str(again), "--root", str(root), "--name", "again"]) == 0
        for file in again.iterdir():
            file.replace(config.parent / "ca" / file.name)
        await running.event("ca_signs")


async def test_peers_trust_each_other_after_a_hierarchy_is_replaced_while_the_agent_is_down(tmp_path: Path) -> None:
    """A stored certificate of the old hierarchy and one of the new accept each other, both ways."""
    directory, roots = tmp_path / "cluster1", [tmp_path / name for name in ("root", "another")]
    for root in roots:
        assert main(["ca", "root", str(root), "--trust-domain", "demo.example"]) == 0
    config = cluster(directory, roots[0], "cluster1", names=["default"], keep=True)
    async with agent(config) as first, envoy(first.socket, directory) as proxy:
        issued = await first.event("issued", workload="default")
        await proxy.ready()
        assert await first.program.stop() == 0
        shutil.rmtree(directory / "ca")
        cluster(directory, roots[1], "cluster1", keep=True)
        async with agent(config) as second:
            await second.event("restored", workload="default")
            await second.event("issued", workload="client")
            both = await second.event("trust_changed", anchors=2)
            pushed = await second.event("sent", version=both["version"])
            await second.event("acked", nonce=pushed["nonce"])
            visitor = await client(second.socket, directory)
            assert await visitor.request(await proxy.port()) == issued["serial"]


async def test_peers_trust_each_other_after_a_workload_gets_another_ca_over_a_restart(tmp_path: Path) -> None:
    """Envoys use the previous certificate for a while, though no agent stores it: its root stays until it expires."""
    directory, root = tmp_path / "cluster1", tmp_path / "root"
    assert main(["ca", "root", str(root), "--trust-domain", "demo.example"]) == 0
    config = cluster(directory, root, "cluster1", names=["default"])
    plugged = json.loads(config.read_text()) | {"keep_certificates": False}
    config.write_text(json.dumps(plugged | {"authorities": {"own": {"type": "embedded"}}}))
    async with agent(config) as first:
        await first.event("ready")
        async with connected(first.socket) as peer:
            before = read_pem(chain_of((await peer.fetch("default"))["default"]))
        assert await first.program.stop() == 0
    config.write_text(json.dumps(plugged))
    for _ in range(2):
        async with agent(config) as second:
            await second.event("old_anchors_kept", authority="own")
            await second.event("ready")
            async with connected(second.socket) as peer:
                bundle = read_pem(bundle_of((await peer.fetch("ROOTCA"))["ROOTCA"]))
            assert has_path(before[0], before[1:], bundle, datetime.now(UTC))
            assert len(bundle) == 2
            assert await second.program.stop() == 0
