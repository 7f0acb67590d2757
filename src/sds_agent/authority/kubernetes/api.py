"""Requests to the API server: with the access of the moment, and with answers that show no token.

While it starts, the API server knows neither its rules (403) nor all of its resources (404), and answers so to callers
who are allowed and for what it serves a moment later. Whether it has started, it says at /readyz.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from msgspec import structs

from sds_agent.authority import http_client
from sds_agent.authority.http_client import HttpAnswer, HttpsRequest
from sds_agent.authority.kubernetes.access import ApiAccess, read_access
from sds_agent.authority.kubernetes.settings import KubernetesSettings
from sds_agent.authority.kubernetes.wire import ApiResource, refusal
from sds_agent.authority.operator_files import OperatorFiles
from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.clock import Clock

READINESS_TIMEOUT = 2.0
"""Seconds to say whether it has started: the refusal that was there before must not wait for longer."""
LARGEST_REFUSAL = 64 << 10
"""Bytes of an answer that is searched for pieces of the token."""


class KubernetesApi:
    """The API server of one authority. All methods raise AuthorityError."""

    def __init__(self, settings: KubernetesSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._operator = OperatorFiles()

    async def access(self) -> ApiAccess:
        """Read the access anew: the token is replaced while the agent runs."""
        return await self._operator.read("the credentials for the API server", read_access, self._settings)

    async def send(self, method: str, path: str, body: bytes = b"") -> HttpAnswer:
        """Send a request with JSON, and return the answer of whatever status."""
        access = await self.access()
        answer = await http_client.send(_request(access, method, path, body), access.what)
        return structs.replace(answer, body=_without_token(answer.body, access, refused=answer.status >= 400))

    async def lines(self, path: str) -> AsyncGenerator[bytes | HttpAnswer, None]:
        """The answer line by line as `http_client.lines` gives it."""
        access = await self.access()
        async with aclosing(http_client.lines(_request(access, "GET", path, b""), access.what)) as lines:
            async for each in lines:
                if isinstance(each, bytes):
                    yield _without_token(each, access)
                else:
                    yield structs.replace(each, body=_without_token(each.body, access))

    async def refusal(self, answer: HttpAnswer, resource: ApiResource, verb: str) -> AuthorityError:
        """The error that an answer means which is neither a success nor expected; `verb` is RBAC's, such as create."""
        error = refusal(answer, resource, verb, server(answer), self._clock.now())
        return await self.unless_starting(error) if answer.status in {403, 404} else error

    async def unless_starting(self, error: AuthorityError) -> AuthorityError:
        """The error, or the same as a passing one where the API server has not started yet."""
        try:
            async with asyncio.timeout(READINESS_TIMEOUT):
                started = (await self.send("GET", "/readyz")).status == 200
        except (AuthorityError, TimeoutError):
            started = False
        if started:
            return error
        return AuthorityError(ErrorKind.TRANSIENT, f"{error}; it does not say that it is ready, and may be starting")


def server(answer: HttpAnswer) -> str:
    """Who answered, for messages."""
    return f"the API server at {answer.host}"


def _request(access: ApiAccess, method: str, path: str, body: bytes) -> HttpsRequest:
    headers: Mapping[str, str] = {"accept": "application/json"}
    if body:
        headers = {**headers, "content-type": "application/json"}
    if access.token is not None:
        headers = {**headers, "authorization": f"Bearer {access.token.text}"}
    return HttpsRequest(
        method,
        access.url + path,
        access.roots,
        body,
        headers,
        server_name=access.server_name,
        certificate=access.certificate,
    )


def _without_token(content: bytes, access: ApiAccess, *, refused: bool = False) -> bytes:
    """Before anything of it is cut to a length, which might leave half of a token. Where a request is `refused`, pieces
    of the token go too; a certificate may be like one by chance, and stays whole.
    """
    if access.token is None:
        return content
    text = content.decode(errors="replace")
    if refused and len(text) <= LARGEST_REFUSAL:
        return access.token.pieces_removed_from(text).encode()
    return access.token.removed_from(text).encode()
