"""Certificates that outlive the process: written at each issue, read when the agent starts again.

With them a restarted agent serves at once what is still valid, CA or no CA, and renews with its current certificate,
without which an agent that came with a join token would have nothing: that is spent. The price is a private key on
disk, and an operator who does not want to pay it says so; then none stays there from before. A kept certificate is
checked like one that came from the CA: what is in the file is believed no more than what came over the wire.
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
    """A certificate cannot be kept, or what was kept cannot be used."""


class CachedCertificate(Sensitive, frozen=True):
    """A certificate as it was served: PEM, the key as PKCS#8. `issued_at` is seconds since the epoch, `authority` what
    issued it.
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
            raise CacheError(f"the private key kept for {self.spiffe_id} is damaged: {error}") from error

    @property
    def issued(self) -> datetime:
        """When it was issued."""
        return datetime.fromtimestamp(self.issued_at, UTC)


class Restored(Sensitive, frozen=True):
    """A kept certificate that was accepted again, its key, and when it was issued."""

    accepted: Accepted
    key: PrivateKey
    issued_at: datetime
    authority: str


class CertificateCache:
    """Keeps one file for each identity in a directory (0700, the files 0600)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, OwnFile] = {}

    def save(self, kept: CachedCertificate) -> None:
        """Keep it in place of the one before. Blocks for a disk's write. Raises CacheError."""
        try:
            own_directory(self._directory, 0o700)
            self._file(kept.spiffe_id).write(msgspec.json.encode(kept))
        except (OSError, SdsAgentError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise CacheError(
                f"cannot keep the certificate of {kept.spiffe_id} in {self._directory}: {reason}"
            ) from error

    def load(self, identity: SpiffeId) -> CachedCertificate | None:
        """What was kept for the identity, or None; the certificate and the key in it are not looked at. Raises
        CacheError, whatever lies in the file's place.
        """
        own = self._file(str(identity))
        file = own.path
        try:
            kept = _read(own)
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
        if kept.spiffe_id != str(identity):
            raise CacheError(f"{file} is of another identity; it is not used, and replaced by the next certificate")
        return kept

    def put_back(self) -> Path | None:
        """Write again a file that is gone; returns the path of one that was. Raises CacheError."""
        try:
            return next((path for each in tuple(self._files.values()) if (path := each.put_back())), None)
        except (OSError, SdsAgentError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise CacheError(f"cannot keep certificates in {self._directory}: {reason}") from error

    def restore(self, identity: SpiffeId, now: datetime) -> Restored | None:
        """What was kept for the identity, if it is still as good as on the day it came, or None. Raises CacheError."""
        kept = self.load(identity)
        if kept is None:
            return None
        key = kept.key
        try:
            accepted = accept(kept.issuance, identity=identity, public_key=key.public_key(), anchors=(), now=now)
        except AuthorityError as error:
            raise CacheError(str(error)) from error
        # a time that is yet to come, as after a clock was set back, would put off the renewal
        return Restored(accepted, key, min(kept.issued, now), kept.authority)

    def _file(self, spiffe_id: str) -> OwnFile:
        name = f"{hashlib.sha256(spiffe_id.encode()).hexdigest()[:32]}.json"
        return self._files.setdefault(name, OwnFile(self._directory / name, LARGEST))


def _read(file: OwnFile) -> CachedCertificate:
    """The file's content. Raises ForeignFileError, CacheError, OSError, and for what is no such certificate, a
    decoder's errors.
    """
    data, mode = file.read()
    if mode & _OTHERS:
        raise CacheError(f"{file.path} may be read or written by others; it is not used")
    if len(data) > LARGEST:
        raise ValueError("it is larger than any certificate")
    kept = msgspec.json.decode(data, type=CachedCertificate)
    _ = kept.issued, kept.issuance, kept.private_key_pem.encode()  # numbers that are no time, characters that are none
    return kept


class WorkloadCache:
    """One workload's certificate in the cache. A disk that does not answer holds up nothing.

    Writes take place one after another beside the caller; of several that wait only the newest certificate is written.
    """

    def __init__(self, workload: Workload, cache: CertificateCache, *, timeout: float = DISK_TIMEOUT) -> None:
        self._workload = workload
        self._cache = cache
        self._disk = TimeLimit(timeout)
        self._cached: Certificate | None = None
        self._newest: Certificate | None = None
        self._writing: asyncio.Task[None] | None = None

    def restore(self, anchors: Chain, now: datetime) -> Certificate | None:
        """What an agent before this one cached, if it is still as good as on the day it came; `anchors` are those
        known of the workload's CA. What cannot be used is logged as `not_restored`.
        """
        workload = self._workload
        try:
            restored = self._cache.restore(workload.identity, now)
        except CacheError as error:
            log.event(LOG, "not_restored", level=logging.WARNING, workload=workload.name, cause=str(error))
            return None
        if restored is None:
            return None
        # another workload's may have come later and with newer anchors: each needs its own until the CA is asked
        together = unique((*anchors, *restored.accepted.anchors))
        accepted, at = structs.replace(restored.accepted, anchors=together), restored.issued_at
        # nothing is known of the CA of a file that an older version of the agent wrote
        foreign = restored.authority not in {"", workload.ca}
        self._newest = Certificate("restored", accepted, secret_of(accepted, restored.key), at, at, foreign)
        self._cached = self._newest
        return self._cached

    def save(self, certificate: Certificate, tasks: asyncio.TaskGroup) -> None:
        """Begin to write it in place of the one before, in a task of that group; unless it is there or on its way."""
        if certificate is self._newest:
            return
        self._newest = certificate
        if self._writing is None or self._writing.done():
            self._writing = tasks.create_task(self._write())

    def put_back(self) -> Path | None:
        """Write the file again if it is gone; returns its path if it was. Raises CacheError."""
        return self._cache.put_back()

    async def saved(self) -> None:
        """Return when what was given to `save` has been written or logged as `not_kept`, also when cancelled."""
        if self._writing is not None and not self._writing.done():
            await uninterrupted(self._written(self._writing))

    @staticmethod
    async def _written(writing: "asyncio.Task[None]") -> None:
        await asyncio.wait([writing])

    async def _write(self) -> None:
        while (certificate := self._newest) is not None and certificate is not self._cached:
            try:
                # to its end also when the agent stops: a write that is cut off would have to be cleared away
                await uninterrupted(self._disk.call(self._cache.save, self._cacheable(certificate)))
            except (CacheError, NoThreadError, TimeoutError) as error:
                cause = (
                    f"the disk of the state directory: {error.strerror}" if isinstance(error, OSError) else str(error)
                )
                log.event(LOG, "not_kept", level=logging.ERROR, workload=self._workload.name, cause=cause)
                if certificate is self._newest:
                    self._newest = self._cached  # so that it is written when it is given again
            else:
                self._cached = certificate

    def _cacheable(self, certificate: Certificate) -> CachedCertificate:
        return CachedCertificate(
            str(self._workload.identity),
            certificate.issued_at.timestamp(),
            certificate.secret.chain_pem.decode(),
            write_pem(certificate.accepted.anchors).decode(),
            certificate.secret.private_key_pem.decode(),
            self._workload.ca,
        )


def tidy(directory: Path, *, keep: bool) -> None:
    """Remove from a cache's directory what an agent left that was killed while it wrote, and unless certificates are
    to be kept, those of before.

    Only for a process that holds the state directory.
    """
    remove_unfinished(directory, _NAME)
    if not keep and (removed := _remove_all(directory)):
        log.event(LOG, "kept_certificates_removed", directory=str(directory), count=removed)


def _remove_all(directory: Path) -> int:
    """Returns how many there were. What cannot be removed is logged."""
    removed = 0
    try:
        for name in os.listdir(directory):  # noqa: PTH208 - names are what is compared
            if re.fullmatch(_NAME, name):
                (directory / name).unlink()
                removed += 1
        directory.rmdir()
    except OSError as error:
        if isinstance(error, FileNotFoundError):  # nothing was ever kept
            return removed
        log.event(
            LOG,
            "kept_certificates_not_removed",
            level=logging.ERROR,
            cause=f"{error.filename or directory}: {error.strerror}; {directory} holds private keys: remove them",
        )
    return removed
