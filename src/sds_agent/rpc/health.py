"""grpc.health.v1: whether a server of ours is ready, for `sds-agent ready` and every other prober.

Source: gRPC's health checking protocol. The agent's socket and the CA server have it in common. `Check` answers once;
`Watch` answers at once and again after each change, with SERVICE_UNKNOWN for a service that is not here. A watcher that
reads slowly misses statuses in between, never the newest.

An answer of `Check` that is NOT_SERVING also has the reasons, in a field that other probers skip. As a status message
or in trailing metadata they would be subject to the prober's limit on headers, and could fail the call that they
explain.

A caller needs no proof, so there are limits on what callers can make the server store: watches, requests that have
begun and not ended, and answers that are not read. gRPC itself has no limit on these where it reads a single request
and sends a single answer. So both methods are declared to take and to give a stream, which is the same on the wire.
A watch may last for as long as its client likes: where there are too many, one of the client that has most gives way.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from msgspec import Struct

from sds_agent.errors import SdsAgentError
from sds_agent.rpc.calls import Context, next_message
from sds_agent.rpc.crowd import Crowd
from sds_agent.text import first

SERVICE = "grpc.health.v1.Health"
MOST_WATCHERS = 1000
"""Watches at one time. Each takes memory for as long as its client likes."""
MOST_UNREAD = 32
"""Requests at one time that have begun and not ended. Each can be as large as the server lets a message be."""
MOST_WAITING = 500
"""Answers of `Check` at one time that wait to be read. Beyond it the connection of the oldest is ended."""
TIMEOUT = 5.0
"""Seconds for a request to arrive."""
MOST_REASONS = 50
LONGEST_REASON = 600
"""Reasons in an answer, and characters in a reason."""

Status: TypeAlias = Literal["SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"]
"""By its name in HealthCheckResponse."""


class _NoPlaceError(Exception):
    """There are too many, and nobody has more than who asks."""


class _Watch:
    """A call of `Watch`, until it has to give way."""

    def __init__(self, context: Context) -> None:
        self.timeout = asyncio.timeout(None)
        self.connection = context.peer()
        self.writes = False
        self._context = context

    async def write(self, answer: bytes) -> None:
        """Send it."""
        self.writes = True
        await self._context.write(answer)
        self.writes = False

    def give_way(self) -> None:
        """End it."""
        self.timeout.reschedule(asyncio.get_running_loop().time())


class Health:
    """The service. It answers for the server as a whole (the empty name) and for `services`: SERVING while `ready()`.

    While that is False, `reasons` gives a sentence for each cause. Every caller gets them, so no secret may be in one.
    `hang_up` ends a connection, by gRPC's address for it, and logs why: gRPC itself ends no call whose answer waits.
    `holder` says who is at the other end, in words that are the same for all connections of one peer.
    """

    def __init__(
        self,
        ready: Callable[[], bool],
        services: frozenset[str],
        *,
        reasons: Callable[[], Sequence[str]] = tuple,
        most_watchers: int = MOST_WATCHERS,
        hang_up: Callable[[str, str], None],
        holder: Callable[[str], str],
    ) -> None:
        self._ready = ready
        self._reasons = reasons
        self._services = services | {""}
        self._most_watchers = most_watchers
        self._hang_up = hang_up
        self._holder = holder
        self._watches = Crowd[_Watch]()
        self._waiting: dict[Context, None] = {}  # by age
        self._unread: dict[asyncio.Timeout, None] = {}  # by age
        self._draining = False
        self._changed = asyncio.Event()

    @property
    def watchers(self) -> int:
        """How many watch."""
        return len(self._watches)

    def handler(self) -> grpc.GenericRpcHandler:
        """The service as a handler for a grpc.aio server."""
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Check": grpc.stream_stream_rpc_method_handler(self._check),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def check_again(self) -> None:
        """What `ready` says may have changed: answer the watchers."""
        self._changed.set()
        self._changed = asyncio.Event()

    def drain(self) -> None:
        """Say NOT_SERVING from now on, and end every watch with OK."""
        self._draining = True
        self.check_again()

    async def _check(self, _: object, context: Context) -> None:
        if not await self._asked(context):
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service of that name is here")
        status = self._status()
        await self._answer(context, _written(status, self._why() if status == "NOT_SERVING" else ()))

    async def _answer(self, context: Context, answer: bytes) -> None:
        if len(self._waiting) >= MOST_WAITING:
            self._hang_up(next(iter(self._waiting)).peer(), "it does not read the answers to health checks")
        self._waiting[context] = None
        try:
            with suppress(grpc.aio.InternalError):  # the client has left
                await context.write(answer)
        finally:
            del self._waiting[context]

    async def _watch(self, _: object, context: Context) -> None:
        is_here = await self._asked(context)
        watch = _Watch(context)
        try:
            async with watch.timeout:
                self._admit(watch)
                await self._report(watch, is_here=is_here)
                return
        except (TimeoutError, _NoPlaceError):
            pass
        except grpc.aio.InternalError:  # the client has left
            return
        finally:
            self._watches.leave(watch)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many clients watch already: use Check")

    def _admit(self, watch: _Watch) -> None:
        """Give it a place, for which another one may have to give way. Raises _NoPlaceError."""
        gives_way = self._watches.admit(watch, self._holder(watch.connection), self._most_watchers)
        if gives_way is None:
            return
        self._watches.leave(gives_way)
        if gives_way is watch:
            raise _NoPlaceError
        if gives_way.writes:  # an end of the call would wait behind the answer
            self._hang_up(gives_way.connection, "it does not read the answers to its watches of the health")
        else:
            gives_way.give_way()

    async def _report(self, watch: _Watch, *, is_here: bool) -> None:
        sent: Status | None = None
        while True:
            changed, last = self._changed, self._draining
            status = self._status() if is_here else "SERVICE_UNKNOWN"
            if status != sent:
                await watch.write(_written(status))
                sent = status
            if last:
                return
            await changed.wait()

    async def _asked(self, context: Context) -> bool:
        """Whether the request names a service that is here; its name may have a megabyte, which a watch must not keep.
        Aborts a call whose message is not a request.
        """
        if len(self._unread) >= MOST_UNREAD:
            self._give_up_oldest()
        timeout = asyncio.timeout(TIMEOUT)
        try:
            async with timeout:
                self._unread[timeout] = None
                return _service(await next_message(context)) in self._services
        except TimeoutError:
            if timeout in self._unread:
                end = grpc.StatusCode.DEADLINE_EXCEEDED, f"the request did not arrive within {TIMEOUT:g} s"
            else:
                end = grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests have begun and not ended"
        except DecodeError:
            end = grpc.StatusCode.INVALID_ARGUMENT, "the message is not a HealthCheckRequest"
        finally:
            self._unread.pop(timeout, None)
        await context.abort(*end)
        raise AssertionError  # abort always raises, which its types do not say

    def _give_up_oldest(self) -> None:
        """An honest request arrives at once. If the newest were refused, one connection could keep every prober out."""
        oldest = next(iter(self._unread))
        del self._unread[oldest]
        if not oldest.expired():
            oldest.reschedule(asyncio.get_running_loop().time())

    def _status(self) -> Status:
        return "SERVING" if self._ready() and not self._draining else "NOT_SERVING"

    def _why(self) -> Sequence[str]:
        if self._draining:
            return ("the server is stopping",)
        return [reason[:LONGEST_REASON] for reason in first(self._reasons(), MOST_REASONS)]


def _service(request: bytes | None) -> str:
    """The service that a request names. Raises DecodeError, also where there is none."""
    from sds_agent_proto.health_pb2 import HealthCheckRequest  # noqa: PLC0415 - many agents have no prober

    if request is None:
        raise DecodeError
    return HealthCheckRequest.FromString(request).service


def _written(status: Status, reasons: Sequence[str] = ()) -> bytes:
    from sds_agent_proto.health_pb2 import HealthCheckResponse  # noqa: PLC0415 - likewise

    return HealthCheckResponse(status=status, reasons=reasons).SerializeToString()


class NoAgentError(SdsAgentError):
    """No agent answers at the socket."""


class Answer(Struct, frozen=True):
    """What a server says of itself: whether it is ready, and a sentence for each cause why it is not."""

    ready: bool
    reasons: tuple[str, ...] = ()


async def check(address: str, seconds: float) -> Answer:
    """Ask the server at a gRPC address. Raises NoAgentError if it does not answer in so many `seconds`."""
    from sds_agent_proto.health_pb2 import HealthCheckRequest, HealthCheckResponse  # noqa: PLC0415 - likewise

    async with grpc.aio.insecure_channel(address) as channel:
        ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/Check")
        try:
            data = await ask(HealthCheckRequest().SerializeToString(), timeout=seconds)
            answer = HealthCheckResponse.FromString(data)
        except DecodeError as error:
            raise NoAgentError("what answers there is no agent; name the agent's socket") from error
        except grpc.aio.AioRpcError as error:
            raise NoAgentError(_no_agent(error.code(), seconds)) from error
    return Answer(answer.status == HealthCheckResponse.SERVING, tuple(answer.reasons))


def _no_agent(code: grpc.StatusCode, seconds: float) -> str:
    """What is said where a process listens and gives no answer. Where systemd listens, the agent may not run yet."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"what listens there has not answered within {seconds:g} s; it is starting, hangs, or is another program"
    return f"what listens there does not answer as an agent does ({code.name.lower()}); name the agent's socket"
