"""The servers of one Vault: which node to ask, what to show it, and where a redirect may lead.

A cluster has one active node. The others pass requests on to it, or answer that they do not serve now, or redirect to
the active one; the token then goes there only if the configuration names it.
"""

import asyncio
import logging
from collections.abc import Iterable
from urllib.parse import urlsplit

from msgspec import Struct

from sds_agent import log
from sds_agent.authority.answers import all_failed
from sds_agent.authority.http_client import (
    CertificateRefusedError,
    HttpAnswer,
    HttpsRequest,
    send,
)
from sds_agent.authority.operator_files import OperatorFiles
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity, ErrorKind
from sds_agent.authority.vault.refusals import VaultRefusal, leads_elsewhere, not_serving, serves
from sds_agent.authority.vault.settings import VaultSettings
from sds_agent.authority.vault.wire import VaultCall, words
from sds_agent.clock import Clock
from sds_agent.tasks import part_of_time, time_at_least
from sds_agent.values import Sensitive

LOG = logging.getLogger(__name__)

TIMEOUT = 9.0
"""Seconds for one request to all nodes together, where the caller does not say how long an attempt may take."""
OWN_SHARE = 0.9
"""The same as a part of what the caller gives. Each node has an equal part of it, so a silent one leaves the others
theirs.
"""
LOGIN_TIMEOUT = 30.0
"""Seconds at least for a node to answer a login, which outlives the attempt that it was begun for."""
_REDIRECTS = frozenset({307, 308})
_PORTS = {"https": 443, "http": 80}


class VaultReach(Sensitive, frozen=True):
    """What a connection takes: the roots that vouch for the server (PEM), and the client certificate to show."""

    roots: bytes | None
    certificate: CurrentIdentity | None = None


class NodeAnswer(Struct, frozen=True):
    """An answer, and the node that gave it."""

    http: HttpAnswer
    url: str

    @property
    def what(self) -> str:
        """The node for messages, such as "Vault at https://vault.example:8200"."""
        return _what(self.url)


class VaultNodes:
    """Sends requests to the node that answered last, and to the others in turn where it does not answer."""

    def __init__(self, settings: VaultSettings, clock: Clock, *, timeout: float = TIMEOUT) -> None:
        self._settings = settings
        self._clock = clock
        self._timeout = timeout
        self._first = 0
        self._operator = OperatorFiles()

    @property
    def _share(self) -> float | None:
        """The seconds that one of several nodes has; None for a single one, which has all that the caller gives."""
        if len(self._settings.url) == 1:
            return None
        return part_of_time(OWN_SHARE, self._timeout) / len(self._settings.url)

    async def reach(self) -> VaultReach:
        """What connections take, read anew from the files. Raises AuthorityError UNAUTHENTICATED."""
        settings, files = self._settings, self._operator
        certificate = await files.client_certificate(settings.certificate_file, settings.key_file)
        return VaultReach(await files.server_roots(settings.ca_file), certificate)

    async def ask(self, call: VaultCall, reach: VaultReach) -> NodeAnswer:
        """The answer of the first node that serves. Raises AuthorityError; of nodes that do not serve, one for all."""
        failures: list[AuthorityError] = []
        for index in self._order():
            try:
                answer = await self._node(self._settings.url[index], call, reach, self._share)
            except AuthorityError as error:
                if not _leaves_to_the_next(error):
                    raise
                failures.append(error)
            else:
                self._answered(answer.url)
                return answer
        raise _all_failed(failures)

    async def log_in(self, call: VaultCall, reach: VaultReach) -> NodeAnswer:
        """As `ask`, for what may be good for one success alone, such as a secret ID.

        A node that is late is not given up when the next one is asked: it may have taken the secret, which the next one
        then refuses. So a refusal counts when no node is left that may still accept.
        """
        urls = [self._settings.url[index] for index in self._order()]
        longest = time_at_least(LOGIN_TIMEOUT)
        begun, running = list[asyncio.Task[NodeAnswer]](), set[asyncio.Task[NodeAnswer]]()
        failures: list[AuthorityError] = []
        final: NodeAnswer | AuthorityError | None = None
        try:
            while urls or running:
                if urls:
                    begun.append(asyncio.create_task(self._node(urls.pop(0), call, reach, longest)))
                    running.add(begun[-1])
                share = self._share if urls else None
                done, running = await asyncio.wait(running, timeout=share, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    try:
                        final = answer = each.result()
                        if answer.http.status == 200:
                            self._answered(answer.url)
                            return answer
                        urls.clear()
                    except AuthorityError as error:
                        failures.append(error)
                        if not _leaves_to_the_next(error):
                            final = error
                            urls.clear()
        finally:
            for each in begun:
                each.cancel()
            await asyncio.gather(*begun, return_exceptions=True)  # what one raised beside the answer is known then
        if isinstance(final, NodeAnswer):
            self._answered(final.url)
            return final
        raise final or _all_failed(failures)

    def refusal(self, answer: NodeAnswer, call: VaultCall) -> VaultRefusal:
        """An answer that is no success, as a value."""
        http = answer.http
        said = words(http.body, call.secrets)
        return VaultRefusal(answer.what, http.status, said, http.retry_after(self._clock.now()))

    def _answered(self, url: str) -> None:
        """Ask this node first from now on: the one that answered, which may be where another one redirected to."""
        index = self._settings.url.index(url)
        if index != self._first:
            log.event(LOG, "endpoint_changed", level=logging.WARNING, address=url)
        self._first = index

    def _order(self) -> Iterable[int]:
        every = range(len(self._settings.url))
        return (*every[self._first :], *every[: self._first])

    async def _node(self, url: str, call: VaultCall, reach: VaultReach, seconds: float | None) -> NodeAnswer:
        """The answer of one node, or of the leader that it names, within so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                answer = await self._send(url, call, reach)
                if answer.http.status in _REDIRECTS:
                    answer = await self._send(self._leader(answer, call), call, reach)
        except TimeoutError as error:
            within = "" if seconds is None else f" within {round(seconds, 1):g} s"
            message = f"{_what(url)} did not answer{within}; check that the network lets the agent through"
            raise AuthorityError(ErrorKind.TRANSIENT, message) from error
        if answer.http.status != 200 and not serves(refusal := self.refusal(answer, call)):
            raise not_serving(refusal)
        return answer

    async def _send(self, url: str, call: VaultCall, reach: VaultReach) -> NodeAnswer:
        headers = {"x-vault-request": "true"}  # Vault Agent may ask for it, against forged requests of browsers
        if call.body:
            headers["content-type"] = "application/json"
        if call.token is not None:
            headers["x-vault-token"] = call.token.text
        if self._settings.namespace is not None:
            headers["x-vault-namespace"] = self._settings.namespace
        request = HttpsRequest(
            call.method,
            f"{url}/v1/{call.path}",
            reach.roots,
            call.body,
            headers,
            self._settings.server_name,
            reach.certificate,
        )
        return NodeAnswer(await send(request, _what(url)), url)

    def _leader(self, answer: NodeAnswer, call: VaultCall) -> str:
        """The configured node that a redirect names. Raises AuthorityError TRANSIENT for any other place."""
        location = answer.http.headers.get("location", "")
        for url in self._settings.url:
            if _origin(url) == _origin(location):
                return url
        raise leads_elsewhere(answer.what, words(location.encode(), call.secrets))


def _leaves_to_the_next(error: AuthorityError) -> bool:
    return error.kind is ErrorKind.TRANSIENT or isinstance(error, CertificateRefusedError)


def _all_failed(failures: list[AuthorityError]) -> AuthorityError:
    passing = any(failure.kind is ErrorKind.TRANSIENT for failure in failures)
    return all_failed(failures, ErrorKind.TRANSIENT if passing else failures[0].kind)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return "", None, None


def _what(url: str) -> str:
    return f"Vault at {url}"
