"""What there is one of for all workers, and their questions about it: places of connections, and the ledger."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sds_agent import log
from sds_agent.ca.acceptor import Arrival, Full
from sds_agent.ca.books import Ledger
from sds_agent.ca.places import Places
from sds_agent.ca.workers.messages import (
    Admit,
    Begin,
    GiveBack,
    GiveWay,
    HandOver,
    Here,
    Issue,
    Leave,
    Prove,
    Ready,
    Refuse,
    Reply,
    Say,
    ToParent,
    Unfit,
)
from sds_agent.ca.workers.process import Worker
from sds_agent.clock import Clock
from sds_agent.errors import ConfigurationError

LOG = logging.getLogger(__name__)


class Desk:
    """At most `most` connections of all workers together, `room` of each, and one ledger."""

    def __init__(self, ledger: Ledger, clock: Clock, *, most: int, room: int) -> None:
        self._ledger = ledger
        self._clock = clock
        self._room = room
        self._places = Places[str](most)
        self._full = Full(most)
        self._failed = log.LogOnChange(LOG, "not_accepted")
        self._owners: dict[str, tuple[Worker, str]] = {}  # and the client's address
        self._answers: Mapping[type, Callable[[Worker, Any], None]] = {
            Admit: self._admit,
            Begin: self._begin,
            GiveBack: self._finish,
            Issue: self._issue,
            Refuse: self._refuse,
            Prove: self._prove,
            Leave: lambda worker, message: self._leave(worker, message.connection),
            Say: _say,
            Ready: _ready,
            Here: lambda worker, _: worker.silence.answered(),
            Unfit: _unfit,
        }

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._owners)

    def receive(self, worker: Worker, message: ToParent) -> None:
        """Act on a worker's message, and answer it."""
        self._answers[type(message)](worker, message)

    def hand_over(self, arrival: Arrival, workers: Iterable[Worker]) -> None:
        """Give a connection to the worker with fewest of those that answer, if it has a place. The socket stays the
        caller's.
        """
        worker = min(workers, key=lambda each: (each.silence.is_suspect, len(each.connections)), default=None)
        if worker is None:
            return
        if len(worker.connections) >= self._room:
            self._report_full(arrival.address)
            return
        gives_way = self._places.arrive(arrival.name, arrival.origin)
        if gives_way == arrival.name:
            self._report_full(arrival.address)
            return
        self._owners[arrival.name] = (worker, arrival.address)
        worker.connections.add(arrival.name)
        try:
            worker.send(HandOver(arrival.name, arrival.address, arrival.origin), arrival.plain.fileno())
        except OSError as error:  # no descriptor is left for the copy
            self._leave(worker, arrival.name)
            self._failed.report(error.strerror or str(error))
        else:
            self._failed.resolved()
        self._give_way(gives_way)

    def take_back(self, worker: Worker) -> None:
        """Free all that a worker had which has ended."""
        for name in tuple(worker.connections):
            self._leave(worker, name)
        for place in worker.places.values():
            self._ledger.end(place)
        worker.places.clear()

    def _give_way(self, name: str | None) -> None:
        if name is not None and name in self._owners:
            worker, address = self._owners[name]
            self._report_full(address)
            worker.send(GiveWay(name))

    def _report_full(self, closed: str) -> None:
        self._full.report(closed, asyncio.get_running_loop().time())

    def _leave(self, worker: Worker, name: str) -> None:
        self._places.leave(name)
        self._owners.pop(name, None)
        worker.connections.discard(name)

    def _prove(self, _: Worker, told: Prove) -> None:
        self._give_way(self._places.prove(told.connection, told.caller))

    def _admit(self, worker: Worker, asked: Admit) -> None:
        worker.send(Reply(asked.call, self._ledger.admit(asked.caller, self._clock.now())))

    def _begin(self, worker: Worker, asked: Begin) -> None:
        place = self._ledger.begin()
        if place is not None:
            worker.places[asked.call] = place
        worker.send(Reply(asked.call, place is not None))

    def _finish(self, worker: Worker, told: GiveBack) -> None:
        if (place := worker.places.pop(told.call, None)) is not None:
            self._ledger.end(place)

    def _issue(self, worker: Worker, asked: Issue) -> None:
        try:
            self._ledger.issued(asked.entry, asked.now, asked.seconds)
        except OSError as error:
            worker.send(Reply(asked.call, granted=False, error=error.errno or 0))
        else:
            worker.send(Reply(asked.call))

    def _refuse(self, _: Worker, told: Refuse) -> None:
        self._ledger.refused(told.entry, told.now)


def _say(worker: Worker, said: Say) -> None:
    log.repeat(log.Event(said.at, said.level, said.name, said.fields), worker=worker.number)


def _ready(worker: Worker, _: Ready) -> None:
    if not worker.ready.done():
        worker.ready.set_result(None)


def _unfit(worker: Worker, told: Unfit) -> None:
    if not worker.ready.done():
        worker.ready.set_exception(ConfigurationError(told.reason))
