"""Two clusters with intermediates under one root trust each other: two real agents, two real Envoys."""

import json
from pathlib import Path

from fakes.agents import agent
from fakes.envoys import client, envoy

from sds_agent.cli.main import main


def cluster(directory: Path, root: Path, name: str) -> Path:
    """An intermediate for the cluster, and the configuration of an agent that signs with it."""
    directory.mkdir()
    made = ["ca", "intermediate", str(directory / "ca"), "--root", str(root), "--name", name]
    assert main([*made, "--constrain", "demo.example"]) == 0
    names = ("default", "client")
    config = {
        "trust_domain": "demo.example",
        "state_dir": str(directory / "state"),
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


async def test_a_new_intermediate_is_taken_by_a_running_agent(tmp_path: Path) -> None:
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
