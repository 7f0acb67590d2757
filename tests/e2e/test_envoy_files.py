"""The files in `envoy/` are copied by users: a real Envoy must take them as they stand, and they must fit together."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes.envoys import BINARY

FILES = Path(__file__).parents[2] / "envoy"


def loaded(name: str) -> Any:
    return yaml.safe_load((FILES / name).read_text())


def found(tree: Any, key: str) -> list[Any]:
    """Every value under `key`, anywhere in a document."""
    if isinstance(tree, dict):
        return [v for k, v in tree.items() if k == key] + [hit for v in tree.values() for hit in found(v, key)]
    return [hit for item in tree for hit in found(item, key)] if isinstance(tree, list) else []


@pytest.mark.parametrize("name", ["client.yaml", "server.yaml"])
def test_envoy_takes_the_file_without_a_warning(name: str) -> None:
    command = [BINARY, "--mode", "validate", "-l", "warning", "-c", str(FILES / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[warning]" not in done.stderr
    assert "deprecated" not in done.stderr


@pytest.mark.parametrize("name", ["client.yaml", "server.yaml"])
def test_envoy_finds_the_agent_and_the_agent_knows_what_it_asks_for(name: str) -> None:
    agent, envoy = loaded("agent.yaml"), loaded(name)
    assert found(envoy, "pipe") == [{"path": agent["sds"]["socket"]}]
    (certificate,) = found(envoy, "tls_certificate_sds_secret_configs")
    assert certificate[0]["name"] in {workload["name"] for workload in agent["workloads"]}
    (trusted,) = found(envoy, "validation_context_sds_secret_config")
    assert trusted["name"] == "ROOTCA"


@pytest.mark.parametrize(("name", "peer"), [("client.yaml", "server.yaml"), ("server.yaml", "client.yaml")])
def test_each_envoy_lets_in_the_other_and_no_other_peer(name: str, peer: str) -> None:
    ids = {workload["name"]: workload["spiffe_id"] for workload in loaded("agent.yaml")["workloads"]}
    (certificate,) = found(loaded(peer), "tls_certificate_sds_secret_configs")
    (allowed,) = found(loaded(name), "match_typed_subject_alt_names")
    assert allowed == [{"san_type": "URI", "matcher": {"exact": ids[certificate[0]["name"]]}}]


def test_a_caller_without_a_certificate_is_turned_away() -> None:
    assert found(loaded("server.yaml"), "require_client_certificate") == [True]
