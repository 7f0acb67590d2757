"""A container's limit of processes is reached while the agent runs: its certificates stay, and are renewed later."""

import json

from fakes.agents import Agent
from fakes.limits import as_user, no_further_thread, users_directory
from fakes.peers import connected
from fakes.processes import started

RUN = "from sds_agent.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
MODULES = [
    "anyio._backends._asyncio",
    "encodings.idna",
    "sds_agent.app",
    "sds_agent.cli.parser",
    "sds_agent.cli.run",
    "sds_agent.config.loading",
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
