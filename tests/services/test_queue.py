"""Who may ask the CA next: an Envoy that waits never queues behind certificates that are good for hours."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

import anyio
import pytest
from anyio.abc import TaskGroup, TaskStatus
from anyio.lowlevel import checkpoint
from fakes.hierarchy import HOUR, NOW
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.issuance.queue import Hurrying, IssuanceQueue, Priority


def priority(expiry: datetime = NOW, *, awaited: bool = False) -> Callable[[], Priority]:
    return lambda: (not awaited, expiry)


class Hurry:
    """Says that a priority has become lower."""

    def __init__(self) -> None:
        self.watchers: list[Callable[[], None]] = []

    @contextmanager
    def hurrying(self, watcher: Callable[[], None]) -> Iterator[None]:
        """A `Hurrying`."""
        self.watchers.append(watcher)
        try:
            yield
        finally:
            self.watchers.remove(watcher)

    def tell(self) -> None:
        """Call those that wait."""
        for watcher in tuple(self.watchers):
            watcher()


class Visitors:
    """Tasks that go through a queue, hold their slot until the test lets them leave, and can be cancelled."""

    def __init__(self, queue: IssuanceQueue, tasks: TaskGroup) -> None:
        self.entered: list[str] = []
        self.inside: list[str] = []
        self.scopes: dict[str, anyio.CancelScope] = {}
        self._queue = queue
        self._tasks = tasks
        self._leave: dict[str, anyio.Event] = {}
        self._entered = anyio.Event()

    async def come(self, name: str, priority: Callable[[], Priority], hurrying: Hurrying | None = None) -> None:
        """Return when the visitor is inside, or waits."""
        self._leave[name] = anyio.Event()
        self.scopes[name] = await self._tasks.start(self._visit, name, priority, hurrying or Hurry().hurrying)

    async def _visit(
        self,
        name: str,
        priority: Callable[[], Priority],
        hurrying: Hurrying,
        *,
        task_status: TaskStatus[anyio.CancelScope],
    ) -> None:
        with anyio.CancelScope() as scope:
            task_status.started(scope)
            async with self._queue.slot(priority, hurrying):
                self.entered.append(name)
                self.inside.append(name)
                self._entered.set()
                self._entered = anyio.Event()
                try:
                    await self._leave[name].wait()
                finally:
                    self.inside.remove(name)

    def leave(self, name: str) -> None:
        """Give up the place."""
        self._leave[name].set()

    async def order(self, count: int) -> list[str]:
        """Who has entered, in order, once so many have."""
        with anyio.fail_after(10):
            while len(self.entered) < count:
                await self._entered.wait()
        return self.entered


async def test_eight_go_in_at_once_and_the_ninth_waits() -> None:
    async with anyio.create_task_group() as tasks:
        visitors = Visitors(IssuanceQueue(), tasks)
        for number in range(9):
            await visitors.come(f"{number}", priority())
        assert visitors.inside == [f"{number}" for number in range(8)]
        visitors.leave("3")
        assert (await visitors.order(9))[-1] == "8"
        tasks.cancel_scope.cancel()


async def test_awaited_workloads_go_first_and_then_those_that_expire_first() -> None:
    async with anyio.create_task_group() as tasks:
        visitors = Visitors(IssuanceQueue(1), tasks)
        await visitors.come("occupant", priority())
        await visitors.come("late", priority(NOW + 3 * HOUR))
        await visitors.come("soon", priority(NOW + HOUR))
        await visitors.come("awaited late", priority(NOW + 3 * HOUR, awaited=True))
        await visitors.come("middle", priority(NOW + 2 * HOUR))
        await visitors.come("awaited soon", priority(NOW + HOUR, awaited=True))
        expected = ["occupant", "awaited soon", "awaited late", "soon", "middle", "late"]
        for name in expected:
            await visitors.order(expected.index(name) + 1)
            visitors.leave(name)
        assert visitors.entered == expected


async def test_the_first_to_come_goes_first_among_equals() -> None:
    async with anyio.create_task_group() as tasks:
        visitors = Visitors(IssuanceQueue(1), tasks)
        for name in ("a", "b", "c", "d"):
            await visitors.come(name, priority())
        for number, name in enumerate(("a", "b", "c", "d"), start=1):
            assert (await visitors.order(number))[-1] == name
            visitors.leave(name)


async def test_the_priority_counts_at_the_moment_a_slot_becomes_free() -> None:
    """An Envoy that comes while its identity queues moves it to the front."""
    awaited: set[str] = set()
    async with anyio.create_task_group() as tasks:
        visitors = Visitors(IssuanceQueue(1), tasks)
        await visitors.come("occupant", priority())
        await visitors.come("soon", priority(NOW + HOUR))
        hurry = Hurry()
        await visitors.come("late", lambda: ("late" not in awaited, NOW + 2 * HOUR), hurry.hurrying)
        awaited.add("late")
        hurry.tell()
        visitors.leave("occupant")
        assert await visitors.order(2) == ["occupant", "late"]
        tasks.cancel_scope.cancel()


async def test_the_envoy_that_left_while_its_identity_queued_keeps_no_other_waiting() -> None:
    awaited = {"left"}
    async with anyio.create_task_group() as tasks:
        visitors = Visitors(IssuanceQueue(1), tasks)
        await visitors.come("occupant", priority())
        await visitors.come("left", lambda: ("left" not in awaited, NOW + 2 * HOUR))
        await visitors.come("soon", priority(NOW + HOUR))
        awaited.clear()
        visitors.leave("occupant")
        assert await visitors.order(2) == ["occupant", "soon"]
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("waiting", [50, 400])
async def test_a_slot_costs_no_more_the_more_identities_wait(waiting: int) -> None:
    """A restart with ten thousand identities would else take minutes, in which the loop serves nobody."""
    computed, taken = 0, list[int]()

    def counted(number: int) -> Priority:
        nonlocal computed
        computed += 1
        return 1, NOW + timedelta(seconds=number)

    async def visit(queue: IssuanceQueue, number: int) -> None:
        async with queue.slot(lambda: counted(number)):
            taken.append(computed)

    queue = IssuanceQueue(1)
    async with anyio.create_task_group() as tasks, queue.slot(priority()):
        for number in range(waiting):
            tasks.start_soon(visit, queue, number)
        await anyio.wait_all_tasks_blocked()
    assert len(taken) == waiting
    assert computed == 2 * waiting


async def test_a_cancelled_request_is_passed_over() -> None:
    async with anyio.create_task_group() as tasks:
        visitors = Visitors(IssuanceQueue(1), tasks)
        for name in ("occupant", "impatient", "patient"):
            await visitors.come(name, priority())
        visitors.scopes["impatient"].cancel()
        await checkpoint()
        visitors.leave("occupant")
        assert await visitors.order(2) == ["occupant", "patient"]
        visitors.leave("patient")


async def given_back(queue: IssuanceQueue, slots: int) -> None:
    """Every place is free: so many go in at once, and one more does not."""
    async with anyio.create_task_group() as tasks:
        visitors = Visitors(queue, tasks)
        for number in range(slots + 1):
            await visitors.come(f"{number}", priority())
        await anyio.wait_all_tasks_blocked()
        assert len(visitors.inside) == slots
        tasks.cancel_scope.cancel()


async def test_a_request_that_is_cancelled_in_the_moment_of_its_turn_hands_the_slot_on() -> None:
    """The place was theirs already; lost, it would be missing for ever, and after eight the agent would stand still."""
    queue = IssuanceQueue(1)
    entered: list[str] = []

    async def visit(name: str) -> None:
        async with queue.slot(priority()):
            entered.append(name)

    async with queue.slot(priority()):
        # anyio lets a task that has been woken go on before it cancels it; asyncio's own cancellation does not
        unlucky, patient = (asyncio.create_task(visit(name)) for name in ("unlucky", "patient"))
        await anyio.wait_all_tasks_blocked()  # both wait in the queue
    unlucky.cancel()
    with anyio.fail_after(10):
        await patient
    assert entered == ["patient"]
    assert unlucky.cancelled()
    await given_back(queue, 1)


@pytest.mark.parametrize("fault", [RuntimeError("a bug"), TimeoutError()])
async def test_a_slot_is_given_back_whatever_happens_inside(fault: Exception) -> None:
    queue = IssuanceQueue(1)
    with pytest.raises(type(fault)):
        async with queue.slot(priority()):
            raise fault
    with anyio.fail_after(10):
        async with queue.slot(priority()):
            pass


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from(["come", "leave", "cancel", "turn"]), st.integers(0, 9)), max_size=40),
)
def test_no_slot_is_ever_lost_or_given_twice(slots: int, steps: list[tuple[str, int]]) -> None:
    async def play() -> None:
        queue = IssuanceQueue(slots)
        async with anyio.create_task_group() as tasks:
            visitors = Visitors(queue, tasks)
            names, present = list[str](), set[str]()
            for what, number in steps:
                match what:
                    case "come":
                        names.append(f"{len(names)}")
                        present.add(names[-1])
                        await visitors.come(names[-1], priority(NOW + timedelta(hours=number), awaited=number % 2 == 0))
                    case "leave" if names:
                        visitors.leave(names[number % len(names)])
                        present.discard(names[number % len(names)])
                    case "cancel" if names:
                        visitors.scopes[names[number % len(names)]].cancel()
                        present.discard(names[number % len(names)])
                    case "turn":
                        await checkpoint()
                assert len(visitors.inside) <= slots
            await anyio.wait_all_tasks_blocked()
            assert len(visitors.inside) == min(slots, len(present)), "no visitor waits while a slot is free"
            tasks.cancel_scope.cancel()
        await given_back(queue, slots)

    anyio.run(play)
