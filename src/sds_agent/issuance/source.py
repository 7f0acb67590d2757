"""One of a workload's authorities, as the workload asks it: an attempt with a limit, and what came of the last.

An attempt at a CA that signs waits for its turn among the CA's other requests. One at a source that makes certificates
by itself is a wait for the next of them: it takes no other workload's turn.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from datetime import datetime, timedelta
from functools import cached_property, partial
from typing import Any

from msgspec import Struct

from sds_agent.authority.protocol import (
    Authority,
    AuthorityError,
    CertifiesKeys,
    CurrentIdentity,
    ErrorKind,
    Supplier,
)
from sds_agent.clock import Clock
from sds_agent.issuance.adapter_calls import NoAnswerError
from sds_agent.issuance.queue import IssuanceQueue, Place, Priority
from sds_agent.issuance.requester import CA_TIMEOUT, Obtained, Receiver, Requester
from sds_agent.issuance.schedule import ALARM
from sds_agent.issuance.trust import Trust
from sds_agent.issuance.workload import Workload
from sds_agent.secrets.store import SecretStore
from sds_agent.tasks import giving


class Upstream(Struct, frozen=True, dict=True):
    """A CA, the queue for it, and the seconds that it has to answer. Each CA has a queue of its own, so that one that
    hangs delays no other.
    """

    authority: Authority | Supplier
    queue: IssuanceQueue
    timeout: float = CA_TIMEOUT

    @cached_property
    def supplier(self) -> Supplier | None:
        """The source, where it makes certificates by itself. Found once: thousands of workloads may ask it."""
        return self.authority if isinstance(self.authority, Supplier) else None

    @cached_property
    def signing(self) -> Authority | None:
        """The CA, where it signs requests."""
        return None if isinstance(self.authority, Supplier) else self.authority

    @cached_property
    def certifying(self) -> CertifiesKeys | None:
        """The CA, where it needs no requests."""
        return self.authority if isinstance(self.authority, CertifiesKeys) else None


class Attempt(Struct, frozen=True):
    """What an attempt goes by: the certificate to ask with (`current`), its `priority`, which is lower once an Envoy
    waits for one of the `names` of the `store`, and how long it may take.

    `begun` is called when its turn has come. `unless_until` is set where another authority's certificate is served: a
    source's certificate that ends by then, and soon, is the one that was given up, and no success.
    """

    current: CurrentIdentity | None
    priority: Callable[[], Priority]
    store: SecretStore
    names: tuple[str, ...]
    begun: Callable[[], None]
    limit: timedelta | None = None
    unless_until: datetime | None = None


class IssuanceSource:
    """The authority of that `name` for one workload."""

    def __init__(self, workload: Workload, name: str, upstream: Upstream, trust: Trust, clock: Clock) -> None:
        self.name = name
        self.answered_at: datetime | None = None
        """When it issued last."""
        self.error: AuthorityError | None = None
        """Why its last attempt failed; None if it did not."""
        self.supplied = upstream.supplier is not None
        """Whether it makes certificates by itself."""
        self._queue = upstream.queue
        self._clock = clock
        self._requester: Requester | Receiver
        if upstream.supplier is not None:
            self._requester = Receiver(workload, name, upstream.supplier, trust, clock)
        elif upstream.signing is not None:
            self._requester = Requester(
                workload, name, upstream.signing, trust, clock, certifying=upstream.certifying, timeout=upstream.timeout
            )

    @property
    def hung(self) -> bool:
        """Whether the last attempt had no answer in its time."""
        return isinstance(self.error, NoAnswerError)

    def take_over(self, before: "IssuanceSource") -> None:
        """Go on with what one for the same identity, which has ended, asked the same authority for."""
        if isinstance(self.requester, Requester) and isinstance(before.requester, Requester):
            self.requester.take_over(before.requester)

    def forget(self) -> None:
        """Keep no key of a request: another one goes on with it, or nobody."""
        if isinstance(self.requester, Requester):
            self.requester.forget()

    @property
    def requester(self) -> Requester | Receiver:
        """What asks."""
        return self._requester

    def begin(self, attempt: Attempt, tasks: asyncio.TaskGroup, ended: Callable[[], None]) -> "RunningAttempt":
        """Begin an attempt, with tasks of that group; `ended` is called when it is over."""
        if self.supplied or attempt.limit is not None:
            return RunningAttempt.at_once(self.ask(attempt), tasks, ended)
        return RunningAttempt.in_turn(self._queue, attempt, self._in_turn, tasks, ended)

    async def _in_turn(self, attempt: Attempt) -> Obtained | AuthorityError:
        attempt.begun()
        return await self._outcome(attempt, self._requester.ask(attempt.current))

    async def ask(self, attempt: Attempt) -> Obtained | AuthorityError:
        """Make one attempt; returns what came of it."""
        return await self._outcome(attempt, self._limited(attempt))

    async def _outcome(self, attempt: Attempt, asking: Coroutine[Any, Any, Obtained]) -> Obtained | AuthorityError:
        try:
            obtained = await asking
            self._check(obtained, attempt)
        except AuthorityError as error:
            self.error = _by_itself(error)
            return self.error
        self.error, self.answered_at = None, obtained.issued_at
        return obtained

    async def _limited(self, attempt: Attempt) -> Obtained:
        seconds = None if attempt.limit is None else attempt.limit.total_seconds()
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                if self.supplied:
                    return await self._requester.ask(attempt.current)
                async with self._queue.slot(attempt.priority, partial(attempt.store.hurrying, attempt.names)):
                    attempt.begun()
                    with _giving_until(limit.when()):
                        return await self._requester.ask(attempt.current)
        except TimeoutError as error:
            if not limit.expired() or seconds is None:
                raise
            raise NoAnswerError(seconds) from error

    def _check(self, obtained: Obtained, attempt: Attempt) -> None:
        """Raise AuthorityError for a source's certificate that is about to end like the one before it."""
        accepted = obtained.accepted
        if not self.supplied or attempt.unless_until is None or accepted.not_after > attempt.unless_until:
            return
        if accepted.not_after - self._clock.now() <= (accepted.not_after - accepted.not_before) * ALARM:
            raise AuthorityError(
                ErrorKind.TRANSIENT,
                f"the certificate that it gives ends at {accepted.not_after:%Y-%m-%d %H:%M:%S UTC} and was not "
                "replaced in time; see that what makes it runs",
            )


def _giving_until(end: float | None) -> AbstractContextManager[None]:
    """Give what is left until that time of the loop's clock: the wait for the turn was a part of it."""
    return nullcontext() if end is None else giving(max(end - asyncio.get_running_loop().time(), 0.0))


def _by_itself(error: AuthorityError) -> AuthorityError:
    """The error without where it was raised and because of what. It is kept until the next attempt, and with it would
    be the frames of the call: the keys in them, and all that the adapter had of an answer.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


Outcome = Coroutine[Any, Any, Obtained | AuthorityError]


class RunningAttempt:
    """An attempt under way. While it waits for its turn it has no task: thousands may wait for hours."""

    __slots__ = ("_attempt", "_context", "_ended", "_make", "_place", "_task", "_tasks")

    def __init__(self, tasks: asyncio.TaskGroup, ended: Callable[[], None]) -> None:
        self._context = copy_context()  # for its lines in the log: its turn comes in that of another attempt
        self._tasks = tasks
        self._ended = ended
        self._attempt: Attempt | None = None
        self._make: Callable[[Attempt], Outcome] | None = None
        self._place: Place | None = None
        self._task: asyncio.Task[Obtained | AuthorityError] | None = None

    @classmethod
    def at_once(cls, asking: Outcome, tasks: asyncio.TaskGroup, ended: Callable[[], None]) -> "RunningAttempt":
        """One that waits for no turn, or by itself."""
        running = cls(tasks, ended)
        running._start(asking)
        return running

    @classmethod
    def in_turn(
        cls,
        queue: IssuanceQueue,
        attempt: Attempt,
        make: Callable[[Attempt], Outcome],
        tasks: asyncio.TaskGroup,
        ended: Callable[[], None],
    ) -> "RunningAttempt":
        """One that begins with its turn."""
        running = cls(tasks, ended)
        running._attempt, running._make = attempt, make
        running._place = place = queue.join(attempt.priority, running._given)
        if place.waits:
            attempt.store.watch_awaited(attempt.names, running._hurry)
        return running

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return self._task is not None and self._task.done()

    @property
    def result(self) -> Obtained | AuthorityError | None:
        """What came of it; None where it was cancelled, or ended by a bug, which its task group raises."""
        task = self._task
        if task is None or not task.done() or task.cancelled() or task.exception() is not None:
            return None
        return task.result()

    def cancel(self) -> bool:
        """End it; returns False where it is over."""
        if self._task is not None:
            return self._task.cancel()
        self._wait_no_more()
        if self._place is None or not self._place.cancel():
            return False
        self._place = self._attempt = None  # they refer to each other, and the attempt to a key
        return True

    def _hurry(self) -> None:
        if self._place is not None:
            self._place.hurry()

    def _wait_no_more(self) -> None:
        if self._attempt is not None:
            self._attempt.store.unwatch_awaited(self._attempt.names, self._hurry)

    def _given(self) -> None:
        """Its turn has come."""
        self._wait_no_more()
        assert self._attempt is not None and self._make is not None, "see `in_turn`"  # noqa: S101, PT018 - for the type checker
        asking = self._make(self._attempt)
        try:
            self._start(asking)
        except RuntimeError:  # the group ends, and with it this attempt
            asking.close()
            asyncio.get_running_loop().call_soon(self._leave)

    def _start(self, asking: Outcome) -> None:
        self._task = self._tasks.create_task(asking, context=self._context)
        self._task.add_done_callback(self._over)

    def _over(self, _: "asyncio.Task[Obtained | AuthorityError]") -> None:
        self._leave()
        self._ended()

    def _leave(self) -> None:
        if (place := self._place) is not None:
            self._place = None  # it refers to this attempt: without that, both go as soon as the outcome was taken
            place.leave()
