"""Structured concurrency on asyncio alone: every task has an owner, and cancellation cuts no clean end short.

gRPC's server runs on asyncio and on nothing else. anyio's backend for it takes a tenth of the whole way to the first
secret to import, so what that way needs is made of asyncio's task groups and time-outs, and anyio is imported where
its own strengths are used.
"""

import asyncio
import errno
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Generic, ParamSpec, TypeVar

from sds_agent.errors import SdsAgentError

T = TypeVar("T")
P = ParamSpec("P")


DISK_TIMEOUT = 5.0
"""Seconds for the disk to give or take one of the agent's files, also at the end of the process."""


_time_given: ContextVar[float | None] = ContextVar("_time_given", default=None)


@contextmanager
def giving(seconds: float) -> Iterator[None]:
    """Tell what is called in this context after how many seconds its caller ends it, which it may divide
    (`time_given`). Of several the least counts.
    """
    before = _time_given.get()
    token = _time_given.set(seconds if before is None else min(before, seconds))
    try:
        yield
    finally:
        _time_given.reset(token)


def time_given() -> float | None:
    """How many seconds the caller gives to all of this call; None where it does not say."""
    return _time_given.get()


def part_of_time(part: float, otherwise: float) -> float:
    """That part of the seconds that the caller gives; `otherwise` where it does not say."""
    given = time_given()
    return otherwise if given is None else given * part


def time_at_least(seconds: float) -> float:
    """The seconds that the caller gives, and no fewer than these."""
    return max(seconds, time_given() or 0)


class NoThreadError(SdsAgentError):
    """The system starts no further thread at present."""

    def __init__(self) -> None:
        super().__init__(
            "no thread can be started: the machine is out of memory, or the limit on the processes and threads of this "
            "user or container is reached; raise it (ulimit -u, systemd's TasksMax, a container's pids limit)"
        )


class BackgroundTask:
    """A task that `background_tasks` owns, for who ends it sooner."""

    def __init__(self, task: "asyncio.Task[None]") -> None:
        self.task = task


Start = Callable[[Coroutine[Any, Any, None]], BackgroundTask]


@asynccontextmanager
async def background_tasks() -> AsyncIterator[Start]:
    """Tasks that live as long as this context: leaving it cancels them and waits until they have ended.

    What is yielded starts one. An exception in any of them ends the others and the context's body, and leaves it in an
    exception group.
    """
    running: set[asyncio.Task[None]] = set()
    async with asyncio.TaskGroup() as tasks:

        def start(coroutine: Coroutine[Any, Any, None]) -> BackgroundTask:
            task = tasks.create_task(coroutine)
            running.add(task)
            task.add_done_callback(running.discard)
            return BackgroundTask(task)

        try:
            yield start
        finally:
            for task in tuple(running):
                task.cancel()


async def ended(tasks: Iterable[BackgroundTask]) -> None:
    """Cancel these tasks, and return once they have ended. Their errors go to their owner."""
    running = [each.task for each in tasks if not each.task.done()]
    for each in running:
        each.cancel()
    if running:
        await asyncio.wait(running)


async def uninterrupted(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run it to its end, even while the caller is cancelled; that cancellation is raised afterwards.

    For ends that must be clean. They have to be bounded in time by themselves.
    """
    task = asyncio.ensure_future(coroutine)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # retrieved, or asyncio would log that it was not; the cancellation matters more
        raise cancelled
    return task.result()


class SharedCall(Generic[T]):
    """A call that all who ask for it meanwhile wait for, and that goes on when they are cancelled.

    Who has it ends it: `end` has to be the last.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[T] | None = None

    @property
    def under_way(self) -> bool:
        """Whether it runs."""
        return self._task is not None

    async def result(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What comes of the call under way, or else of this one, which begins. Raises what it raises."""
        task = self._task
        if task is None:
            self._task = task = asyncio.create_task(call())
            task.add_done_callback(self._over)
        await asyncio.wait([task])
        return task.result()

    async def end(self) -> None:
        """Cancel the call under way, and return once it has ended."""
        if self._task is not None:
            self._task.cancel()
            await uninterrupted(asyncio.wait([self._task]))

    def _over(self, task: "asyncio.Task[T]") -> None:
        self._task = None
        if not task.cancelled():
            task.exception()  # retrieved, or asyncio would log that it was not: every caller may be gone


async def in_thread(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call it in a thread that neither a cancelled caller waits for, nor the process at its end.

    For long computations, for what is in order wherever it is cut off, and within `uninterrupted` for others. The
    threads of an executor, and anyio's, hold up the interpreter's end until they are done. Raises NoThreadError when it
    could not begin.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def hand_over(settle: Callable[[Any], None], outcome: T | BaseException) -> None:
        with suppress(RuntimeError):  # the loop is closed, and with it every caller
            loop.call_soon_threadsafe(lambda: None if done.done() else settle(outcome))

    def work() -> None:
        try:
            result = function(*arguments, **options)
        except BaseException as error:  # noqa: BLE001 - the caller gets it
            hand_over(done.set_exception, error)
        else:
            hand_over(done.set_result, result)

    try:
        threading.Thread(target=work, name=f"in_thread {function.__name__}", daemon=True).start()
    except RuntimeError as error:
        raise NoThreadError from error
    return await done


def still_out() -> TimeoutError:
    """What a call is answered with while a late one before it has not returned: an OSError with a reason."""
    return TimeoutError(errno.ETIMEDOUT, "an earlier attempt has not come back yet")


def no_answer(seconds: float) -> TimeoutError:
    """What a late call is answered with: an OSError with a reason."""
    return TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} s")


class TimeLimit:
    """Calls that may hang, such as the reading of a file on a network's disk: each has `seconds` to return.

    Each runs in a thread of its own (`in_thread`), at most `most` of them at one time. A late call keeps its thread
    and its slot until it returns, and its result is dropped; so it must be harmless to make it again.
    """

    def __init__(self, seconds: float, most: int = 1) -> None:
        self._seconds = seconds
        self._most = most
        self._slots = asyncio.Semaphore(most)
        self._late = 0

    async def call(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Call it. Raises TimeoutError, an OSError with a reason, when it or the calls before it have not returned.

        Raises NoThreadError when it could not begin.
        """
        if self._late >= self._most:
            raise still_out()
        attempt, loop = _LimitedCall(), asyncio.get_running_loop()

        def work() -> T:
            try:
                return function(*arguments, **options)
            finally:
                with suppress(RuntimeError):  # the loop is closed, and no call will come
                    loop.call_soon_threadsafe(self._returned, attempt)

        deadline = asyncio.timeout(self._seconds)
        try:
            async with deadline:
                await self._slots.acquire()
                try:
                    return await in_thread(work)
                except Exception:
                    if not attempt.returned:  # no thread could be started
                        self._slots.release()
                    raise
                except asyncio.CancelledError:
                    attempt.late = deadline.expired() and not attempt.returned
                    self._late += attempt.late
                    raise
        except TimeoutError as error:
            if not deadline.expired():
                raise  # it is the function's own
            raise no_answer(self._seconds) from error

    def _returned(self, attempt: "_LimitedCall") -> None:
        """Its thread has ended; this comes before its result does."""
        attempt.returned = True
        self._late -= attempt.late
        self._slots.release()


class _LimitedCall:
    """One call: whether its thread has ended, and whether it was given up before."""

    returned = False
    late = False


class NonBlockingLookups(asyncio.SelectorEventLoop):
    """An event loop that looks names up in threads which the end of the process does not wait for.

    Where the servers for names do not answer, a lookup takes up to half a minute, and nothing can cut it short.
    """

    async def getaddrinfo(
        self,
        host: Any,
        port: Any,
        *,
        family: int = 0,
        type: int = 0,  # noqa: A002 - asyncio's name
        proto: int = 0,
        flags: int = 0,
    ) -> Any:
        """As asyncio's. Raises OSError."""
        try:
            return await in_thread(socket.getaddrinfo, host, port, family, type, proto, flags)
        except NoThreadError as error:
            raise socket.gaierror(socket.EAI_AGAIN, str(error)) from error
