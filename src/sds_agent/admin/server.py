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
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING

from msgspec import Struct

from sds_agent import log
from sds_agent.admin.asgi import Application
from sds_agent.admin.settings import AdminSettings
from sds_agent.clock import Clock
from sds_agent.configfile.listening import ListenAddress
from sds_agent.errors import SdsAgentError, leaves
from sds_agent.sds.endpoint import SocketFile, claim
from sds_agent.tasks import NoThreadError, background_tasks, in_thread

if TYPE_CHECKING:
    from sds_agent.admin.connections import HttpConnections

LOG = logging.getLogger(__name__)

BACKLOG = 128
AGAIN = 30.0
"""Seconds after which it tries again to listen where it could not."""
CHECK = 5.0
"""Seconds after which it checks again that its socket is still at its path."""
RETRY_ACCEPT = 0.1


class Listening(Struct, frozen=True):
    """An open listener. One on TCP has the hosts by which clients may call it; None is any, as on a Unix socket.

    `in_place` is whether clients still reach it.
    """

    socket: socket.socket
    hosts: frozenset[str] | None
    in_place: Callable[[], bool]


class AdminServerError(SdsAgentError):
    """The admin server cannot serve."""


@asynccontextmanager
async def serving(settings: AdminSettings, make: Callable[[], Application], clock: Clock) -> AsyncIterator[None]:
    """Serve the application inside this context. `make` imports and makes it, on a thread, at the first connection.

    Where it cannot listen it says so (`admin_unavailable`), and tries again: what it shows is needed most when
    something is wrong, and nothing that it does may end the agent.
    """
    file, address = socket_file(settings), settings.address if settings.enabled else None
    if file is None and address is None:
        yield
        return
    front = _Front(make)
    async with background_tasks() as start:
        if file is not None:
            start(_listen(lambda: _on_socket(file), front, clock))
        if address is not None:
            start(_listen(lambda: _on_address(address, settings), front, clock))
        try:
            yield
        finally:
            front.close()


async def _listen(opened: Callable[[], AbstractAsyncContextManager[Listening]], front: "_Front", clock: Clock) -> None:
    """Accept from one listener, for ever; from a new one where that is lost."""
    failed = log.LogOnChange(LOG, "admin_unavailable")
    while True:
        try:
            async with opened() as listening:
                failed.resolved()
                await _until_lost(listening, front)
        except* SdsAgentError as errors:
            failed.report(str(next(leaves(errors))))
        else:
            continue
        # not above: Python before 3.11.4 makes a group of what is raised there, also of a cancellation
        await clock.sleep(AGAIN)


async def _until_lost(listening: Listening, front: "_Front") -> None:
    """Accept until clients cannot reach the listener any more. Raises AdminServerError, in a group."""
    async with background_tasks() as start:
        start(front.accept(listening))
        while True:
            await asyncio.sleep(CHECK)
            if not listening.in_place():
                return


def socket_file(settings: AdminSettings) -> SocketFile | None:
    """The socket as the settings want it; None where they want none."""
    if not settings.enabled or settings.socket is None:
        return None
    return SocketFile(settings.socket, mode=settings.mode, section="admin")


@asynccontextmanager
async def _on_socket(file: SocketFile) -> AsyncIterator[Listening]:
    """Raises what `endpoint.claim` does."""
    with claim(file) as endpoint, endpoint.listen(BACKLOG) as listener:
        endpoint.publish()
        log.event(LOG, "admin_listening", socket=str(file.path), mode=f"{file.mode:04o}")
        yield Listening(listener, None, endpoint.in_place)


@asynccontextmanager
async def _on_address(address: ListenAddress, settings: AdminSettings) -> AsyncIterator[Listening]:
    """Raises AdminAddressError, and NoThreadError."""
    with await in_thread(bound, address) as listener:
        listener.listen(BACKLOG)
        host, port, *_ = listener.getsockname()
        at = ListenAddress(str(host), int(port))
        log.event(LOG, "admin_listening", address=str(at))
        yield Listening(listener, hosts(settings, str(host)), lambda: True)


class AdminAddressError(AdminServerError):
    """The admin server cannot listen at its address."""


def bound(address: ListenAddress) -> socket.socket:
    """A TCP socket bound there, to which nothing can connect before it listens. Raises AdminAddressError.

    A name is looked up, which may take long.
    """
    with ExitStack() as unless_bound:
        try:
            found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, place = found[0]
            made = unless_bound.enter_context(socket.socket(family, socket.SOCK_STREAM))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind(place)
        except OSError as error:
            fix = "choose another port" if error.errno == errno.EADDRINUSE else "name an address of this machine"
            cause = error.strerror or error
            raise AdminAddressError(f"admin.address: cannot listen on {address}: {cause}; {fix}") from error
        unless_bound.pop_all()
        return made


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
        self._serve: Callable[[socket.socket, frozenset[str] | None], Awaitable[None]] | None = None
        self._end: Callable[[], None] | None = None
        self._loading = asyncio.Lock()

    async def accept(self, listening: Listening) -> None:
        """Accept from a listener until cancelled. Raises AdminServerError where nothing can be served."""
        listening.socket.setblocking(False)
        while True:
            try:
                peer = await _accepted(listening.socket)
            except OSError:  # no descriptor is left, or the peer has gone already
                await asyncio.sleep(RETRY_ACCEPT)
                continue
            with ExitStack() as until_served:
                until_served.callback(peer.close)
                with suppress(OSError, NoThreadError):  # it has left, or no thread could be had
                    serve = await self._load()
                    await serve(peer, listening.hosts)
                    until_served.pop_all()

    async def _load(self) -> Callable[[socket.socket, frozenset[str] | None], Awaitable[None]]:
        async with self._loading:
            if self._serve is None:
                loaded = await in_thread(_connections, self._make)
                self._serve, self._end = loaded.serve, loaded.close
            return self._serve

    def close(self) -> None:
        """Cut every connection off."""
        if self._end is not None:
            self._end()


async def _accepted(listener: socket.socket) -> socket.socket:
    """The next connection, which does not block. Raises OSError.

    The event loop's own `sock_accept` first asks `ssl` whether the listener is one of its sockets, and so loads it.
    """
    loop, descriptor = asyncio.get_running_loop(), listener.fileno()
    while True:
        with suppress(BlockingIOError):
            peer, _ = listener.accept()
            peer.setblocking(False)
            return peer
        is_readable = asyncio.Event()
        loop.add_reader(descriptor, is_readable.set)
        try:
            await is_readable.wait()
        finally:
            loop.remove_reader(descriptor)


def _connections(make: Callable[[], Application]) -> "HttpConnections":
    """What serves connections, with all that it imports. Raises AdminServerError: the agent outlives a fault in it."""
    try:
        from sds_agent.admin.connections import HttpConnections  # noqa: PLC0415 - measured: 70 ms for uvicorn and h11

        return HttpConnections(make())
    except ImportError as error:
        raise AdminServerError(
            f"cannot import what the admin server needs: {error}; install sds-agent again"
        ) from error
    except Exception as error:
        log.fault(LOG, "admin server", error)
        raise AdminServerError("the admin server has a fault, which the log names (fault); report it") from error
