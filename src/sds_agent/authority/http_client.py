"""One HTTP request to a CA: a connection of its own, a bounded answer, and failures in words.

Roots, tokens and certificates are read anew for every attempt, so nothing outlives one request that could remember an
old one. No redirect is followed and no proxy is used: the CA alone may see a token. There is no time limit here, as the
caller enforces its deadline by cancellation.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from sds_agent.authority.http_message import (
    LARGEST_ANSWER,
    LONGEST_LINE,
    CertificateRefusedError,
    HttpAnswer,
    HttpsRequest,
)

__all__ = [
    "LARGEST_ANSWER",
    "LONGEST_LINE",
    "CertificateRefusedError",
    "HttpAnswer",
    "HttpsRequest",
    "lines",
    "send",
]


async def send(request: HttpsRequest, what: str) -> HttpAnswer:
    """Send it and return the answer. `what` is the server for messages, such as "step-ca at https://ca.example:9000".

    Raises AuthorityError: TRANSIENT where no answer comes, INVALID for one that is larger than LARGEST_ANSWER, and
    CertificateRefusedError.
    """
    from sds_agent.authority import http_transport  # noqa: PLC0415 - measured: 90 ms

    return await http_transport.send(request, what)


async def lines(request: HttpsRequest, what: str) -> AsyncGenerator[bytes | HttpAnswer, None]:
    """Send it and give each line of the answer as soon as it is there, without its line break and no empty one.

    For a server that goes on answering, as one does that is watched. An answer of another status than 200 comes whole,
    and alone. The connection ends with the iteration, so a caller that may stop early closes it (`aclosing`). Raises
    as `send` does; a line may be as long as LONGEST_LINE, and all of them together as LARGEST_ANSWER.
    """
    from sds_agent.authority import http_transport  # noqa: PLC0415 - measured: 90 ms

    async with aclosing(http_transport.lines(request, what)) as received:
        async for each in received:
            yield each
