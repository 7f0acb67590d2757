"""Whatever a CA does, Envoys get the valid certificate until it is replaced by another valid one: for every adapter."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fakes.clocks import HAND_LOOP, HandClock
from fakes.configurations import settings
from fakes.events import Events, recorded
from fakes.subjects import SUBJECTS
from msgspec import structs

from sds_agent import app
from sds_agent.authority import registry
from sds_agent.authority.kind import Context
from sds_agent.conformance import Fault, Front, Subject, SuiteCa
from sds_agent.conformance.front import BEFORE_HTTP
from sds_agent.issuance.requester import CA_TIMEOUT
from sds_agent.live.agent import Agent
from sds_agent.secrets.model import Secret

HANGS = {Fault.SILENT, Fault.SILENT_BEHIND_TLS, Fault.DRIPS}
WRONG = ("empty", "for_another_key", "without_name", "of_tomorrow", "expired")
TTL = timedelta(hours=1)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return HAND_LOOP


class Node:
    """An agent with one workload, whose CA is behind a front."""

    def __init__(self, front: Front, agent: Agent, clock: HandClock, events: Events) -> None:
        self.front = front
        self.agent = agent
        self.clock = clock
        self.events = events

    @property
    def served(self) -> Secret | None:
        """What an Envoy gets."""
        return self.agent.store.snapshot["web"]

    async def next_attempt(self) -> None:
        """Let the time come at which the agent asks next."""
        (status,) = self.agent.workloads
        when = status.failure.next_attempt if status.failure is not None else status.renew_at
        assert when is not None
        self.clock.elapse(max(when - self.clock.now(), timedelta()) + timedelta(seconds=0.001))

    async def failed(self, before: int, *, hangs: bool) -> None:
        """Wait until the attempt has failed; one at a CA that hangs ends at its deadline."""
        while len(self.events.named("retrying")) == before:
            if hangs and self.front.connected.is_set():
                self.clock.elapse(timedelta(seconds=CA_TIMEOUT + 1))
            await self.events.next()


async def run(subject: Subject, folder: Path, meet: Callable[[Node, SuiteCa], Awaitable[None]]) -> None:
    """Let the node meet it, with a certificate that was issued before."""
    ca, clock = SuiteCa(), HandClock(datetime.now(UTC))
    ca.now = clock.now
    async with AsyncExitStack() as stack:
        events = stack.enter_context(recorded())
        front = await stack.enter_async_context(Front(await stack.enter_async_context(subject.serving(ca))).serving())
        chosen = subject.settings(front.address, folder)
        context = Context("upstream", "demo.example", folder / "authority", clock)
        authority = await stack.enter_async_context(registry.kind(subject.kind).open(chosen, context))
        text = (
            f"trust_domain: demo.example\nstate_dir: {folder / 'state'}\nsds: {{socket: {folder / 's'}}}\n"
            f"workloads: [{{name: web, spiffe_id: '{subject.spiffe_id}', ttl: 1h}}]\n"
        )
        read = structs.replace(settings(folder, text), authorities={"upstream": chosen})
        agent = await stack.enter_async_context(app.agent(read, {"upstream": authority}, clock))
        await events.wait("issued")
        await meet(Node(front, agent, clock, events), ca)


def faults(subject: Subject) -> Iterator[Fault]:
    """Those that ask for a delay come last: each of them takes half of the rest of the certificate's life."""
    slow = {Fault.THROTTLED: 1, Fault.UNAVAILABLE: 1}
    return iter(sorted((f for f in Fault if f in BEFORE_HTTP or subject.http), key=lambda fault: slow.get(fault, 0)))


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.kind)
async def test_a_ca_that_fails_in_every_way_costs_no_envoy_its_certificate(subject: Subject, tmp_path: Path) -> None:
    async def meet(node: Node, _: SuiteCa) -> None:
        valid = node.served
        assert valid is not None
        for number, fault in enumerate(faults(subject)):
            await node.front.set(fault)
            await node.next_attempt()
            await node.failed(number, hangs=fault in HANGS)
            assert node.served is valid, fault
        await node.front.set(None)
        await node.next_attempt()
        await node.events.wait("renewed")
        assert node.served not in {None, valid}

    await run(subject, tmp_path, meet)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.kind)
async def test_a_ca_that_lies_costs_no_envoy_its_certificate(subject: Subject, tmp_path: Path) -> None:
    async def meet(node: Node, ca: SuiteCa) -> None:
        valid = node.served
        assert valid is not None
        for number, name in enumerate(WRONG):
            ca.issue = getattr(ca, name)
            await node.next_attempt()
            await node.failed(number, hangs=False)
            assert node.served is valid, name
        ca.issue = ca.good
        await node.next_attempt()
        await node.events.wait("renewed")
        assert node.served not in {None, valid}

    await run(subject, tmp_path, meet)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.kind)
async def test_an_hour_of_500_ends_with_the_next_answer(subject: Subject, tmp_path: Path) -> None:
    """The certificate of one hour has ended by then; a new one comes within the longest delay between two attempts."""

    async def meet(node: Node, _: SuiteCa) -> None:
        begin, failures = node.clock.now(), 0
        await node.front.set(Fault.FAILING if subject.http else Fault.CLOSES)
        while node.clock.now() < begin + TTL:
            await node.next_attempt()
            await node.failed(failures, hangs=False)
            failures += 1
        assert node.served is None, "it has ended"
        await node.front.set(None)
        await node.next_attempt()
        await node.events.wait("renewed")
        assert node.served is not None

    await run(subject, tmp_path, meet)
