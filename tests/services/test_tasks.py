"""Tasks end with their owner, and a clean end is not cut short."""

import asyncio
import os
import signal
import subprocess
import sys
import threading

import pytest
from fakes.events import recorded

from sds_agent.signals import until_signalled
from sds_agent.tasks import companions, in_thread, uninterrupted


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
        async with companions() as start:
            start(step.run())
            await step.begun.wait()
        assert step.outcome == "cancelled"


async def test_a_task_that_fails_ends_the_others_and_the_body() -> None:
    step = Step()

    async def fail() -> None:
        await step.begun.wait()
        raise OSError("broken")

    async def play() -> None:
        async with companions() as start:
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
    # a terminal that closes sends SIGHUP more than once, and nobody in a hurry stands behind it
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


def test_a_later_signal_ends_a_program_whose_event_loop_is_held_up() -> None:
    assert subprocess.run([sys.executable, "-c", HELD_UP], check=False, timeout=30).returncode == -signal.SIGTERM


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
