"""The admin server's connections: uvicorn's protocol for HTTP/1.1, with bounds of ours.

uvicorn's own server would take the process's signals and run a loop of its own; its protocol is all that is needed.
"""

import asyncio
import logging
import socket
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from sds_agent import log
from sds_agent.admin import headers
from sds_agent.admin.asgi import Application, Message, Receive, Send
from sds_agent.descriptors import share_for

LOG = logging.getLogger(__name__)

MOST = 64
"""Connections at one time, where there are descriptors for them. A page has one or two, a Prometheus one."""
REQUEST_TIMEOUT = 10.0
"""Seconds for a request to arrive, from the connection or from the answer before it."""
ANSWER_TIMEOUT = 30.0
"""Seconds for a peer to take an answer. A stream of events has no end; its peer has so long to take what is written."""
LARGEST_REQUEST = 16 << 10
"""Bytes of a request's head."""
REFUSED = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
"""Headers of an answer after which the connection ends."""


class HttpConnections:
    """Serves an application on sockets that were accepted elsewhere."""

    def __init__(self, application: Application) -> None:
        _quiet()
        self._config = Config(
            _guarded(application),
            loop="none",
            http="h11",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=int(REQUEST_TIMEOUT),
            h11_max_incomplete_event_size=LARGEST_REQUEST,
        )
        self._config.load()
        self._state = ServerState()
        self._most = share_for(MOST)
        self._state.default_headers = headers.raw()
        self._open: dict[_Bounded, None] = {}  # the one that was silent longest first

    async def serve(self, peer: socket.socket, hosts: frozenset[str] | None) -> None:
        """Serve a connection from now on; the socket is the server's. Raises OSError."""
        if len(self._open) >= self._most:
            self._make_room()
        peer.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: _Bounded(self._config, self._state, self._open, hosts), peer)

    def _make_room(self) -> None:
        idle = next((each for each in self._open if each.idle), next(iter(self._open)))
        idle.abort()

    def close(self) -> None:
        """Cut every connection off, and end what answers it."""
        for each in tuple(self._open):
            each.abort()
        for task in tuple(self._state.tasks):
            task.cancel()


class _Bounded(H11Protocol):
    """One connection."""

    def __init__(
        self, config: Config, state: ServerState, among: "dict[_Bounded, None]", hosts: frozenset[str] | None
    ) -> None:
        super().__init__(config, state, {"hosts": hosts})
        self._among = among
        self._limit: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no answer is under way."""
        cycle: RequestResponseCycle | None = self.cycle  # uvicorn says that it is never None
        return cycle is None or cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        """As uvicorn's."""
        self._among[self] = None
        super().connection_made(transport)
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's."""
        self._among.pop(self, None)
        self._unlimited()
        self._taken()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """As uvicorn's; an answer that has begun has its own limit, unless the application lifts it."""
        idle = self.idle
        super().handle_events()
        if idle and not self.idle:
            self._unlimited()
            self._limit = self.loop.call_later(ANSWER_TIMEOUT, self._too_late, self.cycle)
            self._among.pop(self, None)
            if not self.transport.is_closing():
                self._among[self] = None

    def on_response_complete(self) -> None:
        """As uvicorn's."""
        self._wait_for_request()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, with the headers of every answer; in the middle of an answer it ends the connection alone."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.abort()
            return
        if not self.idle:
            self.cycle.disconnected = True  # what the application answers to the head goes nowhere
        body = f"{msg}\n".encode()
        head = [*headers.raw(headers.NOTHING), *REFUSED, (b"content-length", b"%d" % len(body))]
        for event in (h11.Response(status_code=400, headers=head), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        """As uvicorn's; the peer has to take what was written before long."""
        self._stalled = self.loop.call_later(ANSWER_TIMEOUT, self.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        """As uvicorn's."""
        self._taken()
        super().resume_writing()

    def abort(self) -> None:
        """Close it at once."""
        self._among.pop(self, None)
        with suppress(AttributeError):  # it was never open
            self.transport.abort()

    def _wait_for_request(self) -> None:
        """Give the peer its time for the next request, and before that for the answer that it has not taken yet."""
        self._unlimited()
        untaken = self.transport.get_write_buffer_size() > 0
        self._limit = self.loop.call_later(ANSWER_TIMEOUT if untaken else REQUEST_TIMEOUT, self.abort)

    def _too_late(self, cycle: Any) -> None:
        if not cycle.scope.get("state", {}).get("endless"):
            self.abort()

    def _taken(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _unlimited(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None


def _guarded(application: Application) -> Application:
    """The application, for hosts that are ours; an exception that it did not foresee is a fault in the log."""

    async def guarded(scope: Message, receive: Receive, send: Send) -> None:
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        allowed = scope["state"]["hosts"]
        if allowed is not None and not _is_ours(scope, allowed):
            await _refuse(send, 421, "this server is not called by that name; name it in admin.hosts if it is\n")
            return
        try:
            await application(scope, receive, sending)
        except Exception as error:  # noqa: BLE001 - a bug that one request meets must not end the others
            log.fault(LOG, "admin server", error)
            if not started:
                await _refuse(send, 500, "the agent has a fault; see its log\n")

    return guarded


def _is_ours(scope: Message, allowed: frozenset[str]) -> bool:
    """Whether the client calls the server by one of its names, or by the address that it has connected to.

    That address is as good as a name of ours: a page elsewhere has a name, which the browser sends.
    """
    named = [value for name, value in scope["headers"] if name == b"host"]
    if len(named) != 1:
        return False
    try:
        host = urlsplit(f"//{named[0].decode('ascii')}").hostname or ""
    except ValueError:
        return False
    return host in allowed or host == scope["server"][0]


async def _refuse(send: Send, status: int, text: str) -> None:
    head = [(headers.POLICY.lower().encode(), headers.NOTHING.encode()), *REFUSED]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": text.encode()})


def _quiet() -> None:
    """uvicorn warns of each request that it cannot read: a line for every peer that likes to write one."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.setLevel(logging.CRITICAL)
        logger.handlers[:] = [logging.NullHandler()]
