"""Certificates that outlive the process: written at each issue, read when the agent starts again.

A restarted agent serves a cached certificate at once while it is valid, whether the CA answers or not, and renews with
it: a join token, with which the first was requested, is spent. The price is a private key on disk. An operator who does
not want to pay it says so, and the agent then removes what an earlier process cached. A cached certificate passes the
same checks as one that comes from the CA: the file is trusted no more than the wire.
"""

import asyncio
import hashlib
import logging
import os
import re
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from msgspec import structs

from sds_agent import log
from sds_agent.authority.protocol import AuthorityError, Issuance
from sds_agent.directories import own_directory
from sds_agent.errors import SdsAgentError
from sds_agent.files import ForeignFileError, remove_unfinished
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import Accepted, accept
from sds_agent.issuance.workload import Certificate, Workload, secret_of
from sds_agent.ownfile import OwnFile
from sds_agent.pki.certificates import unique, write_pem
from sds_agent.pki.keyfile import KeyFileError, read_private_key
from sds_agent.pki.keys import PrivateKey
from sds_agent.pki.validation.rules import Chain
from sds_agent.tasks import DISK_TIMEOUT, NoThreadError, TimeLimit, uninterrupted
from sds_agent.text import escaped
from sds_agent.values import Sensitive

LOG = logging.getLogger(__name__)

LARGEST = 1 << 20
"""Bytes. A chain, a key and a mesh's anchors take some kilobytes."""
LONGEST_REASON = 300
"""Characters of what is said about a damaged file."""
_NAME = r"[0-9a-f]{32}\.json"
_OTHERS = 0o007
"""The rights that others must not have. Kubernetes sets those of the group, on each file of a volume (fsGroup)."""


class CacheError(SdsAgentError):
    """A certificate cannot be cached, or a cached one cannot be used."""


class CachedCertificate(Sensitive, frozen=True):
    """A certificate as it was served, in PEM, its key as PKCS#8.

    `issued_at` is in seconds since the epoch; `authority` is the kind and the name of the CA that issued it.
    """

    spiffe_id: str
    issued_at: float
    chain_pem: str
    anchors_pem: str
    private_key_pem: str
    authority: str = ""

    @property
    def issuance(self) -> Issuance:
        """The certificate as if the CA had just answered with it."""
        return Issuance(self.chain_pem.encode(), self.anchors_pem.encode())

    @property
    def key(self) -> PrivateKey:
        """The private key. Raises CacheError."""
        try:
            return read_private_key(self.private_key_pem.encode())
        except KeyFileError as error:
            raise CacheError(f"the cached private key of {self.spiffe_id} is damaged: {error}") from error

    @property
    def issued(self) -> datetime:
        """When it was issued."""
        return datetime.fromtimestamp(self.issued_at, UTC)


class Restored(Sensitive, frozen=True):
    """A cached certificate that passed the checks again, its key, and when and by which CA it was issued."""

    accepted: Accepted
    key: PrivateKey
    issued_at: datetime
    authority: str


class CertificateCache:
    """One file for each identity in a directory (mode 0700, the files 0600)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, OwnFile] = {}

    def save(self, certificate: CachedCertificate) -> None:
        """Write it in place of the one before. Blocks for a write to disk. Raises CacheError."""
        try:
            own_directory(self._directory, 0o700)
            self._file(certificate.spiffe_id).write(msgspec.json.encode(certificate))
        except (OSError, SdsAgentError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise CacheError(
                f"cannot cache the certificate of {certificate.spiffe_id} in {self._directory}: {reason}"
            ) from error

    def load(self, identity: SpiffeId) -> CachedCertificate | None:
        """The identity's cached certificate, its content unchecked, or None if there is none.

        Raises CacheError for anything else in the place of the file.
        """
        own = self._file(str(identity))
        file = own.path
        try:
            cached = _read(own)
        except FileNotFoundError:
            return None
        except ForeignFileError as error:
            raise CacheError(f"{file} {error}; it is not used") from error
        except OSError as error:
            raise CacheError(f"cannot read {file}: {error.strerror}") from error
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            reason = escaped(str(error), LONGEST_REASON)
            raise CacheError(
                f"{file} is damaged ({reason}); it is not used, and replaced by the next certificate"
            ) from error
        if cached.spiffe_id != str(identity):
            raise CacheError(f"{file} is of another identity; it is not used, and replaced by the next certificate")
        return cached

    def put_back(self) -> Path | None:
        """Write again a file that is gone; returns the path of one that was. Raises CacheError."""
        try:
            return next((path for each in tuple(self._files.values()) if (path := each.put_back())), None)
        except (OSError, SdsAgentError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise CacheError(f"cannot cache certificates in {self._directory}: {reason}") from error

    def restore(self, identity: SpiffeId, now: datetime) -> Restored | None:
        """The identity's cached certificate, checked as if the CA had just sent it; None if there is none.

        Raises CacheError when there is one that cannot be used.
        """
        cached = self.load(identity)
        if cached is None:
            return None
        key = cached.key
        try:
            accepted = accept(cached.issuance, identity=identity, public_key=key.public_key(), anchors=(), now=now)
        except AuthorityError as error:
            raise CacheError(str(error)) from error
        # a time that is yet to come, as after a clock was set back, would put off the renewal
        return Restored(accepted, key, min(cached.issued, now), cached.authority)

    def _file(self, spiffe_id: str) -> OwnFile:
        name = f"{hashlib.sha256(spiffe_id.encode()).hexdigest()[:32]}.json"
        return self._files.setdefault(name, OwnFile(self._directory / name, LARGEST))


def _read(file: OwnFile) -> CachedCertificate:
    """The content of the file.

    Raises ForeignFileError, CacheError, OSError, and a decoder's errors for what is not a cached certificate.
    """
    data, mode = file.read()
    if mode & _OTHERS:
        raise CacheError(f"{file.path} may be read or written by others; it is not used")
    if len(data) > LARGEST:
        raise ValueError("it is larger than any certificate")
    cached = msgspec.json.decode(data, type=CachedCertificate)
    # these raise for numbers that are not a time, and for characters that no text may contain
    _ = cached.issued, cached.issuance, cached.private_key_pem.encode()
    return cached


class WorkloadCache:
    """The cache of one workload's certificate. A disk that does not answer delays neither the caller nor its end for
    longer than the timeout (seconds).

    Certificates are written one after another in a task beside the caller; of those that wait only the newest is.
    """

    def __init__(self, workload: Workload, cache: CertificateCache, *, timeout: float = DISK_TIMEOUT) -> None:
        self._workload = workload
        self._cache = cache
        self._disk = TimeLimit(timeout)
        self._cached: Certificate | None = None
        self._newest: Certificate | None = None
        self._writing: asyncio.Task[None] | None = None

    def restore(self, anchors: Chain, now: datetime) -> Certificate | None:
        """The certificate that an earlier process cached, or None; one that cannot be used is logged (`not_restored`).

        It is given the `anchors` known of the workload's CA beside those that were cached with it.
        """
        workload = self._workload
        try:
            restored = self._cache.restore(workload.identity, now)
        except CacheError as error:
            log.event(LOG, "not_restored", level=logging.WARNING, workload=workload.name, cause=str(error))
            return None
        if restored is None:
            return None
        # a certificate of another workload may be newer, with newer anchors: each needs its own until the CA is asked
        together = unique((*anchors, *restored.accepted.anchors))
        accepted, at = structs.replace(restored.accepted, anchors=together), restored.issued_at
        names = {ca: name for name, ca in workload.cas.items()}
        # a file of an older version of the agent does not name the CA
        foreign = restored.authority not in {"", *names}
        name = names.get(restored.authority, workload.authority)
        self._newest = Certificate("restored", accepted, secret_of(accepted, restored.key), at, at, name, foreign)
        self._cached = self._newest
        return self._cached

    def save(self, certificate: Certificate, tasks: asyncio.TaskGroup) -> None:
        """Begin to write it in a task of the group, unless it is written or being written already."""
        if certificate is self._newest:
            return
        self._newest = certificate
        if self._writing is None or self._writing.done():
            self._writing = tasks.create_task(self._write())

    def put_back(self) -> Path | None:
        """Write the file again if it is gone; returns its path if it was. Raises CacheError."""
        return self._cache.put_back()

    async def saved(self) -> None:
        """Return once every write has ended, with or without success, also when the caller is cancelled."""
        if self._writing is not None and not self._writing.done():
            await uninterrupted(self._written(self._writing))

    @staticmethod
    async def _written(writing: "asyncio.Task[None]") -> None:
        await asyncio.wait([writing])

    async def _write(self) -> None:
        while (certificate := self._newest) is not None and certificate is not self._cached:
            try:
                # finished even when the agent stops: a write that is cut off leaves a file to remove
                await uninterrupted(self._disk.call(self._cache.save, self._cacheable(certificate)))
            except (CacheError, NoThreadError, TimeoutError) as error:
                cause = (
                    f"the disk of the state directory: {error.strerror}" if isinstance(error, OSError) else str(error)
                )
                log.event(LOG, "not_kept", level=logging.ERROR, workload=self._workload.name, cause=cause)
                if certificate is self._newest:
                    self._newest = self._cached  # `save` may try it again
            else:
                self._cached = certificate

    def _cacheable(self, certificate: Certificate) -> CachedCertificate:
        return CachedCertificate(
            str(self._workload.identity),
            certificate.issued_at.timestamp(),
            certificate.secret.chain_pem.decode(),
            write_pem(certificate.accepted.anchors).decode(),
            certificate.secret.private_key_pem.decode(),
            self._workload.cas[certificate.authority],
        )


def tidy(directory: Path, *, keep: bool) -> None:
    """Remove from the directory of a cache what a killed process left half written, and without `keep` all that
    earlier processes cached.

    Only for the process that has locked the state directory.
    """
    remove_unfinished(directory, _NAME)
    if not keep and (removed := _remove_all(directory)):
        log.event(LOG, "kept_certificates_removed", directory=str(directory), count=removed)


def _remove_all(directory: Path) -> int:
    """Remove all cached certificates; returns how many there were. What cannot be removed is logged."""
    removed = 0
    try:
        for name in os.listdir(directory):  # noqa: PTH208 - names are what is compared
            if re.fullmatch(_NAME, name):
                (directory / name).unlink()
                removed += 1
        directory.rmdir()
    except OSError as error:
        if isinstance(error, FileNotFoundError):  # nothing was ever cached
            return removed
        log.event(
            LOG,
            "kept_certificates_not_removed",
            level=logging.ERROR,
            cause=f"{error.filename or directory}: {error.strerror}; {directory} holds private keys: remove them",
        )
    return removed
