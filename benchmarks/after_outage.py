"""How many requests a second a CA sees from many agents before, during and after an outage.

    python benchmarks/after_outage.py [--agents 20] [--workloads 1] [--lifetime 20] [--outage 40] [--hang]

Every agent has the issuers, the queue, the store and the bundle of a real one, all in this process and by the real
clock; the CA is a stand-in that signs in this process, counts requests and fails in between: it refuses connections, or
lets each request hang. Printed are, for each phase, the requests, the most in one second and the usual number, and
after the outage how long it takes until every workload has a valid certificate again. It ends by itself.
"""

import argparse
import asyncio
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sds_agent.authority.in_process import InProcessAuthority
from sds_agent.authority.protocol import AuthorityError, ErrorKind, Issuance, IssueRequest
from sds_agent.clock import SystemClock
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.issuer import Issuer
from sds_agent.issuance.publication import PublicationTarget
from sds_agent.issuance.queue import IssuanceQueue
from sds_agent.issuance.source import Upstream
from sds_agent.issuance.trust import Trust
from sds_agent.issuance.workload import Workload
from sds_agent.pki.keys import KeyType
from sds_agent.secrets.store import SecretStore
from sds_agent.signing.self_signed import SelfSignedCa

TRUST_DOMAIN = "demo.example"


class CountingCa:
    """A CA that is up or down, and counts the requests of each second of each phase."""

    def __init__(self, signer: InProcessAuthority, *, hang: bool) -> None:
        self._signer = signer
        self._hang = hang
        self._began = 0.0
        self.up = True
        self.seconds = Counter[int]()

    def phase(self) -> Counter[int]:
        """Begin to count anew; returns the counts of the phase before."""
        before, self.seconds = self.seconds, Counter()
        self._began = asyncio.get_running_loop().time()
        return before

    async def issue(self, request: IssueRequest) -> Issuance:
        """Answer, or fail."""
        self.seconds[int(asyncio.get_running_loop().time() - self._began)] += 1
        if self.up:
            return await self._signer.issue(request)
        if self._hang:
            await asyncio.Event().wait()
        raise AuthorityError(ErrorKind.TRANSIENT, "the CA is away")


def issuers(number: int, ca: CountingCa, chosen: argparse.Namespace) -> Iterator[Issuer]:
    """One agent's issuers."""
    clock = SystemClock()
    names = [f"agent{number}-w{each}" for each in range(chosen.workloads)]
    store = SecretStore([*names, "ROOTCA"])
    target, upstream = PublicationTarget(store, Trust(store, ["ROOTCA"], clock)), Upstream(ca, IssuanceQueue())
    for name in names:
        identity = SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/{name}")
        ttl = timedelta(seconds=chosen.lifetime)
        yield Issuer(Workload(name, identity, KeyType.EC_P256, ttl, "ca", (name,)), upstream, target, clock=clock)


async def valid(agents: list[Issuer]) -> float:
    """Wait until every workload has a valid certificate; returns the seconds that this took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not all(  # noqa: ASYNC110 - a status has no event, and none is to be added for a benchmark
        (leaf := each.status.current) is not None and leaf.valid(datetime.now(UTC)) and each.status.failure is None
        for each in agents
    ):
        await asyncio.sleep(0.05)
    return loop.time() - began


def show(phase: str, seconds: Counter[int], length: float, besides: str = "") -> None:
    """Print one phase."""
    total, most = sum(seconds.values()), max(seconds.values(), default=0)
    by_second = " ".join(str(seconds[each]) for each in range(min(int(length) + 1, 15)))
    print(f"{phase:28} {total:5} requests, {total / length:5.1f}/s, at most {most:3}/s   {by_second}{besides}")


async def run(chosen: argparse.Namespace, directory: Path) -> None:
    signer = await SelfSignedCa.open(
        directory,
        trust_domain=TRUST_DOMAIN,
        key_type=KeyType.EC_P256,
        lifetime=timedelta(days=365),
        clock=SystemClock(),
        setting="state_dir",
    )
    ca = CountingCa(InProcessAuthority(signer, "the stand-in CA", SystemClock(), timedelta(hours=1)), hang=chosen.hang)
    agents = [issuer for number in range(chosen.agents) for issuer in issuers(number, ca, chosen)]
    ca.phase()
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(each.run()) for each in agents]
        took = await valid(agents)
        await asyncio.sleep(1)
        show("all start at once", ca.phase(), 1 + took)
        await asyncio.sleep(chosen.lifetime)
        show("one lifetime, all well", ca.phase(), chosen.lifetime)
        ca.up = False
        await asyncio.sleep(chosen.outage)
        without = sum(1 for each in agents if not each.status.served)
        show("outage", ca.phase(), chosen.outage, f"   ({without} of {len(agents)} without a certificate at its end)")
        ca.up = True
        took = await valid(agents)
        await asyncio.sleep(chosen.lifetime / 4)
        show("the CA is back", ca.phase(), took + chosen.lifetime / 4, f"   (all valid after {took:.1f} s)")
        for each in running:
            each.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=20)
    parser.add_argument("--workloads", type=int, default=1, help="of each agent")
    parser.add_argument("--lifetime", type=int, default=20, help="seconds that a certificate is valid")
    parser.add_argument("--outage", type=int, default=40, help="seconds")
    parser.add_argument("--hang", action="store_true", help="the CA lets requests hang in place of refusing them")
    chosen = parser.parse_args()
    logging.disable()
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run(chosen, Path(directory) / "ca"))


if __name__ == "__main__":
    main()
