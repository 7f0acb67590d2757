"""Anchors that outlive the process: those that certificates in use chain to, in a small file of the state directory.

Envoys hold a certificate until they are given the next one, and peers may meet it for a while longer. An agent that is
restarted, with another CA or with none of its certificates kept, would otherwise forget what it chains to, and peers
would refuse each other. What is in the file is public; who can write to it could replace a CA of the agent's as well.
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
    """The anchors that are needed cannot be kept."""


class _WrittenAnchor(Struct, frozen=True):
    """A need as it is written: `until` is seconds since the epoch."""

    authority: str
    until: float
    anchor_pem: str


class NeededAnchorsFile:
    """The file with the anchors that are needed, below a directory of the agent's own."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / NAME
        self._trouble = log.LogOnChange(LOG, "anchors_not_kept")
        self._holds: tuple[NeededAnchor, ...] = ()
        self._unsure = False  # after a write that failed or was late: it may be there, or come to be
        self._disk = TimeLimit(DISK_TIMEOUT)

    def load(self) -> tuple[NeededAnchor, ...]:
        """What the agent before this one needed; none where there is no file. A file that cannot be used is logged, and
        stays until the next one is written.
        """
        remove_unfinished(self._file.parent, NAME.replace(".", r"\."))
        try:
            self._holds, self._unsure = _read(self._file), False
        except FileNotFoundError:
            return ()
        except ForeignFileError as error:
            cause = f"{self._file} {error}; it is not used"
        except OSError as error:
            cause = f"cannot read {self._file}: {error.strerror}"
        except (CertificateError, msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            cause = f"{self._file} is damaged ({escaped(str(error), LONGEST_REASON)}); it is not used"
        else:
            return self._holds
        log.event(LOG, "anchors_not_restored", level=logging.WARNING, cause=cause)
        return ()

    async def save(self, needs: tuple[NeededAnchor, ...]) -> bool:
        """Write these in place of others; returns whether they are there. A failure is logged once."""
        if needs == self._holds and not self._unsure:
            return True
        self._unsure = True
        try:
            await uninterrupted(self._disk.call(self._write, needs))
        except TimeoutError as error:
            self._trouble.report(f"cannot write {self._file}: {error.strerror}")
            return False
        except SdsAgentError as error:
            self._trouble.report(str(error))
            return False
        self._trouble.resolved()
        self._holds, self._unsure = needs, False
        return True

    def put_back(self) -> Path | None:
        """Write the file again if it is gone; returns its path if it was. Raises NeededAnchorsError when it cannot."""
        if not self._holds or os.path.lexists(self._file):
            return None
        self._write(self._holds)
        return self._file

    def _write(self, needs: tuple[NeededAnchor, ...]) -> None:
        entries = [_WrittenAnchor(n.authority, n.until.timestamp(), write_pem([n.anchor]).decode()) for n in needs]
        try:
            own_directory(self._file.parent, 0o700)
            write_private(self._file, msgspec.json.encode(entries))
        except (OSError, SdsAgentError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise NeededAnchorsError(
                f"cannot keep the anchors of certificates in use in {self._file}: {reason}"
            ) from error


def _read(file: Path) -> tuple[NeededAnchor, ...]:
    data, mode = read_own(file, LARGEST)
    if mode & stat.S_IWOTH:
        raise ForeignFileError("may be written by others")
    if len(data) > LARGEST:
        raise ValueError("it is larger than any that the agent writes")
    return tuple(_need(entry) for entry in msgspec.json.decode(data, type=list[_WrittenAnchor]))


def _need(entry: _WrittenAnchor) -> NeededAnchor:
    (anchor,) = read_pem(entry.anchor_pem.encode())
    return NeededAnchor(
        entry.authority, anchor, min(datetime.fromtimestamp(entry.until, UTC), anchor.not_valid_after_utc)
    )
