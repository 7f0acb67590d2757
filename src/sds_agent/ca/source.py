"""Where the CA's signer comes from, and how it follows what the operator changes."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from msgspec import structs

from sds_agent import log
from sds_agent.ca.anchors import anchors_of
from sds_agent.ca.lists import Held, Note, Notice, number_of
from sds_agent.clock import Clock
from sds_agent.errors import ConfigurationError, within
from sds_agent.pki.certificates import describe_name, serial_hex, unique
from sds_agent.pki.validation.path import has_path
from sds_agent.pki.validation.revocation import RevocationList, overdue
from sds_agent.signing.directory import Events, PluggedDirectory
from sds_agent.signing.self_signed import SelfSignedCa
from sds_agent.signing.signing_set import CaUnavailableError, SigningSet
from sds_agent.tasks import NoThreadError, in_thread

LOG = logging.getLogger(__name__)

LOOK = 1.0
"""Seconds between two looks at what may have changed."""
_EFFECTS = {
    Notice.GONE: "what it lists stays revoked for an hour, or until this process ends",
    Notice.OLDER: "the newer list goes on counting in its place, for as long as this process runs",
    Notice.DROPPED: "what it lists is no longer revoked",
}
_FIXES = {
    Notice.GONE: "put it back into ca-crl.pem, unless it was taken out because all that it lists has expired",
    Notice.OLDER: "put the newest list of that CA into ca-crl.pem",
}


class Source(Protocol):
    """A signing set that is always there and may change."""

    def current(self) -> SigningSet:
        """What signs now."""
        ...

    async def follow(self) -> None:
        """Keep `current` current, until cancelled."""
        ...


class SelfSignedSource:
    """A root of our own, which renews itself."""

    def __init__(self, ca: SelfSignedCa, signing: SigningSet, clock: Clock) -> None:
        self._ca = ca
        self._signing = signing
        self._clock = clock
        self._trouble = log.LogOnChange(LOG, "signer_not_renewed")

    @classmethod
    async def open(cls, ca: SelfSignedCa, clock: Clock) -> "SelfSignedSource":
        """A source on that CA. Raises ConfigurationError when there is no root and none can be made."""
        try:
            return cls(ca, await ca.signing(), clock)
        except CaUnavailableError as error:
            raise ConfigurationError(f"signer.self_signed: {error}") from error

    def current(self) -> SigningSet:
        """The root that signs now, and every root to trust."""
        return self._signing

    def put_back(self) -> Path | None:
        """Write the file with the roots again if it is gone, as `SelfSignedCa.put_back` does."""
        return self._ca.put_back()

    async def follow(self) -> None:
        """Look every LOOK seconds whether another root's time has come; what keeps it from coming is logged once."""
        while True:
            await self._clock.sleep(LOOK)
            try:
                signing = await self._ca.signing()
            except CaUnavailableError as error:
                self._trouble.report(str(error))
            else:
                self._trouble.resolved()
                if (signing.signer, signing.roots) != (self._signing.signer, self._signing.roots):
                    self._signing = signing


class PluggedSource:
    """A directory in Istio's cacerts layout, read again whenever its content is another.

    A new signer signs at once, though its roots are new too: every answer holds them, so whoever gets a leaf gets the
    roots that it depends on.
    """

    def __init__(self, directory: PluggedDirectory, signing: SigningSet, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        self._overdue: tuple[RevocationList, ...] = ()
        self._left_out: tuple[str, ...] = ()
        self._signing = signing
        self._held = Held(signing.crls)
        self._tell()

    @classmethod
    async def open(
        cls, directory: Path, *, trust_domain: str, passphrase_file: Path | None, clock: Clock
    ) -> "PluggedSource":
        """Read the directory for the first time. Raises ConfigurationError with everything that is wrong there."""
        events = Events(refused="signer_not_taken", unread="signer_not_looked_at")
        plugged = PluggedDirectory(directory, trust_domain, passphrase_file, events)
        with within("signer.cacerts"):
            return cls(plugged, await plugged.first(clock.now()), clock)

    def current(self) -> SigningSet:
        """What the directory held when it was last good, with every revocation list that counts."""
        return self._signing

    async def follow(self) -> None:
        """Look every LOOK seconds whether the files are others; what is wrong is logged once, and the old goes on."""
        while True:
            await self._clock.sleep(LOOK)
            read = await self._directory.read_again(self._clock.now())
            if read is not None:
                before = self._signing
                await self._take(read)
                self._look_for_left_behind(before)
            self._settle()
            self._look_for_overdue()

    async def _take(self, signing: SigningSet) -> None:
        before = self._signing
        known = unique((*before.roots, *before.intermediates, *signing.roots, *signing.intermediates))
        arguments = (signing.crls, known, self._clock.now())
        try:
            self._held, notes = await in_thread(self._held.with_found, *arguments)  # of long lists it takes seconds
        except NoThreadError:  # the directory gives this set only once
            self._held, notes = self._held.with_found(*arguments)
        self._signing = structs.replace(signing, crls=self._held.lists)
        self._tell()
        self._note(notes)

    def _settle(self) -> None:
        """Drop the lists that have been gone for long enough."""
        self._held, notes = self._held.at(self._clock.now())
        if notes:
            self._signing = structs.replace(self._signing, crls=self._held.lists)
            self._note(notes)
            self._look_for_left_out()

    def _note(self, notes: Iterable[Note]) -> None:
        for note in notes:
            log.event(
                LOG,
                note.notice.value,
                level=logging.ERROR,
                issuer=describe_name(note.held.issuer),
                **_described("held", note.held),
                **({} if note.found is None else _described("found", note.found)),
                effect=_EFFECTS[note.notice],
                fix=_FIXES.get(note.notice),
            )

    def _tell(self) -> None:
        signing = self._signing
        certificate = signing.signer.certificate
        log.event(
            LOG,
            "signer",
            serial=serial_hex(certificate),
            not_after=certificate.not_valid_after_utc,
            roots=len(signing.roots),
            revocation_lists=len(signing.crls),
        )
        self._look_for_left_out()
        self._look_for_overdue()

    def _look_for_left_out(self) -> None:
        """Say it once of each root that is no anchor for callers."""
        causes = anchors_of(self._signing).left_out
        if causes and causes != self._left_out:
            log.event(
                LOG,
                "anchors_left_out",
                level=logging.ERROR,
                causes=causes,
                effect="no caller's certificate is taken because of them; callers still get them as roots",
                fix="take them out of root-cert.pem",
            )
        self._left_out = causes

    def _look_for_left_behind(self, before: SigningSet) -> None:
        """A root exchanged at one stroke shuts out machines that joined by a token: say so while it can be fixed."""
        former, roots, now = before.signer.certificate, self._signing.roots, self._clock.now()
        if former not in roots and not has_path(former, before.intermediates, roots, now, envoys=False):
            log.event(
                LOG,
                "callers_left_behind",
                level=logging.ERROR,
                signer=serial_hex(former),
                effect="callers whose certificates it signed are turned away, and come back with a new token alone",
                fix="unless that is meant, put its root into root-cert.pem beside the new one until they have renewed",
            )

    def _look_for_overdue(self) -> None:
        """Say it once of each revocation list."""
        late = overdue(self._signing.crls, self._clock.now())
        for crl in late:
            if crl not in self._overdue:
                log.event(
                    LOG,
                    "revocation_list_overdue",
                    level=logging.ERROR,
                    issuer=describe_name(crl.issuer),
                    next_update=crl.next_update_utc,
                    effect="what it lists stays revoked, and what was revoked since then is not known here",
                )
        self._overdue = late


def _described(which: str, crl: RevocationList) -> Mapping[str, log.Value]:
    """What distinguishes a list from others of its issuer."""
    return {f"{which}_number": number_of(crl), f"{which}_last_update": crl.last_update_utc}
