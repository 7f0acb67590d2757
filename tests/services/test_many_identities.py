"""What one more identity costs an agent that has many: counted, not timed."""

import asyncio
import gc
import os
import sys
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType

import anyio
from anyio.lowlevel import checkpoint
from fakes.agents import write_config
from fakes.authorities import embedded
from fakes.hierarchy import HOUR

import sds_agent
from sds_agent.app import agent
from sds_agent.clock import SystemClock
from sds_agent.config.loading import load
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.anchors_file import AnchorsFile
from sds_agent.issuance.anchors_refresh import maintain
from sds_agent.issuance.cache import CertificateCache, WorkloadCache
from sds_agent.issuance.issuer import Issuer
from sds_agent.issuance.publication import PublicationTarget
from sds_agent.issuance.queue import IssuanceQueue
from sds_agent.issuance.source import Upstream
from sds_agent.issuance.trust import Trust
from sds_agent.issuance.workload import Workload
from sds_agent.live.agent import Agent
from sds_agent.pki.keys import KeyType
from sds_agent.secrets.model import CertificateSecret
from sds_agent.secrets.readiness import complete, watched
from sds_agent.secrets.store import SecretStore

STEP = 150
"""Identities; more than the certificates that anything is remembered of."""
MOST_BYTES = 9_000
"""Of memory for each identity, beside its chain and its key as they are served."""
OURS = str(Path(sds_agent.__file__).parent)


@asynccontextmanager
async def issued(folder: Path, identities: int) -> AsyncIterator[Agent]:
    """An agent inside this context that has issued for so many."""
    folder.mkdir()  # noqa: ASYNC240 - a test
    settings = load(write_config(folder, **{f"w{number}": "1h" for number in range(identities)}), {}).settings
    clock = SystemClock()
    local = await embedded(folder / "ca", clock)
    async with agent(settings, {"local": local}, clock) as running:
        with anyio.fail_after(60):
            await complete(running.store)
        yield running


async def kept(folder: Path, identities: int) -> None:
    """Return once so many certificates are in the state directory."""
    with anyio.fail_after(60):
        while len(os.listdir(folder / "state" / "certificates")) < identities:  # noqa: PTH208 - a test
            await checkpoint()


async def test_an_identity_takes_at_most_9_kilobytes_beside_its_certificate(tmp_path: Path) -> None:
    """Ten thousand on a node would else take a gigabyte, as if each had an agent of its own."""
    async with issued(tmp_path / "imports", 1):
        pass
    sizes, served = dict[int, int](), 0
    for number in (STEP, 2 * STEP):
        folder = tmp_path / str(number)
        tracemalloc.start()
        try:
            async with issued(folder, number) as running:
                await kept(folder, number)
                gc.collect()
                sizes[number], _ = tracemalloc.get_traced_memory()
                secret = running.store.secret("w0")
                assert isinstance(secret, CertificateSecret)
                served = len(secret.chain_pem) + len(secret.private_key_pem)
        finally:
            tracemalloc.stop()
    each = (sizes[2 * STEP] - sizes[STEP]) / STEP - served
    assert each <= MOST_BYTES


@asynccontextmanager
async def issuing(folder: Path, identities: int) -> AsyncIterator[SecretStore]:
    """The parts that issue, without what looks at all of them from time to time; inside this context they begin."""
    clock = SystemClock()
    names = [f"w{number}" for number in range(identities)]
    store = SecretStore([*names, "ROOTCA"])
    trust, cache = Trust(store, ["ROOTCA"], clock), CertificateCache(folder / "certificates")
    target, upstream = PublicationTarget(store, trust), Upstream(await embedded(folder / "ca", clock), IssuanceQueue())
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(maintain(trust, AnchorsFile(folder, {"local": "embedded"}), clock))]
        with watched(store):
            for name in names:
                identity = SpiffeId.parse(f"spiffe://demo.example/{name}")
                workload = Workload(name, identity, KeyType.EC_P256, HOUR, "local", (name,))
                issuer = Issuer(workload, upstream, target, clock=clock, cache=WorkloadCache(workload, cache))
                running.append(tasks.create_task(issuer.run()))
            yield store
            for each in running:
                each.cancel()


async def test_one_more_identity_costs_as_much_among_many_as_among_few(tmp_path: Path) -> None:
    """What looks at all identities for each of them takes minutes with ten thousand, in which nobody is served."""
    calls = dict[int, int]()
    steps = (STEP, 2 * STEP, 3 * STEP)
    for number in (1, *steps):  # the first for what is imported
        counted = 0

        def count(frame: FrameType, event: str, _: object) -> None:
            nonlocal counted
            counted += event == "call" and frame.f_code.co_filename.startswith(OURS)

        sys.setprofile(count)
        try:
            async with issuing(tmp_path / str(number), number) as store:
                with anyio.fail_after(60):
                    await complete(store)
                sys.setprofile(None)
        finally:
            sys.setprofile(None)
        calls[number] = counted
    few, middle, many = (calls[each] for each in steps)
    assert many - middle < 1.15 * (middle - few), "a step on the way of each for each other would add a third"
