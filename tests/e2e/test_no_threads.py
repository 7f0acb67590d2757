"""A container's limit of processes is reached while the agent runs: its certificates stay, and are renewed later. Or
while the CA server runs: it goes on with what it has read.
"""

import json

import grpc.aio
import pytest
from fakes.agents import Agent
from fakes.ca_servers import TRUST_DOMAIN, WEB, Served, TokenIssuer, ask, fresh, plug
from fakes.limits import as_user, no_further_thread, users_directory
from fakes.peers import connected
from fakes.processes import started

from sds_agent.ca.tokens import PREFIX
from sds_agent.pki.certificates import write_pem

RUN = "from sds_agent.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
MODULES = [
    "anyio._backends._asyncio",
    "encodings.idna",
    "sds_agent.app",
    "sds_agent.cli.parser",
    "sds_agent.cli.run",
    "sds_agent.config.loading",
]
CA_MODULES = [
    "anyio._backends._asyncio",
    "encodings.idna",
    "jwt.algorithms",
    "sds_agent.ca.server",
    "sds_agent.cli.ca_serve",
    "sds_agent.cli.parser",
]


async def test_agent_that_can_start_no_thread_serves_on_and_renews_when_it_can() -> None:
    """The agent makes RSA keys and stores certificates in threads: a host that can start none must not end it."""
    with users_directory() as directory:
        config = {
            "trust_domain": "demo.example",
            "state_dir": str(directory / "state"),
            "keep_certificates": True,
            "sds": {"socket": str(directory / "sds.sock")},
            "workloads": [
                {"name": "rsa", "spiffe_id": "spiffe://demo.example/rsa", "key": "rsa-2048", "ttl": "6s"},
                {"name": "ec", "spiffe_id": "spiffe://demo.example/ec", "ttl": "6s"},
            ],
        }
        file = directory / "sds-agent.yaml"
        file.write_text(json.dumps(config))
        file.chmod(0o644)
        command = [*as_user(RUN, modules=MODULES), "run", str(file), "--log-format", "json"]
        async with started(command) as program:
            agent = Agent(program, directory / "sds.sock")
            for name in ("rsa", "ec"):
                await agent.event("issued", workload=name)
            with no_further_thread(program.process.pid):
                failure = await agent.event("retrying", workload="rsa")
                assert failure["kind"] == "transient"
                assert "no thread can be started" in failure["cause"]
                assert failure["serving"] == "the current certificate"
                await agent.event("renewed", workload="ec")
                for _ in range(5):
                    async with connected(agent.socket) as peer:
                        assert set(await peer.fetch("rsa", "ROOTCA")) == {"rsa", "ROOTCA"}
            await agent.event("renewed", workload="rsa")
            assert await program.stop() == 0


async def test_ca_server_that_can_start_no_thread_goes_on_with_what_it_has_read() -> None:
    """It reads its files in threads, again and again: a host that can start none must not end it."""
    with users_directory() as directory:
        denied, signer, root = directory / "denied", directory / "cacerts", fresh("root")
        denied.write_text("# no identity\n")
        plug(signer, root, [], [root])
        for path in (denied, signer, *signer.iterdir()):
            path.chmod(0o755)
        config = {
            "trust_domain": TRUST_DOMAIN,
            "listen": "127.0.0.1:0",
            "signer": {"cacerts": str(signer)},
            "callers": {"join_tokens": str(directory / "tokens"), "deny_file": str(denied)},
            "audit": str(directory / "audit.log"),
            "log": {"format": "json"},
        }
        file = directory / "ca.yaml"
        file.write_text(json.dumps(config))
        file.chmod(0o644)
        async with started([*as_user(RUN, modules=CA_MODULES), "ca", "serve", str(file)]) as program:
            address = json.loads(await program.line('"event":"listening"'))["address"]
            ca = Served(address, directory, TokenIssuer(), write_pem([root.certificate]))
            with no_further_thread(program.process.pid):
                async with ca.connected() as channel:
                    for _ in range(3):
                        with pytest.raises(grpc.aio.AioRpcError) as caught:
                            await ask(channel, f"{PREFIX}unknown")
                        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                for event in ("deny_list_not_taken", "signer_not_read"):
                    assert "no thread can be started" in json.loads(await program.line(f'"event":"{event}"'))["cause"]
            denied.write_text(f"{WEB}\n")
            await program.line('"event":"deny_list",')
            assert await program.stop() == 0
            assert len([line for line in program.lines if '"event":"no_thread"' in line]) == 1, "anyone may call"
