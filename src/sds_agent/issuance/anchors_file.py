"""Anchors that outlive the process, in a small file of the state directory: those that each authority advertised for
this and for other trust domains, and those that certificates in use chain to.

With the first a restarted agent serves the whole bundle at once, the same as before, also while every CA is down. The
second are for Envoys that use a certificate until they are given the next one, and for peers that meet it a while
longer: an agent that was restarted with another CA, or without stored certificates, would not know what those
certificates chain to. What is in the file is public; who can write to it can replace the agent's own CA as well.
"""

import logging
import re
import stat
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec
from cryptography import x509
from msgspec import Struct

from sds_agent import log
from sds_agent.directories import own_directory
from sds_agent.errors import SdsAgentError
from sds_agent.files import remove_unfinished
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.validation.rules import Chain
from sds_agent.sealing import Seal
from sds_agent.statefile import FORMAT, StateFile, UnusableFileError
from sds_agent.tasks import DISK_TIMEOUT, TimeLimit, uninterrupted

LOG = logging.getLogger(__name__)

NAME = "anchors.json"
LARGEST = 8 << 20
"""Bytes. An anchor takes two kilobytes."""
PURPOSE = "trust anchors"


class NeededAnchor(Struct, frozen=True):
    """An anchor that a certificate of `authority` chains to, and when the last of those certificates ends."""

    authority: str
    anchor: x509.Certificate
    until: datetime


class AdvertisedAnchors(Struct, frozen=True):
    """What an authority advertised, and since when."""

    authority: str
    anchors: Chain
    since: datetime


class FederatedAnchors(Struct, frozen=True):
    """What an authority gave as the anchors of another trust domain."""

    trust_domain: str
    authority: str
    anchors: Chain


class StoredAnchors(NamedTuple):
    """What the file holds."""

    needed: tuple[NeededAnchor, ...] = ()
    advertised: tuple[AdvertisedAnchors, ...] = ()
    federated: tuple[FederatedAnchors, ...] = ()


class AnchorsFileError(SdsAgentError):
    """The file with the anchors cannot be written."""


class _WrittenAnchor(Struct, frozen=True):
    """A needed anchor as it is written: `until` is in seconds since the epoch."""

    authority: str
    until: float
    anchor_pem: str


class _WrittenAdvertised(Struct, frozen=True):
    """What an authority of this name and kind advertised, as it is written."""

    authority: str
    kind: str
    since: float
    anchors_pem: str


class _WrittenFederated(Struct, frozen=True):
    """What an authority of this name and kind gave for another trust domain, as it is written."""

    trust_domain: str
    authority: str
    kind: str
    anchors_pem: str


class _Written(Struct, frozen=True):
    """The content of the file. In format 1 it is the needed anchors alone, a list."""

    needed: list[_WrittenAnchor]
    advertised: list[_WrittenAdvertised]
    format: int = 1
    federated: list[_WrittenFederated] = msgspec.field(default_factory=list)


class AnchorsFile:
    """The file with the anchors, in a directory of the agent's own.

    `kinds` are the kinds of the authorities that there are, by their names: what others advertised is of no use.
    `check` raises an error of this package where nothing is to be written, as the directory may be another process's.
    """

    def __init__(
        self,
        directory: Path,
        kinds: Mapping[str, str] | None = None,
        seal: Seal | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._kinds = dict(kinds or {})
        self._check = check
        self._file = StateFile(
            directory / NAME,
            LARGEST,
            seal=seal,
            purpose=PURPOSE,
            instead="the bundle is made of what the CAs advertise from now on",
            forbidden=stat.S_IWOTH,
        )
        self._fault = log.LogOnChange(LOG, "anchors_not_kept")
        self._written = StoredAnchors()
        self._unsure = False  # a write failed or was late, or is due for the form: the file may have either content
        self._disk = TimeLimit(DISK_TIMEOUT)

    def know(self, kinds: Mapping[str, str]) -> None:
        """The authorities there are from now on, by their names, with their kinds."""
        self._kinds = dict(kinds)

    def load(self) -> StoredAnchors:
        """The anchors that an earlier process stored; none if there is no file.

        A file that cannot be used is logged (`anchors_not_restored`).
        """
        remove_unfinished(self._file.path.parent, re.escape(NAME))
        try:
            stored = self._file.load(self._decode)
        except UnusableFileError as error:
            log.event(LOG, "anchors_not_restored", level=logging.WARNING, cause=str(error))
            return StoredAnchors()
        if stored is None:
            return StoredAnchors()
        self._written, self._unsure = stored.content, stored.outdated
        return self._written

    async def save(self, anchors: StoredAnchors) -> bool:
        """Write these in place of all others; returns whether they are in the file. A failure is logged once."""
        if anchors == self._written and not self._unsure:
            return True
        self._unsure = True
        try:
            await uninterrupted(self._disk.call(self._write, anchors))
        except TimeoutError as error:
            self._fault.report(f"cannot write {self._file.path}: {error.strerror}")
            return False
        except SdsAgentError as error:
            self._fault.report(str(error))
            return False
        self._fault.resolved()
        self._written, self._unsure = anchors, False
        return True

    def put_back(self) -> Path | None:
        """Write the file again if it is gone; returns its path if it was. Raises AnchorsFileError when it cannot."""
        try:
            return self._file.put_back()
        except (OSError, SdsAgentError) as error:
            raise self._not_written(error) from error

    def _write(self, anchors: StoredAnchors) -> None:
        try:
            self._check()
            own_directory(self._file.path.parent, 0o700)
            self._file.write(self._encode(anchors))
        except (OSError, SdsAgentError) as error:
            raise self._not_written(error) from error

    def _not_written(self, error: Exception) -> AnchorsFileError:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return AnchorsFileError(f"cannot write the anchors to {self._file.path}: {reason}")

    def _encode(self, anchors: StoredAnchors) -> bytes:
        needed = [
            _WrittenAnchor(n.authority, n.until.timestamp(), write_pem([n.anchor]).decode()) for n in anchors.needed
        ]
        advertised = [
            _WrittenAdvertised(
                a.authority, self._kinds.get(a.authority, ""), a.since.timestamp(), write_pem(a.anchors).decode()
            )
            for a in anchors.advertised
        ]
        federated = [
            _WrittenFederated(
                f.trust_domain, f.authority, self._kinds.get(f.authority, ""), write_pem(f.anchors).decode()
            )
            for f in anchors.federated
        ]
        return msgspec.json.encode(_Written(needed, advertised, FORMAT, federated))

    def _decode(self, content: bytes) -> StoredAnchors:
        read = msgspec.json.decode(content, type=_Written | list[_WrittenAnchor])
        written = read if isinstance(read, _Written) else _Written(read, [])
        return StoredAnchors(
            tuple(_needed(each) for each in written.needed),
            tuple(_advertised(each) for each in written.advertised if self._kinds.get(each.authority) == each.kind),
            tuple(_federated(each) for each in written.federated if self._kinds.get(each.authority) == each.kind),
        )


def _needed(entry: _WrittenAnchor) -> NeededAnchor:
    (anchor,) = read_pem(entry.anchor_pem.encode())
    return NeededAnchor(
        entry.authority, anchor, min(datetime.fromtimestamp(entry.until, UTC), anchor.not_valid_after_utc)
    )


def _advertised(entry: _WrittenAdvertised) -> AdvertisedAnchors:
    since = datetime.fromtimestamp(entry.since, UTC)
    return AdvertisedAnchors(entry.authority, read_pem(entry.anchors_pem.encode()), since)


def _federated(entry: _WrittenFederated) -> FederatedAnchors:
    return FederatedAnchors(entry.trust_domain, entry.authority, read_pem(entry.anchors_pem.encode()))
