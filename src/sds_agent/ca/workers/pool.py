"""The workers as the parent has them: started, told what changes, given connections, replaced, and drained."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from cryptography.hazmat.primitives.serialization import Encoding

from sds_agent import log
from sds_agent.ca.acceptor import Accepting
from sds_agent.ca.denied import Denied
from sds_agent.ca.opening import Opened, rules
from sds_agent.ca.status import WorkerStatus
from sds_agent.ca.workers.desk import Desk
from sds_agent.ca.workers.messages import Denials, Keys, Refresh, Reply, Setup, SignerMaterial, ToParent
from sds_agent.ca.workers.process import Command, Worker, WorkerError, end_of, started
from sds_agent.ca.workers.silence import ASK_EVERY
from sds_agent.clock import Beginning
from sds_agent.descriptors import room_for
from sds_agent.errors import SdsAgentError
from sds_agent.pki.keys import to_pkcs8_pem
from sds_agent.signing.signing_set import SigningSet
from sds_agent.tasks import BackgroundTask, Start, background_tasks, ended, uninterrupted

LOG = logging.getLogger(__name__)

SHARE_EVERY = 0.5
"""Seconds from one look for changes of the signer, the deny list and the key sets to the next."""
START_TIMEOUT = 60.0
"""Seconds for a worker to be ready, on a machine that is busy with starting."""
GRACE = 10.0
"""Seconds for the workers to drain: longer than `server.FAREWELL` and `server.FLUSH` together."""
STEADY = 60.0
"""Seconds that a worker runs before its end says nothing of the next one's."""
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0


class Pace:
    """How long to wait before a worker is started in the place of one that ended.

    Not at all where that one was steady, or its like for the first time; then FIRST_PAUSE, doubled up to LONGEST_PAUSE.
    """

    def __init__(self) -> None:
        self._next = 0.0

    def pause(self, lasted: float) -> float:
        """Seconds to wait, where the last worker lasted for so many."""
        if lasted >= STEADY:
            self._next = 0.0
        pause = self._next
        self._next = min(max(FIRST_PAUSE, 2 * pause), LONGEST_PAUSE)
        return pause


class Pool:
    """`count` workers on the parts that the parent has opened."""

    def __init__(self, parts: Opened, count: int, command: Command) -> None:
        self._parts = parts
        self._count = count
        self._command = command
        limits = parts.settings.limits
        self._room = room_for(limits.connections)  # workers inherit what this makes of the limit on descriptors
        most = min(limits.connections, count * self._room)
        self._desk = Desk(parts.ledger, parts.clock, most=most, room=self._room)
        self._started = set[Worker]()
        self._ready: dict[int, Worker] = {}
        self._some_ready = asyncio.Event()
        self._draining = False
        self._shared = self._current()
        self._material = material(self._shared[0])

    @property
    def connections(self) -> int:
        """How many are open."""
        return self._desk.connections

    def statuses(self) -> tuple[WorkerStatus, ...]:
        """Of those that answer calls."""
        return tuple(
            WorkerStatus(
                worker=number,
                pid=each.pid,
                started_at=each.beginning.at,
                connections=len(each.connections),
                in_work=len(each.places),
            )
            for number, each in sorted(self._ready.items())
        )

    @asynccontextmanager
    async def running(self, listener: socket.socket) -> AsyncIterator[None]:
        """The workers, which answer those that connect inside this context, and then drain.

        Raises ConfigurationError and WorkerError where the first ones cannot start.
        """
        async with background_tasks() as start, AsyncExitStack() as until_drained:
            keepers = list[BackgroundTask]()
            until_drained.push_async_callback(lambda: uninterrupted(self._drain(keepers)))
            numbers = range(1, self._count + 1)
            for worker in await _all_or_first_error([asyncio.ensure_future(self._launch(n, start)) for n in numbers]):
                keepers.append(start(self._keep(worker, start)))
            start(self._share())
            start(self._check())
            start(self._accept(listener))
            yield

    async def _accept(self, listener: socket.socket) -> None:
        with Accepting(listener) as accepting:
            while True:
                await self._some_ready.wait()
                arrival = await accepting.next()
                with arrival.plain:
                    await self._some_ready.wait()  # the last one may have ended meanwhile
                    if not self._draining:
                        self._desk.hand_over(arrival, self._ready.values())
                await asyncio.sleep(0)  # a queue of new connections must not hold up the questions

    # Their lives

    async def _launch(self, number: int, start: Start) -> Worker:
        """Start a worker and wait until it is ready. Raises ConfigurationError and WorkerError."""

        def receive(worker: Worker, message: ToParent) -> None:
            if isinstance(message, Refresh):
                start(self._refresh(worker, message))
            else:
                self._desk.receive(worker, message)

        worker = await started(number, self._command, Beginning(self._parts.clock), receive)
        self._started.add(worker)
        worker.send(self._setup())
        try:
            await _until_ready(worker)
        except BaseException:
            worker.kill()
            await uninterrupted(worker.process.wait())
            self._bury(worker)
            raise
        self._ready[number] = worker
        self._some_ready.set()
        log.event(LOG, "worker_started", worker=number, process=worker.pid)
        return worker

    async def _keep(self, worker: Worker, start: Start) -> None:
        """Wait for the worker's end, and start another one in its place, again and again."""
        loop, pace, number = asyncio.get_running_loop(), Pace(), worker.number
        while True:
            began = loop.time()
            await worker.process.wait()
            self._bury(worker)
            self._parts.ledger.counts.workers_ended.add()
            pause = pace.pause(loop.time() - began)
            log.event(
                LOG,
                "worker_ended",
                level=logging.ERROR,
                worker=number,
                process=worker.pid,
                cause=f"it {worker.end()}",
                effect="its connections and the calls on them are lost; the other workers go on",
                again_in=pause,
            )
            worker = await self._again(number, pace, pause, start)

    async def _check(self) -> None:
        """Ask all workers whether they are alive, again and again, until cancelled. One that hangs is ended."""
        asked_at = self._parts.clock.passed()
        while True:
            await self._parts.clock.sleep(ASK_EVERY)
            before, asked_at = asked_at, self._parts.clock.passed()
            for worker in self._ready.values():
                worker.check(asked_at - before)

    async def _again(self, number: int, pace: Pace, pause: float, start: Start) -> Worker:
        """Start a worker after that pause, or after longer ones until one is ready."""
        while True:
            await asyncio.sleep(pause)
            try:
                return await self._launch(number, start)
            except SdsAgentError as error:
                pause, cause = pace.pause(0), str(error)
                log.event(LOG, "worker_not_started", level=logging.ERROR, worker=number, cause=cause, again_in=pause)

    def _bury(self, worker: Worker) -> None:
        """Take back all that the worker had."""
        worker.close()
        self._started.discard(worker)
        if self._ready.get(worker.number) is worker:
            del self._ready[worker.number]
        if not self._ready:
            self._some_ready.clear()
        self._desk.take_back(worker)

    async def _drain(self, keepers: Sequence[BackgroundTask]) -> None:
        """Have all workers answer what they have, and end those that do not come to an end; start no other."""
        self._draining = True
        await ended(keepers)
        workers = tuple(self._ready.values())
        for each in workers:
            each.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE):
                await asyncio.gather(*(each.process.wait() for each in workers))
        for each in workers:
            if (code := each.process.returncode) is None:
                each.kill()
                await each.process.wait()
            if code != 0:
                cause = "it took too long and was killed" if code is None else f"it {each.end()}"
                number, pid = each.number, each.pid
                log.event(LOG, "worker_not_drained", level=logging.ERROR, worker=number, process=pid, cause=cause)
            self._bury(each)

    async def _refresh(self, worker: Worker, asked: Refresh) -> None:
        await self._parts.keys[asked.issuer].refresh()
        self._share_changes()
        worker.send(Reply(asked.call))

    # What they have to know

    def _setup(self) -> Setup:
        settings = self._parts.settings
        limits, callers = settings.limits, settings.callers
        return Setup(
            log_level=settings.log.level,
            trust_domain=settings.trust_domain,
            server_names=settings.server_names,
            mtls=callers.mtls,
            join_tokens=None if callers.join_tokens is None else str(callers.join_tokens),
            node_agents=tuple(settings.node_agents.values()),
            rules=rules(settings),
            per_caller=limits.per_caller,
            connection_age=limits.connection_age.total_seconds(),
            most=self._room,
            material=self._material,
            denied=self._shared[1],
            keys=tuple(self._shared[2]),
        )

    def _current(self) -> tuple[SigningSet, Denied, list[bytes]]:
        parts = self._parts
        return parts.source.current(), parts.denied(), [each.data for each in parts.keys]

    async def _share(self) -> None:
        """Tell all workers of changes, until cancelled."""
        while True:
            await self._parts.clock.sleep(SHARE_EVERY)
            self._share_changes()

    def _share_changes(self) -> None:
        before, self._shared = self._shared, self._current()
        messages = list[SignerMaterial | Denials | Keys]()
        signing, denied, keys = self._shared
        if signing is not before[0]:
            self._material = material(signing)
            messages.append(self._material)
        if denied is not before[1]:
            messages.append(Denials(denied))
        pairs = zip(keys, before[2], strict=True)
        messages += [Keys(issuer, new) for issuer, (new, old) in enumerate(pairs) if new is not old]
        for message in messages:
            for worker in self._started:
                worker.send(message)


async def _until_ready(worker: Worker) -> None:
    """Raises ConfigurationError and WorkerError."""
    end = asyncio.ensure_future(worker.process.wait())
    waited: Sequence[asyncio.Future[None] | asyncio.Future[int]] = (end, worker.ready)
    try:
        await asyncio.wait(waited, timeout=START_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
    finally:
        end.cancel()
    if worker.ready.done():
        worker.ready.result()
        return
    code = worker.process.returncode
    how = f"was not ready within {START_TIMEOUT:g} s" if code is None else end_of(code)
    raise WorkerError(
        f"worker {worker.number} of the CA server {how} before it answered calls; standard error has what it said"
    )


async def _all_or_first_error(tasks: Sequence["asyncio.Task[Worker]"]) -> list[Worker]:
    """The results of all. Raises the first error as soon as it comes, and no other: workers fail alike."""
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for each in done:
            each.result()
    except BaseException:
        for each in tasks:
            each.cancel()
        await uninterrupted(asyncio.wait(tasks))
        raise
    return [each.result() for each in tasks]


def material(signing: SigningSet) -> SignerMaterial:
    """A signing set for another process of ours."""
    return SignerMaterial(
        signing.signer.certificate.public_bytes(Encoding.DER),
        to_pkcs8_pem(signing.signer.key),
        tuple(each.public_bytes(Encoding.DER) for each in signing.intermediates),
        tuple(each.public_bytes(Encoding.DER) for each in signing.roots),
        tuple(each.public_bytes(Encoding.DER) for each in signing.crls),
    )
