"""Which roots vouch for step-ca's server, in the course of step-ca's own rotations.

At first that is the root that the operator pins, by its fingerprint or in a file; beside it are the roots that step-ca
announced (`/1.0/roots`) over a connection that was verified by those trusted before. With a fingerprint the announced
ones are stored in the authority's directory, so that an agent that restarts after a rotation still trusts the server.
With a file they are trusted until the process ends or the file changes: it is the operator's to say who vouches.
"""

import asyncio
import logging
import os
from pathlib import Path

import msgspec
from msgspec import Struct

from sds_agent import log
from sds_agent.authority.http_client import HttpsRequest, send
from sds_agent.authority.operator_files import OperatorFiles
from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.authority.step_ca.settings import StepCaSettings
from sds_agent.authority.step_ca.wire import SUCCESS, read_root, refusal, words_of
from sds_agent.clock import Clock
from sds_agent.directories import own_directory
from sds_agent.errors import SdsAgentError
from sds_agent.files import ForeignFileError, read_own, write_private
from sds_agent.pki.certificates import CertificateError, read_bundle, read_pem, write_pem
from sds_agent.pki.validation.rules import Chain
from sds_agent.tasks import DISK_TIMEOUT, TimeLimit, uninterrupted
from sds_agent.text import escaped

LOG = logging.getLogger(__name__)

NAME = "server-roots.json"
LARGEST = 4 << 20
"""Bytes of the file."""
LONGEST_REASON = 300
"""Characters of what is said about a damaged file."""


class _StoredRoots(Struct, frozen=True):
    """The file: whose roots these are, the pinned one first, all in PEM."""

    url: str
    fingerprint: str
    pinned: str
    announced: str


class StepCaServerRoots:
    """The roots for one step-ca's server. `what` is the server for messages."""

    def __init__(self, settings: StepCaSettings, directory: Path, what: str, clock: Clock) -> None:
        self._settings = settings
        self._file = directory / NAME
        self._what = what
        self._clock = clock
        self._pinned: bytes | None = None
        self._announced: bytes = b""
        self._operator = OperatorFiles()
        self._disk = TimeLimit(DISK_TIMEOUT)
        self._loaded = False
        self._one_pinning = asyncio.Lock()  # whoever asks meanwhile waits for what is stored
        self._stored = b""
        self._fault = log.LogOnChange(LOG, "server_roots_not_stored")

    async def current(self) -> bytes:
        """The roots to verify the next connection by, in PEM. Raises AuthorityError."""
        if self._settings.fingerprint is None:
            pinned = await self._operator.server_roots(self._settings.ca_file) or b""
            if pinned != self._pinned:
                self._pinned, self._announced = pinned, b""
        else:
            pinned = await self._by_fingerprint(self._settings.fingerprint)
        return pinned + self._announced

    @property
    def described(self) -> tuple[str, str]:
        """As `HttpsRequest.roots_from`."""
        if self._settings.fingerprint is None:
            return "the roots in ca_file do", "put step-ca's root there"
        fix = "set fingerprint to what `step certificate fingerprint root_ca.crt` prints for its root now"
        return "the root with the fingerprint and those announced since do", fix

    async def announced(self, roots: Chain) -> None:
        """step-ca announced these over a connection that `current` vouched for."""
        pem = write_pem(roots)
        if not roots or pem == self._announced:
            return
        self._announced = pem
        if self._settings.fingerprint is not None:
            await self._store()

    def put_back(self) -> Path | None:
        """Write the file again if it is gone, as `state.Restorable` has it. Raises OSError and SdsAgentError."""
        if not self._stored or os.path.lexists(self._file):
            return None
        _write(self._file, self._stored)
        return self._file

    async def _by_fingerprint(self, fingerprint: str) -> bytes:
        async with self._one_pinning:
            if self._pinned is None and not self._loaded:
                await self._load()
            if self._pinned is None:
                self._pinned = await self._bootstrap(fingerprint)
            return self._pinned

    async def _bootstrap(self, fingerprint: str) -> bytes:
        """The root, from a server that nothing vouches for yet: its hash proves it."""
        request = HttpsRequest(
            "GET",
            f"{self._settings.url}/root/{fingerprint}",
            None,
            server_name=self._settings.server_name,
            unverified=True,
        )
        answer = await send(request, self._what)
        if answer.status == 404:
            raise AuthorityError(
                ErrorKind.INVALID,
                f"{self._what} knows no root with the fingerprint {fingerprint} (404: {words_of(answer.body)}); write "
                "what `step certificate fingerprint root_ca.crt` prints for its root now, and check url",
            )
        if answer.status not in SUCCESS:
            delay = answer.retry_after(self._clock.now())
            raise refusal(answer.status, words_of(answer.body), self._what, retry_after=delay)
        return read_root(answer.body, fingerprint, self._what)

    async def _load(self) -> None:
        """Use what an earlier process stored for this server and this fingerprint."""
        try:
            stored = await self._disk.call(_read, self._file)
            if (stored.url, stored.fingerprint) == (self._settings.url, self._settings.fingerprint):
                self._pinned = write_pem(read_pem(stored.pinned.encode()))
                self._announced = write_pem(read_bundle(stored.announced.encode()).certificates)
                self._stored = msgspec.json.encode(stored)
        except FileNotFoundError:
            pass  # nothing was stored
        except OSError as error:
            self._not_restored(f"cannot read {self._file}: {error.strerror}")
        except ForeignFileError as error:
            self._not_restored(f"{self._file} {error}; it is not used")
        except (CertificateError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            self._not_restored(f"{self._file} is damaged ({escaped(str(error), LONGEST_REASON)}); it is not used")
        self._loaded = True

    @staticmethod
    def _not_restored(cause: str) -> None:
        log.event(LOG, "server_roots_not_restored", level=logging.WARNING, cause=cause)

    async def _store(self) -> None:
        """A failure is logged and costs nothing before the next restart."""
        settings = self._settings
        self._stored = msgspec.json.encode(
            _StoredRoots(
                settings.url, settings.fingerprint or "", (self._pinned or b"").decode(), self._announced.decode()
            )
        )
        try:
            await uninterrupted(self._disk.call(_write, self._file, self._stored))
        except OSError as error:
            self._fault.report(f"cannot write step-ca's roots to {self._file}: {error.strerror}")
        except SdsAgentError as error:
            self._fault.report(f"cannot write step-ca's roots to {self._file}: {error}")
        else:
            self._fault.resolved()


def _read(file: Path) -> _StoredRoots:
    data, mode = read_own(file, LARGEST)
    if mode & 0o022:
        raise ForeignFileError("may be written by others")
    if len(data) > LARGEST:
        raise ValueError("it is larger than any file that the agent writes")
    return msgspec.json.decode(data, type=_StoredRoots)


def _write(file: Path, content: bytes) -> None:
    own_directory(file.parent, 0o700)
    write_private(file, content)
