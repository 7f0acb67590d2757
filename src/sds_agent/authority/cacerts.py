"""The authority `cacerts`: signs in process with a plugged-in CA that is kept in a directory.

The directory is looked at before every signature and every few seconds. What it holds becomes the CA only when it is
whole and its pieces match; otherwise the CA that was read before goes on signing, and the log says once what is wrong.
New roots are told at once. A signer that needs them signs only when they have been told for a while, and until then the
old signer's roots are told with them. Its revocation lists play no part: the agent checks no caller.
"""

import logging
from datetime import datetime, timedelta
from pathlib import Path

import anyio
from cryptography import x509
from msgspec import Struct

from sds_agent import log
from sds_agent.authority.protocol import AuthorityError, ErrorKind, Issuance, IssueRequest
from sds_agent.authority.request import proven_key
from sds_agent.clock import Clock
from sds_agent.errors import ConfigurationError
from sds_agent.pki.certificates import serial_hex, unique, write_pem
from sds_agent.signing.directory import PluggedDirectory
from sds_agent.signing.signer import SignerError
from sds_agent.signing.signing_set import SigningSet
from sds_agent.tasks import NoThreadError

LOG = logging.getLogger(__name__)

SETTLE = timedelta(seconds=30)
"""How long new roots are told before a leaf depends on them: an Envoy whose stream broke has the bundle again within
30 s, the longest pause between its attempts to connect."""
REFRESH = timedelta(seconds=5)
"""How often the directory is looked at while nothing is issued."""


class Plugged(Struct, frozen=True):
    """The CA that signs, and the one that follows it, if any, with the time since when its roots are told."""

    current: SigningSet
    following: SigningSet | None = None
    since: datetime | None = None

    def with_read(self, read: SigningSet, now: datetime) -> "Plugged":
        """What was just read follows."""
        return Plugged(self.current, read, now)

    def at(self, now: datetime) -> "Plugged":
        """With the one that follows in its place, once its roots have settled or the old signer has expired.

        Where the roots are the same it takes the place at once. Where some are gone it waits too: a bundle that is
        being written holds only the first of its certificates for a moment.
        """
        if self.following is None or self.since is None:
            return self
        expired = now > self.current.signer.certificate.not_valid_after_utc
        if expired or now - self.since >= SETTLE or set(self.following.roots) == set(self.current.roots):
            return Plugged(self.following)
        # a time that lies ahead was told by a clock that has been set back since
        return Plugged(self.current, self.following, min(self.since, now))

    @property
    def roots(self) -> tuple[x509.Certificate, ...]:
        """What to trust now: the roots of the CA that signs, and of the one that follows."""
        return unique((*self.current.roots, *(self.following.roots if self.following else ())))


class CacertsAuthority:
    """Signs with what the directory holds. Made by `open`."""

    refresh_every = REFRESH

    def __init__(self, directory: PluggedDirectory, signing: SigningSet, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        self._plugged = Plugged(signing)
        self._looking = anyio.Lock()
        self._trouble = log.LogOnChange(LOG, "ca_not_looked_at")

    @classmethod
    async def open(
        cls, directory: Path, *, trust_domain: str, passphrase_file: Path | None, clock: Clock
    ) -> "CacertsAuthority":
        """The CA in `directory`. Raises ConfigurationError with everything that is wrong with it."""
        plugged = PluggedDirectory(directory, trust_domain, passphrase_file, lists=False)
        return cls(plugged, await plugged.first(clock.now()), clock)

    async def issue(self, request: IssueRequest) -> Issuance:
        """Sign at once. Raises AuthorityError when the signer has expired, or for a CSR or a TTL that cannot be."""
        plugged = await self._look()
        public_key = proven_key(request.csr_pem)
        try:
            chain = plugged.current.issue(public_key, str(request.identity), self._clock.now(), request.ttl)
        except SignerError as error:
            raise AuthorityError(ErrorKind.DENIED, f"the CA in {self._directory.path} cannot sign: {error}") from error
        return Issuance(write_pem(chain), write_pem(plugged.roots))

    async def anchors(self) -> bytes:
        """The roots to trust now, in PEM."""
        return write_pem((await self._look()).roots)

    async def _look(self) -> Plugged:
        """The CA as it is now. Who gets it tells its roots."""
        async with self._looking:
            try:
                changed = await self._directory.changed(self._clock.now())
            except ConfigurationError as error:
                self._refused(error)
                changed = None
            except NoThreadError as error:
                self._trouble.report(str(error), directory=str(self._directory.path))
                changed = None
            else:
                self._trouble.resolved()
            now = self._clock.now()
            before = self._plugged if changed is None else self._plugged.with_read(changed, now)
            self._plugged = before.at(now)
            self._note(changed, before, self._plugged)
            return self._plugged

    def _refused(self, error: ConfigurationError) -> None:
        if self._directory.is_news(error):
            log.event(
                LOG,
                "ca_refused",
                level=logging.ERROR,
                directory=str(self._directory.path),
                cause=str(error).replace("\n", " | "),
                serving="the CA that was read before goes on signing",
            )

    def _note(self, changed: SigningSet | None, before: Plugged, now: Plugged) -> None:
        if changed is not None:
            log.event(
                LOG,
                "ca_read",
                directory=str(self._directory.path),
                serial=serial_hex(changed.signer.certificate),
                not_after=changed.signer.certificate.not_valid_after_utc,
                roots=len(changed.roots),
                signs_in_seconds=None if now.following is None else SETTLE,
            )
        serial = serial_hex(now.current.signer.certificate)
        if serial != serial_hex(before.current.signer.certificate):
            log.event(LOG, "ca_signs", directory=str(self._directory.path), serial=serial)
