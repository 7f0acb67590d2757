"""How a client reads the files that its settings name, beside the event loop: they may lie on a network disk that does
not answer. What such files may hold is in `credentials`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from sds_agent.authority.credentials import (
    CLIENT_CERTIFICATE,
    SERVER_ROOTS,
    TRUST_ROOTS,
    read_client_certificate,
    read_roots,
    read_trust_roots,
)
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity, ErrorKind
from sds_agent.tasks import DISK_TIMEOUT, TimeLimit

T = TypeVar("T")
P = ParamSpec("P")


class OperatorFiles:
    """Reads them, one after another, anew each time. All methods raise AuthorityError UNAUTHENTICATED."""

    def __init__(self) -> None:
        self._disk = TimeLimit(DISK_TIMEOUT)

    async def read(self, what: str, read: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """What `read` gives, in a thread of its own. `what` it reads is for the message where the disk is silent."""
        try:
            return await self._disk.call(read, *arguments, **options)
        except TimeoutError as error:
            message = f"{what} cannot be read: {error.strerror}; check that the disk is there"
            raise AuthorityError(ErrorKind.UNAUTHENTICATED, message) from error

    async def server_roots(self, ca_file: Path | None) -> bytes | None:
        """The roots that vouch for the CA's server, in PEM; None where no file is named."""
        return None if ca_file is None else await self.read(f"{SERVER_ROOTS} ({ca_file})", read_roots, ca_file)

    async def trust_roots(self, roots_file: Path) -> bytes:
        """The trust domain's roots, in PEM."""
        return await self.read(f"{TRUST_ROOTS} ({roots_file})", read_trust_roots, roots_file)

    async def client_certificate(self, certificate_file: Path | None, key_file: Path | None) -> CurrentIdentity | None:
        """The certificate to show with its key; None where no files are named."""
        what = f"{CLIENT_CERTIFICATE} ({certificate_file})"
        return await self.read(what, read_client_certificate, certificate_file, key_file)
