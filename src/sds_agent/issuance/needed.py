"""Anchors that outlive the process: those that certificates in use chain to, in a small file of the state directory.

Envoys use a certificate until they are given the next one, and peers may meet it for a while longer. An agent that is
restarted with another CA, or without cached certificates, would not know what those certificates chain to, and peers
would refuse each other. What is in the file is public; who can write to it can replace the agent's own CA as well.
"""

import logging
import os
import stat
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from cryptography import x509
from msgspec import Struct

from sds_agent import log
from sds_agent.directories import own_directory
from sds_agent.errors import SdsAgentError
from sds_agent.files import ForeignFileError, read_own, remove_unfinished, write_private
from sds_agent.pki.certificates import CertificateError, read_pem, write_pem
from sds_agent.tasks import DISK_TIMEOUT, TimeLimit, uninterrupted
from sds_agent.text import escaped

LOG = logging.getLogger(__name__)

NAME = "anchors.json"
LARGEST = 4 << 20
"""Bytes. An anchor takes two kilobytes."""
LONGEST_REASON = 300
"""Characters of what is said about a damaged file."""


class NeededAnchor(Struct, frozen=True):
    """An anchor that a certificate of `authority` chains to, and when the last of those certificates ends."""

    authority: str
    anchor: x509.Certificate
    until: datetime


class NeededAnchorsError(SdsAgentError):
    """The file with the needed anchors cannot be written."""


class _WrittenAnchor(Struct, frozen=True):
    """A needed anchor as it is written: `until` is in seconds since the epoch."""

    authority: str
    until: float
    anchor_pem: str


class NeededAnchorsFile:
    """The file with the needed anchors, in a directory of the agent's own."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / NAME
        self._fault = log.LogOnChange(LOG, "anchors_not_kept")
        self._written: tuple[NeededAnchor, ...] = ()
        self._unsure = False  # a write failed or was late: the file may have either content, now or later
        self._disk = TimeLimit(DISK_TIMEOUT)

    def load(self) -> tuple[NeededAnchor, ...]:
        """The anchors that an earlier process needed; none if there is no file.

        A file that cannot be used is logged, and stays until the next one is written.
        """
        remove_unfinished(self._file.parent, NAME.replace(".", r"\."))
        try:
            self._written, self._unsure = _read(self._file), False
        except FileNotFoundError:
            return ()
        except ForeignFileError as error:
            cause = f"{self._file} {error}; it is not used"
        except OSError as error:
            cause = f"cannot read {self._file}: {error.strerror}"
        except (CertificateError, msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            cause = f"{self._file} is damaged ({escaped(str(error), LONGEST_REASON)}); it is not used"
        else:
            return self._written
        log.event(LOG, "anchors_not_restored", level=logging.WARNING, cause=cause)
        return ()

    async def save(self, needed: tuple[NeededAnchor, ...]) -> bool:
        """Write these in place of all others; returns whether they are in the file. A failure is logged once."""
        if needed == self._written and not self._unsure:
            return True
        self._unsure = True
        try:
            await uninterrupted(self._disk.call(self._write, needed))
        except TimeoutError as error:
            self._fault.report(f"cannot write {self._file}: {error.strerror}")
            return False
        except SdsAgentError as error:
            self._fault.report(str(error))
            return False
        self._fault.resolved()
        self._written, self._unsure = needed, False
        return True

    def put_back(self) -> Path | None:
        """Write the file again if it is gone; returns its path if it was. Raises NeededAnchorsError when it cannot."""
        if not self._written or os.path.lexists(self._file):
            return None
        self._write(self._written)
        return self._file

    def _write(self, needed: tuple[NeededAnchor, ...]) -> None:
        entries = [_WrittenAnchor(n.authority, n.until.timestamp(), write_pem([n.anchor]).decode()) for n in needed]
        try:
            own_directory(self._file.parent, 0o700)
            write_private(self._file, msgspec.json.encode(entries))
        except (OSError, SdsAgentError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise NeededAnchorsError(
                f"cannot write the anchors of certificates in use to {self._file}: {reason}"
            ) from error


def _read(file: Path) -> tuple[NeededAnchor, ...]:
    data, mode = read_own(file, LARGEST)
    if mode & stat.S_IWOTH:
        raise ForeignFileError("may be written by others")
    if len(data) > LARGEST:
        raise ValueError("it is larger than any file that the agent writes")
    return tuple(_read_anchor(entry) for entry in msgspec.json.decode(data, type=list[_WrittenAnchor]))


def _read_anchor(entry: _WrittenAnchor) -> NeededAnchor:
    (anchor,) = read_pem(entry.anchor_pem.encode())
    return NeededAnchor(
        entry.authority, anchor, min(datetime.fromtimestamp(entry.until, UTC), anchor.not_valid_after_utc)
    )
