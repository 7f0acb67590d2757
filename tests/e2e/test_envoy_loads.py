"""Which certificates a real Envoy loads: what reading leaves out is what it would refuse a bundle for, and no more."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fakes.envoys import BINARY, TYPES, Envoy
from fakes.odd_certificates import LOADED, NOT_LOADED, NOT_READ, together
from fakes.processes import started

from sds_agent.pki.certificates import read_bundle, write_pem

pytestmark = pytest.mark.filterwarnings("ignore:Attribute's length must be:UserWarning")  # in the program it is ignored

ON_ONE_OF_THEM = {
    "byte order mark in BMPString",
    "byte order mark in UniversalString",
    "parameters: BOOLEAN 1",
}
"""Envoy 1.36.4 and 1.40.0 differ: one loads them."""


def cluster(name: str, bundle: bytes) -> dict[str, Any]:
    anchors = {"trusted_ca": {"inline_bytes": base64.b64encode(bundle).decode()}}
    tls = {
        "@type": f"{TYPES}.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": {"validation_context": anchors},
    }
    return {
        "@type": f"{TYPES}.config.cluster.v3.Cluster",
        "name": name,
        "connect_timeout": "1s",
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": tls},
    }


async def taken(bundles: Mapping[str, bytes], directory: Path) -> set[str]:
    """Which of the bundles Envoy takes, each for a cluster of its own; it refuses a cluster without the others."""
    admin, clusters, config = (directory / name for name in ("admin.sock", "clusters.json", "envoy.json"))
    clusters.write_text(json.dumps({"version_info": "1", "resources": [cluster(*each) for each in bundles.items()]}))
    source = {"resource_api_version": "V3", "path_config_source": {"path": str(clusters)}}
    bootstrap = {
        "node": {"id": "envoy-under-test", "cluster": "tests"},
        "admin": {"address": {"pipe": {"path": str(admin)}}},
        "dynamic_resources": {"cds_config": source},
    }
    config.write_text(json.dumps(bootstrap))
    command = [BINARY, "-c", str(config), "--disable-hot-restart", "--concurrency", "1", "-l", "info"]
    async with started(command) as program:
        envoy = Envoy(program, admin)
        await envoy.ready()
        return {each["name"] for each in (await envoy.admin("/clusters?format=json"))["cluster_statuses"]}


async def test_envoy_takes_every_bundle_that_we_make_of_odd_roots_and_refuses_what_is_left_out(tmp_path: Path) -> None:
    texts = {name: together(root) for table in (NOT_LOADED, NOT_READ, LOADED) for name, root in table.items()}
    served = {f"served: {name}": write_pem(read_bundle(text).certificates) for name, text in texts.items()}
    good = await taken({**texts, **served}, tmp_path)
    assert served.keys() <= good, "what is served is taken"
    assert texts.keys() - good - ON_ONE_OF_THEM == NOT_LOADED.keys() - ON_ONE_OF_THEM, "nothing is left out for nothing"
