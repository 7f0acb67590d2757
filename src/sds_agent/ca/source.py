"""Where the CA's signer comes from, and how it follows what the operator changes."""

import logging
from pathlib import Path
from typing import Protocol

import anyio
import anyio.to_thread

from sds_agent import log
from sds_agent.authority.embedded import EmbeddedAuthority
from sds_agent.authority.protocol import AuthorityError
from sds_agent.clock import Clock
from sds_agent.errors import ConfigurationError
from sds_agent.pki.cacerts import FILES, CaFilesError, read_signing_set
from sds_agent.pki.certificates import serial_hex
from sds_agent.pki.signing import SigningSet

LOG = logging.getLogger(__name__)

LOOK = 1.0
"""Seconds between two looks at what may have changed."""
LARGEST_FILE = 4 << 20
"""Bytes. The largest revocation lists of a CA of this kind are far below."""


class Source(Protocol):
    """A signing set that is always there and may change."""

    def current(self) -> SigningSet:
        """What signs now."""
        ...

    async def follow(self) -> None:
        """Keep `current` current, until cancelled."""
        ...


class SelfSigned:
    """A root of our own, renewed in the last fifth of its life as the agent's embedded CA does it."""

    def __init__(self, authority: EmbeddedAuthority, signing: SigningSet, clock: Clock) -> None:
        self._authority = authority
        self._signing = signing
        self._clock = clock

    @classmethod
    async def open(cls, authority: EmbeddedAuthority, clock: Clock) -> "SelfSigned":
        """A source on that authority. Raises ConfigurationError when there is no root and none can be made."""
        try:
            return cls(authority, await authority.signing(), clock)
        except AuthorityError as error:
            raise ConfigurationError(f"signer.self_signed: {error}") from error

    def current(self) -> SigningSet:
        """The root that signs now, and every root to trust."""
        return self._signing

    async def follow(self) -> None:
        """Look every LOOK seconds whether another root's time has come."""
        while True:
            await self._clock.sleep(LOOK)
            try:
                signing = await self._authority.signing()
                if (signing.signer, signing.roots) != (self._signing.signer, self._signing.roots):
                    self._signing = signing
            except AuthorityError as error:
                log.event(LOG, "signer_not_renewed", level=logging.ERROR, cause=str(error))


class Plugged:
    """A directory in Istio's cacerts layout, read again whenever its content is another."""

    def __init__(self, directory: Path, trust_domain: str, passphrase_file: Path | None, clock: Clock) -> None:
        self._directory = directory
        self._trust_domain = trust_domain
        self._passphrase_file = passphrase_file
        self._clock = clock
        self._files: dict[str, bytes] = {}
        self._complaint = ""
        self._signing: SigningSet | None = None

    @classmethod
    async def open(cls, directory: Path, *, trust_domain: str, passphrase_file: Path | None, clock: Clock) -> "Plugged":
        """Read the directory for the first time. Raises ConfigurationError with everything that is wrong there."""
        source = cls(directory, trust_domain, passphrase_file, clock)
        try:
            files = await anyio.to_thread.run_sync(source._read)
            source._take(files)
        except CaFilesError as error:
            raise ConfigurationError(f"signer.cacerts: {directory} cannot be plugged in:\n{error}") from error
        except OSError as error:
            raise ConfigurationError(
                f"signer.cacerts: cannot read {error.filename or directory}: {error.strerror}; "
                "make it readable for the user that runs this"
            ) from error
        return source

    def current(self) -> SigningSet:
        """What the directory held when it was last good."""
        assert self._signing is not None, "made by open, which reads it"  # noqa: S101 - for the type checker
        return self._signing

    async def follow(self) -> None:
        """Look every LOOK seconds whether the files are others; what is wrong is told once, and the old goes on."""
        while True:
            await self._clock.sleep(LOOK)
            try:
                files = await anyio.to_thread.run_sync(self._read)
                if files == self._files or files != await anyio.to_thread.run_sync(self._read):
                    continue  # nothing new, or somebody is writing just now
                self._take(files)
            except CaFilesError as error:
                self._complain(str(error))
            except OSError as error:
                self._complain(f"cannot read {error.filename}: {error.strerror}")

    def _complain(self, cause: str) -> None:
        """Once for each cause: the directory is read on, since time alone can mend it too."""
        if cause != self._complaint:
            log.event(LOG, "signer_not_taken", level=logging.ERROR, directory=str(self._directory), cause=cause)
        self._complaint = cause

    def _read(self) -> dict[str, bytes]:
        """The files that count, by name. Raises OSError."""
        if not self._directory.is_dir():
            raise NotADirectoryError(20, "there is no such directory", str(self._directory))
        return {name: content for name in FILES if (content := _content(self._directory / name)) is not None}

    def _take(self, files: dict[str, bytes]) -> None:
        passphrase = None if self._passphrase_file is None else self._passphrase_file.read_bytes().rstrip(b"\r\n")
        self._signing = read_signing_set(
            files, self._clock.now(), passphrase=passphrase, trust_domain=self._trust_domain
        )
        self._files, self._complaint = files, ""
        certificate = self._signing.signer.certificate
        log.event(LOG, "signer", serial=serial_hex(certificate), not_after=certificate.not_valid_after_utc)


def _content(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_FILE)
    except FileNotFoundError:
        return None
