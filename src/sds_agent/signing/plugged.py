"""A plugged-in CA as an agent uses it: new roots go to the Envoys first, and what depends on them is signed later.

The directory is read again for every question. Its content becomes the CA only when it is whole and its pieces match;
otherwise the CA that was read before goes on signing, and the log says once what is wrong. A signer with other roots
than its predecessor signs only after these have been anchors for a while, and until then the old roots are anchors
beside them. Revocation lists play no part, since an agent checks no caller.
"""

import asyncio
import logging
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from msgspec import Struct, structs

from sds_agent import log
from sds_agent.clock import Clock
from sds_agent.pki.certificates import serial_hex, unique
from sds_agent.signing.directory import Events, PluggedDirectory
from sds_agent.signing.signing_set import SigningSet

LOG = logging.getLogger(__name__)

SETTLE = timedelta(seconds=30)
"""How long new roots are anchors before a leaf depends on them: an Envoy whose stream broke has the bundle again within
30 s, the longest pause between its attempts to connect."""


class Handover(Struct, frozen=True):
    """The CA that signs, and the one that follows it, if any, with the time since when its roots are anchors.

    That is a time of `Clock.passed`: by a wall clock that was set ahead the CA that follows would sign too early.
    """

    current: SigningSet
    following: SigningSet | None = None
    since: timedelta | None = None

    def with_read(self, read: SigningSet, passed: timedelta) -> "Handover":
        """What was just read, at the time `passed`, follows in place of any other."""
        return Handover(self.current, read, passed)

    def at(self, now: datetime, passed: timedelta) -> "Handover":
        """The CA that follows signs, once its roots have settled at the time `passed` or the old signer has expired.

        With the same roots it signs at once. Where some are gone it waits too: a bundle that is being written holds
        only the first of its certificates for a moment.
        """
        if self.following is None or self.since is None:
            return self
        expired = now > self.current.signer.certificate.not_valid_after_utc
        if expired or passed - self.since >= SETTLE or set(self.following.roots) == set(self.current.roots):
            return Handover(self.following)
        return self

    @property
    def roots(self) -> tuple[x509.Certificate, ...]:
        """The anchors: the roots of the CA that signs, and of the one that follows."""
        return unique((*self.current.roots, *(self.following.roots if self.following else ())))


class PluggedCa:
    """The CA in a directory. Made by `open`."""

    def __init__(self, directory: PluggedDirectory, signing: SigningSet, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        self._handover = Handover(signing)
        self._reading = asyncio.Lock()

    @classmethod
    async def open(
        cls, directory: Path, *, trust_domain: str, passphrase_file: Path | None, clock: Clock
    ) -> "PluggedCa":
        """Read the directory for the first time. Raises ConfigurationError with everything that is wrong with it."""
        events = Events(refused="ca_refused", unread="ca_not_read")
        plugged = PluggedDirectory(directory, trust_domain, passphrase_file, events, lists=False)
        return cls(plugged, await plugged.first(clock.now()), clock)

    async def signing(self) -> SigningSet:
        """The CA that signs now. Its roots are all anchors, those of the CA that follows among them."""
        async with self._reading:
            read = await self._directory.read_again(self._clock.now())
            passed, before = timedelta(seconds=self._clock.passed()), self._handover
            after = (before if read is None else before.with_read(read, passed)).at(self._clock.now(), passed)
            self._handover = after
            self._report(read, before, after)
            return structs.replace(after.current, roots=after.roots)

    def _report(self, read: SigningSet | None, before: Handover, after: Handover) -> None:
        directory = str(self._directory.path)
        if read is not None:
            log.event(
                LOG,
                "ca_read",
                directory=directory,
                serial=serial_hex(read.signer.certificate),
                not_after=read.signer.certificate.not_valid_after_utc,
                roots=len(read.roots),
                signs_in_seconds=None if after.following is None else SETTLE,
            )
        serial = serial_hex(after.current.signer.certificate)
        if serial != serial_hex(before.current.signer.certificate):
            log.event(LOG, "ca_signs", directory=directory, serial=serial)
