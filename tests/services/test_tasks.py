"""Tasks end with their owner, and a clean end is not cut short."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from fakes.clocks import HAND_LOOP, HandClock
from fakes.events import recorded

from sds_agent.signals import until_signalled
from sds_agent.tasks import SharedCall, TimeLimit, background_tasks, in_thread, uninterrupted


class Step:
    """Something that can be waited for and seen to be cancelled."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.outcome = "not begun"

    async def run(self) -> None:
        self.outcome = "under way"
        self.begun.set()
        try:
            await self.go_on.wait()
            self.outcome = "done"
        except asyncio.CancelledError:
            self.outcome = "cancelled"
            raise


async def test_leaving_the_context_ends_its_tasks() -> None:
    step = Step()
    async with asyncio.timeout(10):
        async with background_tasks() as start:
            start(step.run())
            await step.begun.wait()
        assert step.outcome == "cancelled"


async def test_a_task_that_fails_ends_the_others_and_the_body() -> None:
    step = Step()

    async def fail() -> None:
        await step.begun.wait()
        raise OSError("broken")

    async def play() -> None:
        async with background_tasks() as start:
            start(step.run())
            start(fail())
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as raised:
        await asyncio.wait_for(play(), 10)
    assert [str(each) for each in raised.value.exceptions] == ["broken"]
    assert step.outcome == "cancelled"


async def test_a_clean_end_is_reached_though_its_caller_is_cancelled_again_and_again() -> None:
    step = Step()
    async with asyncio.timeout(10):
        caller = asyncio.create_task(uninterrupted(step.run()))
        await step.begun.wait()
        for _ in range(3):
            caller.cancel()
            await asyncio.wait([caller], timeout=0)
        assert step.outcome == "under way"
        step.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
    assert step.outcome == "done"


async def test_the_result_and_the_failure_of_a_clean_end_are_its_callers() -> None:
    async def seven() -> int:
        return 7

    async def fail() -> None:
        raise OSError("broken")

    assert await uninterrupted(seven()) == 7
    with pytest.raises(OSError, match="broken"):
        await uninterrupted(fail())


async def test_a_shared_call_is_made_once_and_goes_on_when_those_who_wait_for_it_leave() -> None:
    shared, steps = SharedCall[None](), [Step(), Step()]
    made = iter(steps)
    async with asyncio.timeout(10):
        callers = [asyncio.create_task(shared.result(lambda: next(made).run())) for _ in range(3)]
        await steps[0].begun.wait()
        for each in callers[:2]:
            each.cancel()
        await asyncio.wait(callers[:2])
        assert (steps[0].outcome, shared.under_way, callers[2].done()) == ("under way", True, False)
        steps[0].go_on.set()
        await callers[2]
        assert (steps[0].outcome, shared.under_way) == ("done", False)
        steps[1].go_on.set()
        await shared.result(lambda: next(made).run())
    assert steps[1].outcome == "done"


async def test_who_has_a_shared_call_ends_it_though_nobody_waits_for_it() -> None:
    shared, step = SharedCall[None](), Step()
    async with asyncio.timeout(10):
        await shared.end()
        caller = asyncio.create_task(shared.result(step.run))
        await step.begun.wait()
        caller.cancel()
        await asyncio.wait([caller])
        await shared.end()
    assert (step.outcome, shared.under_way) == ("cancelled", False)


async def test_a_shared_call_fails_for_all_who_wait_for_it(caplog: pytest.LogCaptureFixture) -> None:
    failed = asyncio.Event()

    async def fail() -> None:
        await asyncio.sleep(0)
        failed.set()
        raise OSError("broken")

    shared = SharedCall[None]()
    failures = await asyncio.gather(*(shared.result(fail) for _ in range(2)), return_exceptions=True)
    assert [str(each) for each in failures] == ["broken"] * 2
    failed.clear()
    left = asyncio.create_task(shared.result(fail))
    await asyncio.sleep(0)
    left.cancel()
    await failed.wait()
    await asyncio.sleep(0)
    assert not shared.under_way
    gc.collect()
    assert caplog.text == "", "of an error that is nobody's any more"


ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.mark.parametrize("number", ENDING)
async def test_a_signal_that_comes_twice_in_a_moment_cuts_no_end_short(number: signal.Signals) -> None:
    """GNU timeout sends one to the program and one to its group."""
    ended = False
    async with asyncio.timeout(10), until_signalled(same=60):
        os.kill(os.getpid(), number)
        try:
            await asyncio.Event().wait()
        finally:
            for again in (*ENDING, number):
                os.kill(os.getpid(), again)
                await asyncio.sleep(0)
            ended = True
    assert ended


@pytest.mark.parametrize("number", ENDING)
async def test_a_later_signal_is_not_caught(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in ENDING}
    while_ending = {}
    with recorded() as events:
        async with asyncio.timeout(10), until_signalled(same=0.01):
            os.kill(os.getpid(), number)
            try:
                await asyncio.Event().wait()
            finally:
                await events.wait("still_stopping")
                while_ending = {each: signal.getsignal(each) for each in before}
    # a terminal that closes sends SIGHUP more than once, and no operator in a hurry sent it
    assert while_ending == {each: signal.SIG_IGN if each is signal.SIGHUP else signal.SIG_DFL for each in before}
    assert {each: signal.getsignal(each) for each in before} == before


HELD_UP = """
import asyncio, os, signal, time
from sds_agent.signals import until_signalled
async def main():
    async with until_signalled(same=0.01):
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.Event().wait()
        finally:
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
asyncio.run(main())
"""


def test_a_later_signal_ends_a_program_whose_event_loop_is_blocked() -> None:
    assert subprocess.run([sys.executable, "-c", HELD_UP], check=False, timeout=30).returncode == -signal.SIGTERM


AT_ONCE = """
import asyncio, os, signal
from sds_agent.signals import until_signalled
async def main():
    loop, ended = asyncio.get_running_loop(), False
    removed = loop.remove_signal_handler
    def remove(number):
        found = removed(number)
        if not ended:
            os.kill(os.getpid(), number)
        return found
    loop.remove_signal_handler = remove
    async with until_signalled(same=60):
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.Event().wait()
        finally:
            ended = True
asyncio.run(main())
"""


def test_a_signal_that_comes_while_the_first_one_is_handled_cuts_no_end_short() -> None:
    assert subprocess.run([sys.executable, "-c", AT_ONCE], check=False, timeout=30).returncode == 0


async def test_a_time_out_of_something_else_is_not_taken_for_a_signal() -> None:
    with pytest.raises(TimeoutError):
        async with until_signalled():
            raise TimeoutError


async def test_what_a_thread_computes_or_raises_is_its_callers() -> None:
    def divide(number: int, *, by: int) -> float:
        assert threading.current_thread() is not threading.main_thread()
        return number / by

    assert await in_thread(divide, 6, by=3) == 2
    with pytest.raises(ZeroDivisionError):
        await in_thread(divide, 6, by=0)


async def test_a_caller_that_is_cancelled_does_not_wait_for_its_thread() -> None:
    go_on = threading.Event()
    caller = asyncio.create_task(in_thread(go_on.wait, 10))
    await asyncio.wait([caller], timeout=0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(caller, 5)
    go_on.set()


class Dead:
    """A stand-in for a file on a disk of the network that is gone."""

    def __init__(self) -> None:
        self._alive = threading.Event()

    def read_bytes(self) -> bytes:
        """Hangs until `revive` is called."""
        assert self._alive.wait(60)
        return b""

    def revive(self) -> None:
        """Let those that hang go on, and those that come later."""
        self._alive.set()


@pytest.fixture
def dead() -> Iterator[Dead]:
    made = Dead()
    yield made
    made.revive()


@pytest.mark.parametrize("anyio_backend", [HAND_LOOP])
async def test_what_hangs_is_not_waited_for_and_no_more_threads_hang_than_may(dead: Dead) -> None:
    """Otherwise one peer could fill the process with threads that never end, and every caller would wait for ever."""
    timeout = TimeLimit(30, most=2)
    for _ in range(9):
        caller = asyncio.ensure_future(timeout.call(dead.read_bytes))
        await asyncio.sleep(0)
        HandClock().elapse(timedelta(seconds=30))
        with pytest.raises(TimeoutError) as late:
            await caller
        assert late.value.strerror, "the words for a log"
    assert len(hanging()) == 2
    with pytest.raises(TimeoutError, match="earlier attempt"):
        await timeout.call(dead.read_bytes)
    stuck = hanging()
    dead.revive()
    for thread in stuck:
        await asyncio.to_thread(thread.join, 10)
    await asyncio.sleep(0)  # the loop hears of it
    assert [await timeout.call(int, number) for number in "123"] == [1, 2, 3]


def hanging() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "in_thread work"]


async def test_who_comes_while_others_work_waits_for_a_place(dead: Dead) -> None:
    timeout = TimeLimit(10)
    first = asyncio.ensure_future(timeout.call(dead.read_bytes))
    await asyncio.sleep(0)
    others = [asyncio.ensure_future(timeout.call(int, number)) for number in "123"]
    dead.revive()
    assert await first == b""
    assert await asyncio.gather(*others) == [1, 2, 3]


async def test_a_failure_is_its_callers_and_takes_no_place(tmp_path: Path) -> None:
    timeout = TimeLimit(10)
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            await timeout.call((tmp_path / "nothing").read_bytes)
        with pytest.raises(TimeoutError, match="its own"):
            await timeout.call(fail_late)


def fail_late() -> None:
    raise TimeoutError("its own")


@pytest.mark.parametrize("anyio_backend", [HAND_LOOP])
async def test_failures_let_no_more_threads_hang_than_may(dead: Dead) -> None:
    timeout = TimeLimit(30)
    for _ in range(3):
        with pytest.raises(TimeoutError, match="its own"):
            await timeout.call(fail_late)
    callers = [asyncio.ensure_future(timeout.call(dead.read_bytes)) for _ in range(3)]
    await asyncio.sleep(0)
    HandClock().elapse(timedelta(seconds=30))
    late = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(each) for each in late] == [TimeoutError] * 3
    stuck = hanging()
    assert len(stuck) == 1
    dead.revive()
    for thread in stuck:
        await asyncio.to_thread(thread.join, 10)


async def test_who_comes_after_a_caller_that_left_waits_as_for_any_other(dead: Dead) -> None:
    """Only what is late for its own time is a reason to refuse at once."""
    timeout = TimeLimit(10)
    first = asyncio.ensure_future(timeout.call(dead.read_bytes))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.ensure_future(timeout.call(int, "7"))
    await asyncio.sleep(0)
    dead.revive()
    assert await second == 7


async def test_a_caller_that_leaves_gives_its_place_back_when_its_thread_ends(dead: Dead) -> None:
    timeout = TimeLimit(10)
    caller = asyncio.ensure_future(timeout.call(dead.read_bytes))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    dead.revive()
    assert await timeout.call(int, "7") == 7
