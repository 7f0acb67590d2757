"""A real Envoy and a certificate that is for other users: it goes without, says why, and serves once it may."""

import json
import os
from pathlib import Path

import pytest
from anyio import to_thread
from fakes.agents import agent, write_config
from fakes.envoys import client, envoy

from sds_agent.inspection.envoy_admin import EnvoyAdmin

ME, OTHER = os.geteuid(), 4711


def write(directory: Path, user: int) -> Path:
    """A configuration in which the certificate `default` is for this user, and `client` for everybody."""
    file = write_config(directory, default="1h", client="1h")
    config = json.loads(file.read_text())
    config["workloads"][0]["clients"] = {"users": [user]}
    file.write_text(json.dumps(config))
    return file


@pytest.mark.parametrize("api_type", ["GRPC", "DELTA_GRPC"])
async def test_an_envoy_has_what_is_for_its_user_and_nothing_else(tmp_path: Path, api_type: str) -> None:
    async with agent(write(tmp_path, OTHER)) as running:
        await running.event("ready")
        visitor = await client(running.socket, tmp_path)
        async with envoy(running.socket, tmp_path, api_type=api_type) as proxy:
            refused = await running.event("refused", node="envoy-under-test")
            assert refused["cause"].startswith(f"a process of uid {ME} and gid {os.getegid()} may not have 'default'")
            await running.event("envoy_served", node="envoy-under-test", names="ROOTCA")
            loaded = {each.name: each for each in await to_thread.run_sync(EnvoyAdmin(str(proxy.place)).secrets)}
            assert (loaded["default"].state, loaded["default"].pem) == ("WARMING", b"")
            write(tmp_path, ME)
            await running.event("reloaded")
            await proxy.ready()
            await visitor.request(await proxy.port())
