"""What a CA server has before its first caller: the signer, who may ask, the books, and the listening socket.

Everything that an operator can have wrong shows here. None of it answers calls, so this module imports no gRPC: where
other processes answer them, the one that has all this does without it.
"""

import errno
import logging
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from sds_agent import log, sources
from sds_agent.admin.settings import AdminSettings
from sds_agent.ca.audit import AuditLog
from sds_agent.ca.authentication import TIMEOUT, Authentication
from sds_agent.ca.books import Ledger
from sds_agent.ca.callers import ClaimRule
from sds_agent.ca.denied import NO_IDENTITY, Denied
from sds_agent.ca.deny_list import DenyList
from sds_agent.ca.jwks import IssuerKeys, Location
from sds_agent.ca.jwt import TrustedIssuer
from sds_agent.ca.observed import Connected, RunningCa
from sds_agent.ca.policy import overreaching
from sds_agent.ca.settings import CaSettings, JwtSettings
from sds_agent.ca.source import PluggedSource, SelfSignedSource, Source
from sds_agent.ca.status import WorkerStatus
from sds_agent.ca.tokens import JoinTokens
from sds_agent.clock import Beginning, Clock
from sds_agent.configfile.listening import ListenAddress
from sds_agent.directories import LockedDirectory, locked_directory
from sds_agent.errors import ConfigurationError
from sds_agent.signing.self_signed import SelfSignedCa
from sds_agent.state import Restorable, watch
from sds_agent.tasks import NoThreadError, TimeLimit, in_thread

if TYPE_CHECKING:
    from sds_agent.admin.asgi import Application

LOG = logging.getLogger(__name__)

BACKLOG = 1024
_UNKNOWN = "give a name that leads to an address of this machine, or the address itself"
_FIXES = {
    errno.EADDRINUSE: "free it or choose another port",
    errno.EADDRNOTAVAIL: "give an address of this machine, or 0.0.0.0 or [::] for all of them",
    errno.EACCES: "choose a port from 1024 on, or give the server the capability CAP_NET_BIND_SERVICE",
}
"""How to fix it, by the error of the operating system."""


class Opened(Struct, frozen=True, eq=False):
    """The parts, until the context of `opened` is left."""

    settings: CaSettings
    clock: Clock
    beginning: Beginning
    audit: AuditLog
    ledger: Ledger
    locked: LockedDirectory | None
    source: Source
    keys: tuple[IssuerKeys, ...]
    tokens: JoinTokens | None
    deny_list: DenyList | None

    def authentication(self) -> Authentication:
        """The ways to prove an identity, for this process."""
        issuers = list(map(TrustedIssuer, rules(self.settings), self.keys))
        return Authentication(self.settings.trust_domain, issuers, self.settings.callers.mtls, self.tokens)

    def denied(self) -> Denied:
        """The identities that get nothing at present."""
        return NO_IDENTITY if self.deny_list is None else self.deny_list.current()

    def loops(self) -> Iterator[Callable[[], Coroutine[None, None, None]]]:
        """What keeps the parts up to date; each goes on until cancelled, but for the last three."""
        source, locked = self.source, self.locked
        yield source.follow
        yield lambda: self.audit.follow(self.clock)
        if locked is not None and isinstance(source, Restorable):
            yield lambda: watch(locked, lambda: [source])
        if self.deny_list is not None:
            yield self.deny_list.follow
        for keys in self.keys:
            yield keys.follow
        if self.tokens is not None:
            yield partial(_tidied, self.tokens)
        yield lambda: sources.warn(_sources(self.settings))
        yield lambda: sources.warn_of_readers(_secrets(self.settings))

    def running(
        self,
        address: ListenAddress,
        acceptor: Connected,
        workers: Callable[[], tuple[WorkerStatus, ...]] | None = None,
    ) -> RunningCa:
        """The server as its views see it."""
        return RunningCa(
            beginning=self.beginning,
            trust_domain=self.settings.trust_domain,
            address=str(address),
            current=self.source.current,
            ledger=self.ledger,
            audit=self.audit,
            acceptor=acceptor,
            workers=workers,
        )


@asynccontextmanager
async def opened(settings: CaSettings, clock: Clock) -> AsyncIterator[Opened]:
    """The parts, inside this context. Raises ConfigurationError."""
    # The audit log comes first, without which nothing is signed; the directory of a root of our own is locked before
    # a root is made in it. The audit log is settled last, when nothing can be refused any more.
    beginning, audit = Beginning(clock), AuditLog(settings.audit)
    audit.check()
    with _locked(settings) as locked, _settled(audit, clock):
        limits, callers = settings.limits, settings.callers
        source = await open_source(settings, clock)
        tokens = None if callers.join_tokens is None else await _tokens(callers.join_tokens)
        keys = [await IssuerKeys.open(_location(each), clock) for each in callers.jwt]
        deny_list = await _deny_list(settings, clock)
        _warn_of_reach(settings)
        yield Opened(
            settings=settings,
            clock=clock,
            beginning=beginning,
            audit=audit,
            ledger=Ledger(audit, at_once=limits.at_once, per_caller=limits.per_caller),
            locked=locked,
            source=source,
            keys=tuple(keys),
            tokens=tokens,
            deny_list=deny_list,
        )


@contextmanager
def _settled(audit: AuditLog, clock: Clock) -> Iterator[None]:
    """Write at the end how many refusals the audit log left out and has not counted yet."""
    try:
        yield
    finally:
        audit.settle(clock.now())


@contextmanager
def _locked(settings: CaSettings) -> Iterator[LockedDirectory | None]:
    """Lock a self-signed root's directory, so that no second server makes a root of its own there."""
    directory = settings.signer.self_signed
    if directory is None:
        yield None
        return
    in_use = ConfigurationError(f"signer.self_signed: another CA server runs on {directory}; stop it first")
    with locked_directory(directory, "signer.self_signed", in_use) as locked:
        yield locked


async def open_source(settings: CaSettings, clock: Clock) -> Source:
    """The configured signer. Raises ConfigurationError."""
    chosen = settings.signer
    if chosen.cacerts is not None:
        return await PluggedSource.open(
            chosen.cacerts, trust_domain=settings.trust_domain, passphrase_file=chosen.passphrase_file, clock=clock
        )
    assert chosen.self_signed is not None, "the settings hold one of the two"  # noqa: S101 - for the type checker
    ca = await SelfSignedCa.open(
        chosen.self_signed,
        trust_domain=settings.trust_domain,
        key_type=chosen.key,
        lifetime=chosen.root_lifetime,
        clock=clock,
        setting="signer.self_signed",
    )
    return await SelfSignedSource.open(ca, clock)


async def _tokens(directory: Path) -> JoinTokens:
    tokens = JoinTokens(directory)
    try:
        await TimeLimit(TIMEOUT).call(tokens.prepare)
    except TimeoutError as error:
        raise ConfigurationError(
            f"callers.join_tokens: cannot use {directory}: {error.strerror}; check that its disk is there"
        ) from error
    return tokens


async def _tidied(tokens: JoinTokens) -> None:
    """Remove tokens that have long expired: no start waits until a slow disk has given thousands of them."""
    with suppress(OSError, NoThreadError):  # what is left is removed at another start, or by a command
        await in_thread(tokens.tidy)


def _location(chosen: JwtSettings) -> Location:
    return Location(chosen.jwks, chosen.ca_file, chosen.token_file)


def rules(settings: CaSettings) -> tuple[ClaimRule, ...]:
    """What the tokens of each issuer must say, in the order of `callers.jwt`."""
    return tuple(ClaimRule(each.issuer, each.audience, each.claim, each.allow) for each in settings.callers.jwt)


async def _deny_list(settings: CaSettings, clock: Clock) -> DenyList | None:
    file = settings.callers.deny_file
    return None if file is None else await DenyList.open(file, settings.trust_domain, clock)


def _warn_of_reach(settings: CaSettings) -> None:
    """Report settings that give access to more identities than their author may expect."""
    for issuer in settings.callers.jwt:
        if issuer.claim is not None and not issuer.allow:
            log.event(
                LOG,
                "issuer_names_anybody",
                level=logging.WARNING,
                issuer=issuer.issuer,
                effect="its tokens can name every identity of the trust domain, the node agents' among them",
                fix="list in callers.jwt[].allow which ones it may name",
            )
    for agent, other in overreaching(settings.node_agents.values()):
        log.event(
            LOG,
            "node_agent_covers_another",
            level=logging.WARNING,
            node_agent=agent.identity,
            other=other.identity,
            effect="it can get the other's certificate, and with that act for all that the other may act for",
            fix="list in may_act_for the branches with workloads alone",
        )


def _sources(settings: CaSettings) -> list[sources.Source]:
    """What the operator provides: the signer, the keys that verify tokens, and the deny list."""
    signer = {
        "signer.cacerts": settings.signer.cacerts,
        "signer.passphrase_file": settings.signer.passphrase_file,
        "callers.deny_file": settings.callers.deny_file,
    }
    issuers: dict[str, Path | None] = {}
    for number, each in enumerate(settings.callers.jwt):
        key = f"callers.jwt[{number}]"
        keys = None if each.jwks.startswith("https://") else Path(each.jwks)
        issuers |= {f"{key}.jwks": keys, f"{key}.ca_file": each.ca_file, f"{key}.token_file": each.token_file}
    return [(key, path) for key, path in (signer | issuers).items() if path is not None]


def _secrets(settings: CaSettings) -> list[sources.Source]:
    """Those of them that hold a secret."""
    return [each for each in _sources(settings) if each[0].endswith((".cacerts", ".passphrase_file", ".token_file"))]


@contextmanager
def listening(address: ListenAddress) -> Iterator[socket.socket]:
    """The listening socket. Raises ConfigurationError."""
    try:
        family, kind, protocol, _, bound = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise _cannot_listen(address, error.strerror, _UNKNOWN) from error
    with ExitStack() as stack:
        try:
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind(bound)
            listener.listen(BACKLOG)
        except OSError as error:
            fix = _FIXES.get(error.errno or 0, "choose another")
            raise _cannot_listen(address, error.strerror, fix) from error
        yield listener


def _cannot_listen(address: ListenAddress, cause: str | None, fix: str) -> ConfigurationError:
    return ConfigurationError(f"listen: cannot listen at {address}: {cause}; {fix}")


@asynccontextmanager
async def administered(settings: AdminSettings, ca: RunningCa, clock: Clock) -> AsyncIterator[None]:
    """Serve the CA's status inside this context, if the configuration says where."""
    if not settings.enabled or (settings.socket is None and settings.address is None):
        yield
        return
    from sds_agent.admin.server import serving as admin_serving  # noqa: PLC0415 - few have one

    def make() -> "Application":
        from sds_agent.ca.application import application  # noqa: PLC0415 - measured: 60 ms for starlette

        return application(ca, clock)

    async with admin_serving(settings, make, clock):
        yield
