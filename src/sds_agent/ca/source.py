"""What the CA server signs with: a root of its own, or a directory that its operator changes while it serves.

What signs is `signing`'s. Added here is what concerns callers: the revocation lists in force, the anchors that their
certificates may chain to, and a warning where a change shuts some of them out.
"""

import logging
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from msgspec import structs

from sds_agent import log
from sds_agent.ca.anchors import anchors_of
from sds_agent.ca.lists import ListsInForce, Note, Notice, number_of
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

CHECK_EVERY = 1.0
"""Seconds between two checks for a change. A request must not wait for a disk, so none is checked for by requests."""
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
    """What signs, always at hand, and a loop that keeps it up to date."""

    def current(self) -> SigningSet:
        """What signs now."""
        ...

    async def follow(self) -> None:
        """Keep `current` up to date until cancelled."""
        ...


class SelfSignedSource:
    """A root of our own, which renews itself. Made by `open`."""

    def __init__(self, ca: SelfSignedCa, signing: SigningSet, clock: Clock) -> None:
        self._ca = ca
        self._signing = signing
        self._clock = clock
        self._not_renewed = log.LogOnChange(LOG, "signer_not_renewed")

    @classmethod
    async def open(cls, ca: SelfSignedCa, clock: Clock) -> "SelfSignedSource":
        """A source on that CA. Raises ConfigurationError when no root is valid and none can be made."""
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
        """Ask the CA every CHECK_EVERY seconds, which renews its root when that is due. Failures are logged once."""
        while True:
            await self._clock.sleep(CHECK_EVERY)
            try:
                signing = await self._ca.signing()
            except CaUnavailableError as error:
                self._not_renewed.report(str(error))
            else:
                self._not_renewed.resolved()
                if (signing.signer, signing.roots) != (self._signing.signer, self._signing.roots):
                    self._signing = signing


class PluggedSource:
    """A directory in Istio's `cacerts` layout, read again whenever its content changes. Made by `open`.

    A new signer signs at once, unlike an agent's: the server does not know its callers' peers, so nothing tells it when
    these trust a new root. Every answer holds all roots, and an operator who changes the root keeps both in
    `root-cert.pem` until all have renewed; `callers_left_behind` warns where the old one is missing.
    """

    def __init__(self, directory: PluggedDirectory, signing: SigningSet, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        self._signing = signing
        self._lists = ListsInForce(signing.crls)
        self._overdue: tuple[RevocationList, ...] = ()
        self._left_out = log.LogOnChange(LOG, "anchors_left_out")
        self._report_signer()

    @classmethod
    async def open(
        cls, directory: Path, *, trust_domain: str, passphrase_file: Path | None, clock: Clock
    ) -> "PluggedSource":
        """Read the directory for the first time. Raises ProblemsError with everything that is wrong there."""
        events = Events(refused="signer_not_taken", unread="signer_not_read")
        plugged = PluggedDirectory(directory, trust_domain, passphrase_file, events)
        with within("signer.cacerts"):
            return cls(plugged, await plugged.first(clock.now()), clock)

    def current(self) -> SigningSet:
        """The CA of the last content that was good, with every revocation list in force."""
        return self._signing

    async def follow(self) -> None:
        """Read the directory every CHECK_EVERY seconds. What is wrong is logged once, and the old CA goes on."""
        while True:
            await self._clock.sleep(CHECK_EVERY)
            read = await self._directory.read_again(self._clock.now())
            if read is not None:
                before = self._signing
                await self._take(read)
                self._warn_of_left_behind(before)
            self._drop_lists()
            self._report_overdue()

    async def _take(self, read: SigningSet) -> None:
        """Sign with what was read, and go on counting the lists that disappeared with it."""
        before = self._signing
        known = unique((*before.roots, *before.intermediates, *read.roots, *read.intermediates))
        arguments = (read.crls, known, self._passed())
        try:
            self._lists, notes = await in_thread(self._lists.with_found, *arguments)  # long lists take seconds
        except NoThreadError:  # the directory returns a content only once
            self._lists, notes = self._lists.with_found(*arguments)
        self._signing = structs.replace(read, crls=self._lists.lists)
        self._report_signer()
        _report_lists(notes)

    def _drop_lists(self) -> None:
        """Drop the lists that disappeared long enough ago."""
        self._lists, notes = self._lists.at(self._passed())
        if notes:
            self._signing = structs.replace(self._signing, crls=self._lists.lists)
            _report_lists(notes)
            self._report_left_out()

    def _passed(self) -> timedelta:
        return timedelta(seconds=self._clock.passed())

    def _report_signer(self) -> None:
        certificate = self._signing.signer.certificate
        log.event(
            LOG,
            "signer",
            serial=serial_hex(certificate),
            not_after=certificate.not_valid_after_utc,
            roots=len(self._signing.roots),
            revocation_lists=len(self._signing.crls),
        )
        self._report_left_out()
        self._report_overdue()

    def _report_left_out(self) -> None:
        """Log which roots are no anchors for callers, once for each set of them."""
        self._left_out.report(
            anchors_of(self._signing).left_out,
            effect="no caller's certificate is taken because of them; callers still get them as roots",
            fix="take them out of root-cert.pem",
        )

    def _warn_of_left_behind(self, before: SigningSet) -> None:
        """A root exchanged in one step shuts out machines that joined by a token: log it while it can be fixed."""
        former, roots, now = before.signer.certificate, self._signing.roots, self._clock.now()
        if former not in roots and not has_path(former, before.intermediates, roots, now, envoys=False):
            log.event(
                LOG,
                "callers_left_behind",
                level=logging.ERROR,
                signer=serial_hex(former),
                effect="callers whose certificates it signed are refused, until they come with a new token",
                fix="unless that is meant, put its root into root-cert.pem beside the new one until they have renewed",
            )

    def _report_overdue(self) -> None:
        """Log each list whose nextUpdate has passed, once."""
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


def _report_lists(notes: Iterable[Note]) -> None:
    for note in notes:
        log.event(
            LOG,
            note.notice.value,
            level=logging.ERROR,
            issuer=describe_name(note.crl.issuer),
            **_described("held", note.crl),
            **({} if note.found is None else _described("found", note.found)),
            effect=_EFFECTS[note.notice],
            fix=_FIXES.get(note.notice),
        )


def _described(which: str, crl: RevocationList) -> Mapping[str, log.Value]:
    """The fields that distinguish a list from others of its issuer."""
    return {f"{which}_number": number_of(crl), f"{which}_last_update": crl.last_update_utc}
