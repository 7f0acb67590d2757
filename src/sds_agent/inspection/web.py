"""GET requests to an admin server, an agent's or an Envoy's, by a person who named its address.

What answers there may be anything. So an answer is bounded in its size and in its time, is taken as it is (a compressed
one would be larger than what was sent), no redirect is followed, and an error's words are printable.
"""

import asyncio
import os
import ssl
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpx
from msgspec import Struct

from sds_agent.errors import leaves
from sds_agent.text import one_line

SILENCE = 5.0
"""Seconds for a connection, and for which a server may send nothing."""
TIMEOUT = 30.0
"""Seconds until all answers have to be there."""
LARGEST = 128 << 20
"""Bytes of an answer. The status of 10,000 workloads has a fifth of it, and so has the configuration of an Envoy with
thousands of clusters.
"""
LONGEST_WORDS = 300
URLS = ("http://", "https://")


class WebError(Exception):
    """No usable answer comes; the message is a clause about the server that says why."""


class WebAnswer(Struct, frozen=True):
    """An answer: its status code, its content, and the media type that it names."""

    status: int
    body: bytes
    media: str

    def looks(self) -> str:
        """What it seems to be, for a message about an answer that is not what was asked for."""
        return f"{len(self.body)} bytes of {one_line(self.media, LONGEST_WORDS) or 'no named type'}"


def get(place: str, *paths: str) -> Sequence[WebAnswer]:
    """What the server at a URL or a Unix socket answers to a GET of each path, in order. The body of an answer with
    another status than 200 is left out. Raises WebError.
    """
    try:
        if place.startswith(URLS):
            _ = urlsplit(place).port  # one above 65535 is no error of httpx's: the socket raises OverflowError for it
        return asyncio.run(_get(place, paths))
    except TimeoutError as error:
        raise WebError(f"its answer is not whole after {TIMEOUT:g} s") from error
    except httpx.TimeoutException as error:
        raise WebError(f"nothing came for {SILENCE:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # the last: a port, or a host that is no name
        raise WebError(one_line(cause_of(error), LONGEST_WORDS) or type(error).__name__) from error


def cause_of(error: Exception) -> str:
    """Why it failed. Where a connection did, httpx says no more than that: the first error of the system's says why."""
    inner: BaseException = error
    while (before := inner.__cause__ or inner.__context__) is not None:  # httpcore raises its own from none
        inner = before
    first = next(leaves(inner))
    if not isinstance(error, httpx.ConnectError) or not isinstance(first, OSError) or first.errno is None:
        return str(error)
    if isinstance(first, ssl.SSLError):  # an OSError too, whose number is one of OpenSSL's
        return str(error)
    return os.strerror(first.errno) if first.errno > 0 else str(first.strerror)


async def _get(place: str, paths: Sequence[str]) -> list[WebAnswer]:
    is_url = place.startswith(URLS)
    async with asyncio.timeout(TIMEOUT):
        # without TLS there is nothing to verify, and loading the roots for it takes as long as all the rest
        secure = place.startswith("https://")
        transport = httpx.AsyncHTTPTransport(verify=secure, uds=None if is_url else place)
        base = place.rstrip("/") if is_url else "http://localhost"
        headers = {"accept-encoding": "identity"}
        async with httpx.AsyncClient(
            base_url=base, transport=transport, timeout=SILENCE, trust_env=False, headers=headers
        ) as client:
            return [await _answer(client, path) for path in paths]


async def _answer(client: httpx.AsyncClient, path: str) -> WebAnswer:
    async with client.stream("GET", path) as response:
        body = bytearray()
        if response.status_code == httpx.codes.OK:
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > LARGEST:
                    raise WebError(f"its answer to {path} is larger than {LARGEST} bytes")
        return WebAnswer(response.status_code, bytes(body), response.headers.get("content-type", ""))
