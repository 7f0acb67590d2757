"""Certificates that outlive the process: written at each issue, read when the agent starts again.

A restarted agent serves a cached certificate at once while it is valid, whether the CA answers or not, and renews with
it: a join token, with which the first was requested, is spent. The price is a private key on disk. An operator who does
not want to pay it says so, and the agent then removes what an earlier process cached. A cached certificate passes the
same checks as one that comes from the CA: the file is trusted no more than the wire.
"""

import asyncio
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from sds_agent import log
from sds_agent.authority.protocol import AuthorityError, Issuance
from sds_agent.digest import sha256
from sds_agent.directories import own_directory
from sds_agent.errors import SdsAgentError
from sds_agent.files import remove_unfinished, replace_all_private, sync_directory
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import Accepted, accept
from sds_agent.issuance.workload import Certificate, Workload, certificate_of, secret_of
from sds_agent.pki.certificates import CertificateError, read_bundle, write_ca_pem
from sds_agent.pki.keyfile import KeyFileError, read_private_key
from sds_agent.pki.keys import PrivateKey
from sds_agent.sealing import Seal
from sds_agent.statefile import ASIDE, FORMAT, StateFile, UnusableFileError, remove_aside, sealed
from sds_agent.tasks import DISK_TIMEOUT, NoThreadError, TimeLimit, uninterrupted
from sds_agent.values import Sensitive

LOG = logging.getLogger(__name__)

LARGEST = 1 << 20
"""Bytes. A chain, a key and a mesh's anchors take some kilobytes."""
MOST_AT_ONCE = 64
"""Certificates that are written at once."""
_NAME = r"[0-9a-f]{32}\.json"
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_OTHERS = 0o007
"""The rights that others must not have. Kubernetes sets those of the group, on each file of a volume (fsGroup)."""


class CacheError(SdsAgentError):
    """A certificate cannot be cached, or a cached one cannot be used."""


class CachedCertificate(Sensitive, frozen=True):
    """A certificate as it was served, in PEM, its key as PKCS#8.

    `issued_at` is in seconds since the epoch; `authority` is the kind and the name of the CA that issued it; `elapsed`
    is its place in its term (`schedule.CurrentLeaf`), without which a restart would move its renewal.
    """

    spiffe_id: str
    issued_at: float
    chain_pem: str
    anchors_pem: str
    private_key_pem: str
    authority: str = ""
    elapsed: Annotated[float, Meta(ge=0, le=1)] = 0.0
    format: int = FORMAT

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
    """A cached certificate that passed the checks again, its key, and when and by which CA it was issued.

    One that is `outdated` has to be written again: it is not encrypted yet, or an older version wrote it.
    """

    accepted: Accepted
    key: PrivateKey
    issued_at: datetime
    authority: str
    elapsed: float
    outdated: bool


class Cached(Protocol):
    """A certificate that can be written, now and again: its content is made when it is needed."""

    def cached(self) -> CachedCertificate:
        """The content. Called in any thread."""
        ...


Ended = Callable[[Exception | None], None]
"""Is called when the certificate is on disk, or with what went wrong: CacheError, NoThreadError, or TimeoutError, an
OSError with a reason, where the disk does not answer.
"""


class _Waiting(Sensitive, frozen=True):
    """A certificate that waits to be written, and whose tasks may do that."""

    certificate: Cached
    tasks: asyncio.TaskGroup
    ended: Ended


class CertificateCache:
    """One file for each identity in a directory (mode 0700, the files 0600), encrypted if there is a key.

    All workloads share one. What comes to be written while the disk is busy is written together afterwards, in a task
    of the first that waits: for each certificate alone a task, a thread and two waits for the disk would cost more than
    the certificate. The disk has `timeout` seconds for that. `check` raises an error of this package where nothing is
    to be written, as the directory may be another process's.
    """

    def __init__(
        self,
        directory: Path,
        seal: Seal | None = None,
        *,
        timeout: float = DISK_TIMEOUT,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._directory = directory
        self._seal = seal
        self._check = check
        self._of_other_keys: dict[str, StateFile] = {}
        self._kept: dict[str, Cached] = {}  # by the names of the files
        self._guard = threading.Lock()  # nothing is put back while another content is written
        self._disk = TimeLimit(timeout)
        self._waiting = deque[_Waiting]()
        self._writing = False
        self.unwritten: dict[str, Cached] = {}
        """By the names of the files, what is to be in them and could not be written (`try_again`)."""

    def begin(self, certificate: Cached, tasks: asyncio.TaskGroup, ended: Ended) -> None:
        """Have it written in place of the one before. The group must not end before `ended` is called, which must not
        wait or raise; it may cancel its tasks.
        """
        self._waiting.append(_Waiting(certificate, tasks, ended))
        if not self._writing:
            self._go_on()

    def _go_on(self, _: object = None) -> None:
        self._writing = False
        while self._waiting and not self._writing:
            # finished even when the agent stops: a write that is cut off leaves a file to remove
            writing = uninterrupted(self._write())
            try:
                # what fails is no line of the attempt that happened to begin this
                task = self._waiting[0].tasks.create_task(writing, context=Context())
            except RuntimeError as error:  # the group ends with a bug
                writing.close()
                self._waiting.popleft().ended(error)
            else:
                self._writing = True
                task.add_done_callback(self._go_on)

    async def _write(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MOST_AT_ONCE))]
        # where a bug ends this, nobody is to wait for it
        errors: Sequence[Exception | None] = [CacheError("writing it ended with a fault")] * len(batch)
        try:
            errors = await self._disk.call(self._save_all, [each.certificate for each in batch])
        except (NoThreadError, TimeoutError) as failure:
            errors = [failure] * len(batch)
        finally:
            for each, error in zip(batch, errors, strict=True):
                each.ended(error)

    def save(self, certificate: CachedCertificate) -> None:
        """Write it in place of the one before. Blocks for a write to disk. Raises CacheError."""
        (error,) = self._save_all([_Constant(certificate)])
        if error is not None:
            raise error

    def know(self, identity: SpiffeId, certificate: Cached) -> None:
        """The identity's file holds this certificate."""
        self._kept[_file_name(str(identity))] = certificate

    def try_again(self, identity: SpiffeId, certificate: Cached | None) -> None:
        """The identity's file is to hold this certificate, which could not be written: `put_back_all` does it. None:
        what was to be written for this identity is no longer.
        """
        self.unwritten.pop(_file_name(str(identity)), None)
        if certificate is not None:
            self.unwritten[_file_name(str(identity))] = certificate

    def forget(self, identity: SpiffeId) -> None:
        """The identity's file is not written again if it is gone."""
        self._kept.pop(_file_name(str(identity)), None)
        self.try_again(identity, None)

    def put_back_all(self) -> list[Path]:
        """Write again the files that are gone, and those that could not be written; returns their paths.

        A few at a time: each takes a descriptor, and others wait for the disk meanwhile. Raises CacheError.
        """
        with self._guard:
            kept = dict(self._kept)  # the loop may add and remove others
            try:
                there = set(os.listdir(self._directory))  # noqa: PTH208 - names are what is compared
            except FileNotFoundError:
                there = set()
            except OSError as failure:
                raise self._error(failure) from failure
        missing = {name: each for name, each in kept.items() if name not in there} | self.unwritten
        certificates, first = list(missing.values()), None
        for begin in range(0, len(certificates), MOST_AT_ONCE):
            errors = self._save_all(certificates[begin : begin + MOST_AT_ONCE], put_back=True)
            first = first or next(filter(None, errors), None)
            if errors and None not in errors:
                break  # the others would fail too
        if first is not None:
            raise first
        return [self._directory / name for name in missing if name in self._kept]

    def _save_all(self, certificates: Sequence[Cached], *, put_back: bool = False) -> list[Exception | None]:
        """Write these; returns what went wrong, with each. Blocks on the disk.

        To `put_back` means to write those alone that are still the last ones of their workloads.
        """
        contents = [(each, each.cached()) for each in certificates]
        with self._guard:
            if put_back:
                contents = [(each, content) for each, content in contents if self._is_last(each, content.spiffe_id)]
            try:
                self._check()
                own_directory(self._directory, 0o700)
                files = [self._prepared(content) for _, content in contents]
                errors = replace_all_private(self._directory, files)
                for (name, _), (certificate, _), error in zip(files, contents, errors, strict=True):
                    if error is None:  # it is there, even where the directory cannot be synchronized
                        self._kept[name] = certificate
                        self._of_other_keys.pop(name, None)
                        if self.unwritten.get(name) is certificate:
                            self.unwritten.pop(name, None)
                sync_directory(self._directory)
            except (OSError, SdsAgentError) as failure:
                return [self._error(failure, content.spiffe_id) for _, content in contents]
        return [
            None if error is None else self._error(error, content.spiffe_id)
            for error, (_, content) in zip(errors, contents, strict=True)
        ]

    def _prepared(self, content: CachedCertificate) -> tuple[str, bytes]:
        """The name of the file for it, and what is to be written there. Raises OSError."""
        name, encoded = _file_name(content.spiffe_id), msgspec.json.encode(content)
        of_other_keys = self._of_other_keys.get(name)
        if of_other_keys is not None:
            return name, of_other_keys.prepared(encoded)
        return name, sealed(encoded, self._seal, _purpose(content.spiffe_id))

    def _is_last(self, certificate: Cached, spiffe_id: str) -> bool:
        name = _file_name(spiffe_id)
        return (self.unwritten.get(name) or self._kept.get(name)) is certificate

    def _error(self, error: Exception, spiffe_id: str = "") -> CacheError:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        what = f"the certificate of {spiffe_id}" if spiffe_id else "certificates"
        made = CacheError(f"cannot cache {what} in {self._directory}: {reason}")
        made.__cause__ = error
        return made

    def restore(self, identity: SpiffeId, now: datetime) -> Restored | None:
        """The identity's cached certificate, checked as if the CA had just sent it; None if there is none.

        Raises CacheError when there is one that cannot be used. If it never will be, it was put aside.
        """
        if not self._has_file(str(identity)):
            return None
        file = self._file(str(identity))
        try:
            stored = file.load(_decode)
        except UnusableFileError as error:
            if file.holds_another_keys:
                self._of_other_keys[file.path.name] = file
            raise CacheError(str(error)) from error
        if stored is None:
            return None
        cached = stored.content
        if cached.spiffe_id != str(identity):
            raise CacheError(str(file.put_aside(f"is of another identity than {identity}")))
        try:
            key = cached.key
            accepted = accept(cached.issuance, identity=identity, public_key=key.public_key(), anchors=(), now=now)
        except (AuthorityError, CacheError) as error:
            if other_time := _other_time(cached, now):
                raise CacheError(
                    f"{file.path} holds a certificate that {other_time}; it is not used, and stays for the next start "
                    f"until there is another to write; see that this machine's clock is right, which says {now:{_TIME}}"
                ) from error
            raise CacheError(str(file.put_aside(f"holds a certificate that cannot be served ({error})"))) from error
        # a time that is yet to come, as after a clock was set back, would put off the renewal
        return Restored(accepted, key, min(cached.issued, now), cached.authority, cached.elapsed, stored.outdated)

    def _has_file(self, spiffe_id: str) -> bool:
        """Whether something is there under the name: on the first start, of thousands of names, nothing is."""
        try:
            os.lstat(f"{self._directory}/{_file_name(spiffe_id)}")
        except FileNotFoundError:
            return False
        except OSError:  # as reading it will say
            return True
        return True

    def _file(self, spiffe_id: str) -> StateFile:
        name = _file_name(spiffe_id)
        return self._of_other_keys.get(name) or StateFile(
            self._directory / name,
            LARGEST,
            seal=self._seal,
            purpose=_purpose(spiffe_id),
            instead="the CA is asked for another certificate",
            forbidden=_OTHERS,
        )


def _file_name(spiffe_id: str) -> str:
    return f"{sha256(spiffe_id.encode()).hex()[:32]}.json"


def _purpose(spiffe_id: str) -> str:
    return f"certificate of {spiffe_id}"


class _Constant(Sensitive, frozen=True):
    certificate: CachedCertificate

    def cached(self) -> CachedCertificate:
        return self.certificate


def _decode(content: bytes) -> CachedCertificate:
    cached = msgspec.json.decode(content, type=CachedCertificate)
    # these raise for numbers that are not a time, and for characters that no text may contain
    _ = cached.issued, cached.issuance, cached.private_key_pem.encode()
    return cached


def _other_time(cached: CachedCertificate, now: datetime) -> str:
    """At what other time the certificate is valid, to follow "that"; empty where it is now. The clock may be wrong."""
    try:
        leaf = read_bundle(cached.chain_pem.encode()).certificates[0]
    except (CertificateError, IndexError):
        return ""
    if leaf.not_valid_before_utc > now:
        return f"is valid only from {leaf.not_valid_before_utc:{_TIME}}"
    return f"expired at {leaf.not_valid_after_utc:{_TIME}}" if leaf.not_valid_after_utc <= now else ""


class _OfWorkload(Sensitive, frozen=True):
    workload: Workload
    certificate: Certificate

    def cached(self) -> CachedCertificate:
        workload, certificate = self.workload, self.certificate
        return CachedCertificate(
            str(workload.identity),
            certificate.issued_at.timestamp(),
            certificate.secret.chain_pem.decode(),
            write_ca_pem(certificate.anchors).decode(),
            certificate.secret.private_key_pem.decode(),
            workload.cas[certificate.authority],
            certificate.elapsed,
        )


class WorkloadCache:
    """The cache of one workload's certificate. A disk that does not answer delays neither the caller nor its end for
    longer than the timeout of the cache.

    Certificates are written one after another, beside the caller; of those that wait only the newest is.
    """

    __slots__ = ("_cache", "_cached", "_newest", "_saved", "_workload", "_writing")

    def __init__(self, workload: Workload, cache: CertificateCache) -> None:
        self._workload = workload
        self._cache = cache
        self._cached: Certificate | None = None
        self._newest: Certificate | None = None
        self._writing = False
        self._saved: asyncio.Event | None = None

    def restore(self, now: datetime) -> tuple[Certificate, Accepted] | None:
        """The certificate that an earlier process cached, and how it was accepted now, or None; one that cannot be used
        is logged (`not_restored`).

        Its anchors are those that were cached with it.
        """
        workload = self._workload
        try:
            restored = self._cache.restore(workload.identity, now)
        except CacheError as error:
            log.event(LOG, "not_restored", level=logging.WARNING, workload=workload.name, cause=str(error))
            return None
        if restored is None:
            return None
        accepted, at = restored.accepted, restored.issued_at
        names = {ca: name for name, ca in workload.cas.items()}
        # a file of an older version of the agent does not name the CA
        foreign = restored.authority not in {"", *names}
        name = names.get(restored.authority, workload.authority)
        secret = secret_of(accepted, restored.key)
        certificate = certificate_of(
            "restored",
            accepted,
            secret,
            issued_at=at,
            took=timedelta(0),
            authority=name,
            foreign=foreign,
            elapsed=restored.elapsed,
        )
        if not restored.outdated:
            self._newest = self._cached = certificate
            self._cache.know(workload.identity, _OfWorkload(workload, certificate))
        return certificate, accepted

    def save(self, certificate: Certificate, tasks: asyncio.TaskGroup) -> None:
        """Begin to write it in a task of the group, unless it is written or being written already. The group must not
        end before `saved` returns.
        """
        if certificate is self._newest:
            return
        self._newest = certificate
        if not self._writing:
            self._begin(certificate, tasks)

    async def saved(self) -> None:
        """Return once every write has ended, with or without success, also when the caller is cancelled."""
        if self._writing:
            self._saved = self._saved or asyncio.Event()
            await uninterrupted(self._saved.wait())

    def _begin(self, certificate: Certificate, tasks: asyncio.TaskGroup) -> None:
        self._writing = True
        if self._cache.unwritten:
            self._cache.try_again(self._workload.identity, None)
        self._cache.begin(_OfWorkload(self._workload, certificate), tasks, partial(self._ended, certificate, tasks))

    def _ended(self, written: Certificate, tasks: asyncio.TaskGroup, error: Exception | None) -> None:
        self._writing = False
        if error is None:
            self._cached = written
        else:
            self._report(written, error)
            if written is self._newest:
                self._newest = self._cached  # `save` may try it again
                self._cache.try_again(self._workload.identity, _OfWorkload(self._workload, written))
        if self._newest is not None and self._newest is not self._cached:
            self._begin(self._newest, tasks)
        elif self._saved is not None:
            self._saved.set()
            self._saved = None

    def _report(self, certificate: Certificate, error: Exception) -> None:
        log.event(
            LOG,
            "not_kept",
            level=logging.ERROR,
            workload=self._workload.name,
            cause=f"the disk of the state directory: {error.strerror}" if isinstance(error, OSError) else str(error),
            attempt_id=certificate.attempt_id or None,
        )


def tidy(directory: Path, *, keep: bool) -> None:
    """Remove from the directory of a cache what a killed process left half written, and without `keep` all that
    earlier processes cached.

    Only for the process that has locked the state directory.
    """
    remove_unfinished(directory, _NAME)
    remove_aside(directory, _NAME)
    if not keep and (removed := _remove_all(directory)):
        log.event(LOG, "kept_certificates_removed", directory=str(directory), count=removed)


def _remove_all(directory: Path) -> int:
    """Remove all cached certificates; returns how many there were. What cannot be removed is logged."""
    removed = 0
    try:
        for name in os.listdir(directory):  # noqa: PTH208 - names are what is compared
            if re.fullmatch(_NAME, name.removesuffix(ASIDE)):
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
