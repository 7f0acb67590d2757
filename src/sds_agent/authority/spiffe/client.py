"""The client of a SPIFFE Workload API: one stream, whose newest message is what there is to serve.

A task of the authority's own holds the stream open, and opens it again when it ends. Callers never touch the socket:
they read the newest state, or wait for the next. While the Workload API is away they get an error, and what they have
been given stays in use; the anchors of the last state stay known.
"""

import asyncio
import logging
import random
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from urllib.parse import quote

import grpc
import grpc.aio

from sds_agent import log
from sds_agent.authority.protocol import AuthorityError, ErrorKind, Supplied
from sds_agent.authority.spiffe.settings import SpiffeSettings
from sds_agent.authority.spiffe.wire import (
    LARGEST_MESSAGE,
    METADATA,
    METHOD,
    REQUEST,
    StreamEnd,
    WorkloadState,
    read_state,
)
from sds_agent.clock import Clock
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.tasks import NoThreadError, in_thread, uninterrupted

LOG = logging.getLogger(__name__)

REFRESH = timedelta(minutes=5)
"""How often the agent reads the anchors when none are announced, which costs nothing."""
FIRST_MESSAGE = 5.0
"""Seconds until a stream that says nothing counts as failed. Later on it may be silent for as long as it likes."""
FIRST_RETRY = 0.2
LONGEST_RETRY = 5.0
"""Seconds between two streams: an entry that is registered takes about as long to reach the agent."""
LONGEST_CONNECT = 1.0
"""Seconds for the attempt to connect that finds the reason of a failure."""
BETWEEN_MESSAGES = 0.1
"""Seconds between two messages that are read, whatever the other side sends."""
_OPTIONS = (
    ("grpc.max_receive_message_length", LARGEST_MESSAGE),
    ("grpc.use_local_subchannel_pool", 1),  # else a new channel inherits the failed connection and its delays
    ("grpc.enable_http_proxy", 0),
)


class SpiffeSupplier:
    """Gives what the Workload API gives. `run` has to run meanwhile. `randomness` returns a float uniform in [0, 1)."""

    refresh_every = REFRESH

    def __init__(
        self,
        settings: SpiffeSettings,
        trust_domain: str,
        clock: Clock,
        *,
        first_message: float = FIRST_MESSAGE,
        randomness: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._trust_domain = trust_domain
        self._clock = clock
        self._first_message = first_message
        self._randomness = randomness
        self._state: WorkloadState | None = None
        self._failure: tuple[ErrorKind, str] | None = None
        self._given: WorkloadState | None = None
        self._changed = asyncio.Event()
        self._spoke = False  # whether the stream that is open, or was last, has given a state

    async def supply(self, identity: SpiffeId, held: bytes | None) -> Supplied:
        """As `authority.protocol` has it. Raises AuthorityError while there is no stream, whatever it gave before."""
        while True:
            changed = self._changed
            self._check()
            if self._state is not None:
                supplied = self._state.supplied(identity, self._settings.hint, str(self._settings.socket))
                if supplied.issuance.chain_pem != held:
                    return supplied
            await changed.wait()

    async def anchors(self) -> bytes:
        """The anchors of the agent's trust domain, as the Workload API said them last. Raises AuthorityError."""
        self._given = state = await self._known()
        anchors = state.anchors(self._trust_domain)
        if not anchors:
            message = (
                f"the Workload API at {self._settings.socket} gives no certificate in the trust domain "
                f"{self._trust_domain}, and so no anchors; register an entry for this process"
            )
            raise AuthorityError(ErrorKind.DENIED, message)
        return anchors

    async def federated_anchors(self) -> Mapping[str, bytes]:
        """The anchors of other trust domains, as the Workload API said them last. Raises AuthorityError."""
        return (await self._known()).federated

    async def anchors_changed(self) -> None:
        """Return when the state is another than that of the last `anchors`."""
        while self._state == self._given:
            await self._changed.wait()

    async def run(self) -> None:
        """Read the stream, and open it again whenever it ends, until cancelled."""
        failures = 0
        while True:
            self._spoke = False
            try:
                end = (await self._read_stream()).error(str(self._settings.socket))
            except AuthorityError as error:
                end = error
            except Exception as error:  # noqa: BLE001 - a bug here must not end the agent
                log.fault(LOG, "authority spiffe", error)
                message = f"the client failed with {type(error).__name__}; please report the event fault in the log"
                end = AuthorityError(ErrorKind.INVALID, message)
            self._failure = end.kind, str(end)
            self._wake()
            failures = 1 if self._spoke else failures + 1
            await self._clock.sleep(self._delay(failures))

    async def _known(self) -> WorkloadState:
        """The newest state; waits for the first. Raises AuthorityError when the stream failed before there was one."""
        while self._state is None:
            self._check()
            await self._changed.wait()
        return self._state

    async def _read_stream(self) -> StreamEnd:
        """Take every message of one stream, and return how it ended. Raises AuthorityError for an unusable message."""
        async with _channel(f"unix:{quote(str(self._settings.socket))}") as channel:
            fetch: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(METHOD)
            call = fetch(REQUEST, metadata=METADATA)
            try:
                try:
                    async with asyncio.timeout(self._first_message):
                        message = await call.read()
                except TimeoutError:
                    return StreamEnd("DEADLINE_EXCEEDED", f"no message within {self._first_message:g} s")
                while isinstance(message, bytes):
                    self._take(read_state(message, self._trust_domain))
                    del message  # which has keys: not kept here until the next one comes
                    await self._clock.sleep(BETWEEN_MESSAGES)
                    message = await call.read()
            except grpc.aio.AioRpcError as error:
                return StreamEnd(error.code().name, await self._reason(error.code()) or error.details() or "")
            finally:
                call.cancel()
        return StreamEnd("OK", "it ended the stream")

    async def _reason(self, code: grpc.StatusCode) -> str:
        """Why nothing can be connected to, which gRPC says in many more words; empty where something can."""
        if code is not grpc.StatusCode.UNAVAILABLE or self._spoke:
            return ""
        try:
            return await in_thread(_unreachable, str(self._settings.socket))
        except NoThreadError:
            return ""

    def _take(self, state: WorkloadState) -> None:
        self._spoke = True
        if state == self._state and self._failure is None:
            return
        self._state, self._failure = state, None
        self._wake()

    def _check(self) -> None:
        if self._failure is not None:
            raise AuthorityError(*self._failure)  # a new one: an exception that is raised again and again grows

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _delay(self, failures: int) -> float:
        bound = min(FIRST_RETRY * 2.0 ** min(failures - 1, 16), LONGEST_RETRY)
        return bound / 2 + bound * self._randomness() / 2


def _unreachable(path: str) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
        attempt.settimeout(LONGEST_CONNECT)
        try:
            attempt.connect(path)
        except FileNotFoundError:
            return "there is no socket"
        except ConnectionRefusedError:
            return "no process listens there"
        except PermissionError:
            return "this user may not connect"
        except OSError as error:
            return str(error.strerror or error)
    return ""


@asynccontextmanager
async def _channel(target: str) -> AsyncIterator[grpc.aio.Channel]:
    """Closed at the end, also after a cancellation, which interrupts the channel's own context manager."""
    channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
    try:
        yield channel
    finally:
        await uninterrupted(channel.close())
