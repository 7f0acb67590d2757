"""A self-signed root in a directory of its own, which signs leaves itself and renews itself.

The root is renewed in the last fifth of its life. A new root is an anchor at once but signs only after a while, when
every Envoy has had the time to load it; until then the old one goes on signing. The agent's embedded CA is one, and a
CA server may be.
"""

import asyncio
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from msgspec import Struct

from sds_agent import log
from sds_agent.clock import Clock
from sds_agent.directories import UntrustedDirectoryError, check_directory, own_directory
from sds_agent.errors import ConfigurationError, Problem, ProblemsError, SdsAgentError, within
from sds_agent.files import ForeignFileError, check_writable, fix_of, remove_unfinished
from sds_agent.ownfile import OwnFile, ReplacedError
from sds_agent.pki.certificates import CertificateError, describe, read_pem, serial_hex, write_pem
from sds_agent.pki.keys import KeyType, PrivateKey, generate, to_pkcs8_pem
from sds_agent.signing.signer import Signer, SignerError, make_root, root_name
from sds_agent.signing.signing_set import CaUnavailableError, SigningSet
from sds_agent.tasks import NoThreadError, in_thread

LOG = logging.getLogger(__name__)

RENEWAL_SHARE = 0.2
"""A root is renewed when this share of its lifetime is left."""
SETTLE_SHARE = 0.05
LONGEST_SETTLE = timedelta(hours=1)
"""A new root signs only after `SETTLE_SHARE` of its lifetime, at most this long."""
RETRY_SHARE = 0.01
LONGEST_RETRY = timedelta(minutes=5)
"""After a new root could not be made or stored, `RETRY_SHARE` of its lifetime, at most this long, passes until the next
attempt while an old one is valid: each request would otherwise pay for a key, and write a line to the log.
"""
LARGEST = 1 << 20
"""Bytes of the file with the roots, which are two or three at one time, and those that may have expired."""
MOST_EXPIRED = 8
"""Roots that stay in the file though a clock says that all have expired. A machine that is often off for longer than a
root lives would gather them until the file is too large to be read.
"""
ROOTS = "roots.pem"


class Roots(Struct, frozen=True, dict=True):
    """The roots in the file, oldest first, and what follows from them at a moment. Each lives for `lifetime`."""

    signers: tuple[Signer, ...]
    lifetime: timedelta

    @cached_property
    def _renewed_for(self) -> timedelta:
        """What is left of a root when it is renewed. It is asked for with each certificate, as is the next."""
        return self.lifetime * RENEWAL_SHARE

    @cached_property
    def _settle(self) -> timedelta:
        """For how long a new root is an anchor before it signs."""
        return min(self.lifetime * SETTLE_SHARE, LONGEST_SETTLE)

    def due(self, now: datetime) -> bool:
        """Whether it is time for a new root.

        One that begins later was made while the clock was ahead, and helps nobody until then. Where none has begun, it
        is now that the clock is wrong.
        """
        if not self.signers:
            return True
        begun = _begun(self.signers, now)
        return bool(begun) and begun[-1].ends - now <= self._renewed_for

    def with_new(self, signer: Signer, now: datetime) -> "Roots":
        """These roots and a new one, without those that have expired.

        If all have expired, the last MOST_EXPIRED stay nevertheless: the clock that says so may be wrong, and a root
        that is dropped from the file is lost.
        """
        return Roots((*(self.valid(now) or self.signers[-MOST_EXPIRED:]), signer), self.lifetime)

    def valid(self, now: datetime) -> tuple[Signer, ...]:
        """The roots that have not expired."""
        return tuple([signer for signer in self.signers if now < signer.ends])

    def _signing(self, unexpired: tuple[Signer, ...], now: datetime) -> Signer:
        """The newest root that has been an anchor for long enough, or else the oldest that is valid."""
        valid = unexpired or self.signers
        settled = [signer for signer in valid if now >= signer.ends - self.lifetime + self._settle]
        return settled[-1] if settled else (_begun(valid, now) or valid)[0]

    def signing_set(self, now: datetime) -> SigningSet:
        """What signs, and all roots that have not expired: for Envoy's statistics an expired one is an alarm."""
        valid = self.valid(now)
        return SigningSet(self._signing(valid, now), (), tuple([signer.certificate for signer in valid]))


class SelfSignedCa:
    """The CA of one directory. Made by `open`."""

    def __init__(self, file: OwnFile, trust_domain: str, key_type: KeyType, clock: Clock, roots: Roots) -> None:
        self._file = file
        self._trust_domain = trust_domain
        self._key_type = key_type
        self._clock = clock
        self._roots = roots
        self._renewing = asyncio.Lock()
        self._failed: datetime | None = None
        self._asked = False

    @classmethod
    async def open(
        cls,
        directory: Path,
        *,
        trust_domain: str,
        key_type: KeyType,
        lifetime: timedelta,
        clock: Clock,
        setting: str,
    ) -> "SelfSignedCa":
        """The CA in `directory`, made there (0700, the file 0600) when there is none.

        Raises ConfigurationError, which names `setting`, when the directory or a file in it cannot be used; both stay
        as they are.
        """
        file = OwnFile(directory / ROOTS, LARGEST)
        with _explained(file.path, setting):
            own_directory(directory, 0o700)
            remove_unfinished(directory, re.escape(ROOTS))
            signers = _load(file)
        ca = cls(file, trust_domain, key_type, clock, Roots(signers, lifetime))
        if not ca._roots.valid(clock.now()):  # else in use: an agent that reloads may have this CA open already
            try:
                await ca._renew_when_due()
            except CaUnavailableError as error:
                raise ConfigurationError(f"{setting}: {error}") from error
        ca._warn_of_another_domain()
        return ca

    async def signing(self) -> SigningSet:
        """What signs now, and every root that is valid.

        Raises CaUnavailableError when no root is valid and none can be made.
        """
        if not self._asked:
            self._asked = True
            self._take_newer()
        now = self._clock.now()
        if self._roots.due(now):
            await self._renew_when_due()
            now = self._clock.now()
        return self._roots.signing_set(now)

    def put_back(self) -> Path | None:
        """Write the file with the roots again if it is gone; returns its path if it was.

        Raises ConfigurationError when it cannot be written, and when it holds other roots.
        """
        with self._storing("its roots"):
            return None if self._file.is_there() else self._file.put_back()

    def _take_newer(self) -> None:
        """Take the roots that came into the file beside those that this CA was opened with, before it signs. An agent
        that reloads has the CA of the former settings in use until then, which may renew its root.
        """
        try:
            self._file.is_there()
        except ReplacedError:
            file = OwnFile(self._file.path, LARGEST)
            with suppress(OSError, SdsAgentError):  # what is wrong is said when the root is to be renewed
                signers = _load(file)
                if self._roots.signers[-1].certificate in [each.certificate for each in signers]:
                    self._file, self._roots = file, Roots(signers, self._roots.lifetime)
        except (OSError, SdsAgentError):
            pass  # likewise

    @contextmanager
    def _storing(self, what: str) -> Iterator[None]:
        """Translate what keeps `what` from being stored. Raises ConfigurationError."""
        try:
            yield
        except ReplacedError as error:
            raise ConfigurationError(
                f"{self._file.path} holds other roots than those that this process signs with; stop it before its "
                "state is replaced, and bring back the old state or give every Envoy the new root"
            ) from error
        except (OSError, SdsAgentError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigurationError(
                f"the self-signed CA cannot store {what} in {self._file.path}: {reason}"
            ) from error

    async def _renew_when_due(self) -> None:
        async with self._renewing:
            now = self._clock.now()
            if not self._roots.due(now) or self._failed_lately(now):
                return
            try:
                kind = self._key_type
                key = await in_thread(generate, kind) if kind.slow else generate(kind)
            except NoThreadError as error:
                self._not_renewed(f"the self-signed CA cannot make a key for its new root: {error}", now)
                return
            signer = make_root(key, self._trust_domain, now, self._roots.lifetime)
            roots = self._roots.with_new(signer, now)
            try:
                with self._storing("its new root"):
                    self._file.renew(b"".join(_to_pem(s) for s in roots.signers))
            except ConfigurationError as error:
                self._not_renewed(str(error), now)
                return
            self._roots = roots
        serial = serial_hex(signer.certificate)
        log.event(LOG, "root_created", file=str(self._file.path), serial=serial, not_after=signer.ends)

    def _warn_of_another_domain(self) -> None:
        """Without name constraints a root vouches for every trust domain, though its name is that of one."""
        root = self._roots.signers[-1].certificate
        if root.subject == root_name(self._trust_domain):
            return
        log.event(
            LOG,
            "root_of_another_trust_domain",
            level=logging.WARNING,
            file=str(self._file.path),
            cause=(
                f"the root {describe(root)} was made for another trust domain than {self._trust_domain}, and it goes "
                "on signing: peers that trust it for one domain trust it for the other too. To have a new root made, "
                f"stop this process and remove {self._file.path}; every Envoy then has to get the new one"
            ),
        )

    def _failed_lately(self, now: datetime) -> bool:
        """Whether a new root could not be made or stored a moment ago, while an old one is valid."""
        if self._failed is None or not self._roots.valid(now):
            return False
        return timedelta() <= now - self._failed < min(self._roots.lifetime * RETRY_SHARE, LONGEST_RETRY)

    def _not_renewed(self, cause: str, now: datetime) -> None:
        """Go on with the old root: a fifth of its life is left, time enough to fix a full disk."""
        valid = self._roots.valid(now)
        if not valid:
            raise CaUnavailableError(cause)
        self._failed = now
        log.event(LOG, "root_not_renewed", level=logging.ERROR, cause=cause, not_after=valid[-1].ends)


def check(directory: Path, setting: str) -> None:
    """Raise what `SelfSignedCa.open` would raise for this directory; change nothing there."""
    file = OwnFile(directory / ROOTS, LARGEST)
    with _explained(file.path, setting):
        check_directory(directory)
        if not _load(file) and directory.is_dir():
            check_writable(directory, file.path)


@contextmanager
def _explained(file: Path, setting: str) -> Iterator[None]:
    """Say of what is wrong on the way to the file, and with it, where it is. Raises ConfigurationError."""
    try:
        with within(setting):
            yield
    except UntrustedDirectoryError as error:
        raise ConfigurationError(f"{setting}: {error}") from error
    except OSError as error:
        found, place = f"cannot be used by the self-signed CA: {error.strerror}", str(error.filename or file)
        raise ProblemsError(
            [Problem((setting, place), found, fix_of(error, "give it a directory of its own"))]
        ) from error


def _begun(signers: Iterable[Signer], now: datetime) -> list[Signer]:
    return [signer for signer in signers if signer.begins <= now]


def _to_pem(signer: Signer) -> bytes:
    return write_pem([signer.certificate]) + to_pkcs8_pem(signer.key)


def _load(own: OwnFile) -> tuple[Signer, ...]:
    """The roots in the file: a certificate and its key, one pair after another, oldest first."""
    file = own.path
    try:
        content, mode = own.read()
    except FileNotFoundError:
        return ()
    except ForeignFileError as error:
        raise _refused(
            file,
            f"should hold the self-signed CA's roots and {error}",
            "put its own file there, or remove this one and a new root is made",
        ) from error
    if mode & 0o077:
        raise _refused(
            file,
            "holds a CA's private key and other users may read or write it",
            f"if none of them has, run chmod 600 {file}, otherwise remove it and a new root is made",
        )
    marker = b"-----END PRIVATE KEY-----"
    pairs = [part + marker for part in content.split(marker) if part.strip()]
    try:
        signers = tuple(_read_pair(pair) for pair in pairs)
    except (CertificateError, SignerError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _damaged(file) from error
    if not signers:
        raise _damaged(file)
    return signers


def _read_pair(pem: bytes) -> Signer:
    (certificate,) = read_pem(pem)
    key = load_pem_private_key(pem[pem.index(b"-----BEGIN PRIVATE KEY-----") :], password=None)
    if not isinstance(key, PrivateKey):
        raise TypeError
    return Signer(certificate, key)


def _damaged(file: Path) -> ProblemsError:
    return _refused(
        file,
        "should hold the self-signed CA's roots, each with its key, and does not",
        "restore it from a copy, or remove it and a new root is made (every Envoy has to get the new one)",
    )


def _refused(file: Path, found: str, fix: str) -> ProblemsError:
    return ProblemsError([Problem((str(file),), found, fix)])
