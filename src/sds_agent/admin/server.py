"""The admin server: HTTP on a Unix socket, and on a TCP address by choice, for whatever application it is given.

It costs a listening socket until a client connects. Only then are the libraries for HTTP imported, in a thread: that
takes a tenth of a second, and the event loop has Envoys to serve.

The server does not check who connects, so it bounds what a peer can make it hold: connections, of which the one that
has been silent longest gives way, the time for a request to arrive and for an answer to be taken, and the size of a
request.
"""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any

from msgspec import Struct

from sds_agent import log
from sds_agent.admin.asgi import Application
from sds_agent.admin.settings import AdminSettings
from sds_agent.clock import Clock
from sds_agent.configfile.listening import ListenAddress
from sds_agent.errors import SdsAgentError
from sds_agent.sds.endpoint import SocketFile, claim
from sds_agent.tasks import NoThreadError, background_tasks, in_thread

LOG = logging.getLogger(__name__)

BACKLOG = 128
AGAIN = 30.0
"""Seconds after which it tries again to listen where it could not."""
RETRY_ACCEPT = 0.1


class Listening(Struct, frozen=True):
    """An open listener. One on TCP has the hosts by which clients may call it; None is any, as on a Unix socket."""

    socket: socket.socket
    hosts: frozenset[str] | None


@asynccontextmanager
async def serving(settings: AdminSettings, make: Callable[[], Application], clock: Clock) -> AsyncIterator[None]:
    """Serve the application inside this context. `make` imports and makes it, on a thread, at the first connection.

    Where it cannot listen it says so (`admin_unavailable`), and tries again: what it shows is needed most when
    something is wrong, and nothing that it does may end the agent.
    """
    if not settings.enabled or (settings.socket is None and settings.address is None):
        yield
        return
    front = _Front(make)
    async with background_tasks() as start:
        if settings.socket is not None:
            start(_listen(lambda: _on_socket(settings), front, clock))
        if settings.address is not None:
            start(_listen(lambda: _on_address(settings), front, clock))
        try:
            yield
        finally:
            front.close()


async def _listen(opened: Callable[[], Any], front: "_Front", clock: Clock) -> None:
    """Accept from one listener, for ever."""
    failed = log.LogOnChange(LOG, "admin_unavailable")
    while True:
        try:
            with opened() as listening:
                failed.resolved()
                await front.accept(listening)
        except SdsAgentError as error:
            failed.report(str(error))
        await clock.sleep(AGAIN)


@contextmanager
def _on_socket(settings: AdminSettings) -> Iterator[Listening]:
    """Raises what `endpoint.claim` does."""
    if settings.socket is None:
        return
    file = SocketFile(settings.socket, mode=settings.mode, section="admin")
    with claim(file) as endpoint, endpoint.listen(BACKLOG) as listener:
        endpoint.publish()
        log.event(LOG, "admin_listening", socket=str(settings.socket), mode=f"{settings.mode:04o}")
        yield Listening(listener, None)


@contextmanager
def _on_address(settings: AdminSettings) -> Iterator[Listening]:
    """Raises AdminAddressError."""
    if settings.address is None:
        return
    with ExitStack() as stack:
        listener = stack.enter_context(bound(settings.address))
        host, port, *_ = listener.getsockname()
        at = ListenAddress(str(host), int(port))
        log.event(LOG, "admin_listening", address=str(at))
        yield Listening(listener, hosts(settings, str(host)))


class AdminAddressError(SdsAgentError):
    """The admin server cannot listen at its address."""


def bound(address: ListenAddress) -> socket.socket:
    """A TCP socket that listens there. Raises AdminAddressError."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return socket.create_server(found[0][4][:2], family=found[0][0], backlog=BACKLOG)
    except OSError as error:
        fix = "choose another port" if error.errno == errno.EADDRINUSE else "name an address of this machine"
        raise AdminAddressError(f"admin.address: cannot listen on {address}: {_reason(error)}; {fix}") from error


def _reason(error: OSError) -> str:
    """The kernel's words: `create_server` adds the address to them."""
    known = error.errno is not None and not isinstance(error, socket.gaierror)
    return os.strerror(error.errno) if known and error.errno is not None else error.strerror or str(error)


def hosts(settings: AdminSettings, bound_to: str) -> frozenset[str]:
    """The names by which clients may call the server: a page elsewhere can make a browser ask for others."""
    own = settings.address.host if settings.address is not None else bound_to
    return frozenset(
        name.lower().removeprefix("[").removesuffix("]")
        for name in ("localhost", "127.0.0.1", "::1", own, bound_to, *settings.hosts)
    )


class _Front:
    """Accepts connections, and hands them to the protocol once that is there."""

    def __init__(self, make: Callable[[], Application]) -> None:
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._serve: Callable[[socket.socket, frozenset[str] | None], Awaitable[None]] | None = None
        self._end: Callable[[], None] | None = None
        self._ready = asyncio.Lock()

    async def accept(self, listening: Listening) -> None:
        """Accept from a listener until cancelled."""
        listening.socket.setblocking(False)
        while True:
            try:
                peer, _ = await self._loop.sock_accept(listening.socket)
            except OSError:  # no descriptor is left, or the peer has gone already
                await asyncio.sleep(RETRY_ACCEPT)
                continue
            with suppress(OSError, NoThreadError):  # it has left, or no thread could be had: the next one may do better
                serve = await self._load(peer)
                await serve(peer, listening.hosts)
                continue
            peer.close()

    async def _load(self, peer: socket.socket) -> Callable[[socket.socket, frozenset[str] | None], Awaitable[None]]:
        if self._serve is None:
            try:
                from_thread = await in_thread(_connections, self._make)
            except BaseException:
                peer.close()
                raise
            self._serve, self._end = from_thread.serve, from_thread.close
        return self._serve

    def close(self) -> None:
        """Cut every connection off."""
        if self._end is not None:
            self._end()


def _connections(make: Callable[[], Application]) -> Any:
    """What serves connections, with all that it imports."""
    from sds_agent.admin.connections import HttpConnections  # noqa: PLC0415 - measured: 70 ms for uvicorn and h11

    return HttpConnections(make())
