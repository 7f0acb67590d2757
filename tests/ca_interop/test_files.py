"""Files that SPIRE's own command writes (`spire-agent api fetch x509 -write`), behind the kind `files`."""

from contextlib import AbstractAsyncContextManager
from pathlib import Path

import anyio
from ca_interop.driver import Running, agent, program
from ca_interop.test_spiffe import HOUR, Spire, key_id, spire
from cryptography import x509

from sds_agent.pki.certificates import read_pem


class Writer:
    """The command, which writes svid.0.pem, svid.0.key and bundle.0.pem one after the other, in place."""

    def __init__(self, made: Spire, directory: Path) -> None:
        self._command = [program("spire-agent"), "api", "fetch", "x509", "-socketPath", str(made.socket)]
        self._command += ["-write", str(directory), "-silent", "-timeout", "5s"]
        self.directory = directory
        directory.mkdir()

    async def write(self, *, changed_from: x509.Certificate | None = None) -> x509.Certificate:
        """Run it until it has written another certificate than that; returns the one that it wrote."""
        with anyio.fail_after(60):
            while True:
                done = await anyio.run_process(self._command, check=False)
                if done.returncode == 0:  # a new entry takes some seconds to be one for its agent
                    leaf = read_pem((self.directory / "svid.0.pem").read_bytes())[0]
                    if leaf != changed_from:
                        return leaf
                await anyio.sleep(1)  # the command tells of no change: it is run as cron would

    async def fails(self) -> None:
        """Run it where it can write nothing."""
        done = await anyio.run_process(self._command, check=False)
        assert done.returncode != 0


def follows(place: Path, writer: Writer) -> AbstractAsyncContextManager[Running]:
    """The agent, which takes its certificates from the files."""
    return agent(place, {"type": "files", "directory": str(writer.directory)})


async def test_first_certificate_and_three_renewals(place: Path) -> None:
    async with spire(place) as made:
        await made.register()
        writer = Writer(made, place / "written")
        leaf = await writer.write()
        async with follows(place, writer) as running:
            assert await running.first() == leaf
            for _ in range(3):
                leaf = await writer.write(changed_from=leaf)
                assert await running.more() == leaf
            assert not running.events.named("retrying")
            assert not running.events.named("watched_by_time")


async def test_a_restart_of_the_ca_and_an_outage_cost_no_certificate(place: Path) -> None:
    async with spire(place) as made:
        await made.register(life=HOUR)
        writer = Writer(made, place / "written")
        first = await writer.write()
        async with follows(place, writer) as running:
            assert await running.first() == first
            await made.agent.stop()
            await writer.fails()
            assert running.chain()[0] == first
            assert running.status().failure is None
            await made.agent.start()
            leaf = await writer.write(changed_from=first)
            assert await running.more() == leaf


async def test_a_rotation_of_the_ca_is_in_the_bundle_before_the_first_leaf(place: Path) -> None:
    async with spire(place) as made:
        await made.register()
        writer = Writer(made, place / "written")
        first = await writer.write()
        async with follows(place, writer) as running:
            assert await running.first() == first
            new = await made.authority("prepare")
            leaf = first
            while len(running.bundle) < 2:
                leaf = await writer.write(changed_from=leaf)
                assert await running.more() == leaf
            await made.authority("activate", new)
            while key_id(leaf) == key_id(first):
                leaf = await writer.write(changed_from=leaf)
                assert await running.more() == leaf
            assert key_id(running.chain()[0]) == new
            assert not running.events.named("expired")
