"""Requests to the API server: with the access of the moment, and with answers that show no token."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from msgspec import structs

from sds_agent.authority import http_client
from sds_agent.authority.http_client import HttpAnswer, HttpsRequest
from sds_agent.authority.kubernetes.access import ApiAccess, read_access
from sds_agent.authority.kubernetes.settings import KubernetesSettings
from sds_agent.authority.protocol import AuthorityError, ErrorKind


class KubernetesApi:
    """The API server of one authority. All methods raise AuthorityError."""

    def __init__(self, settings: KubernetesSettings) -> None:
        self._settings = settings
        self._disk = http_client.disk()

    async def access(self) -> ApiAccess:
        """Read the access anew: the token is replaced while the agent runs."""
        try:
            return await self._disk.call(read_access, self._settings)
        except TimeoutError as error:
            raise AuthorityError(
                ErrorKind.UNAUTHENTICATED,
                f"the credentials for the API server cannot be read: {error.strerror}; check that their disk is there",
            ) from error

    async def send(self, method: str, path: str, body: bytes = b"") -> HttpAnswer:
        """Send a request with JSON, and return the answer of whatever status."""
        access = await self.access()
        answer = await http_client.send(_request(access, method, path, body), access.what)
        return structs.replace(answer, body=_without_token(answer.body, access))

    async def lines(self, path: str) -> AsyncGenerator[bytes | HttpAnswer, None]:
        """The answer line by line as `http_client.lines` gives it."""
        access = await self.access()
        async with aclosing(http_client.lines(_request(access, "GET", path, b""), access.what)) as lines:
            async for each in lines:
                if isinstance(each, bytes):
                    yield _without_token(each, access)
                else:
                    yield structs.replace(each, body=_without_token(each.body, access))


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


def _without_token(content: bytes, access: ApiAccess) -> bytes:
    """Before anything of it is cut to a length, which might leave half of a token."""
    return content if access.token is None else access.token.removed_from(content.decode(errors="replace")).encode()
