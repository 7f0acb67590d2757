"""Join tokens: how a machine without a platform identity asks for its first certificate.

A token is a random text. The directory has no token in it, only a record: a file named by the token's SHA-256, with the
SPIFFE ID that the token stands for and the time when it expires. A token serves one public key, the first that uses it:
beside the record, the mark names that key. The mark is a symbolic link, whose text is the key's hash; it leads nowhere.
symlink(2) fails where the name exists, and makes name and text in one step: of two keys at the same time one wins, also
between processes and over NFS, and no process sees half a mark. It has no content that has to reach the disk before its
name does, so to spend a token is one write to disk, of the directory, and many tokens can share it. Where a file system
has no symbolic links, and from earlier versions, a mark is a file that a hard link gave its name. The same key may ask
again, because an answer can be lost.
"""

import base64
import errno
import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ParamSpec

from msgspec import Struct

from sds_agent import log
from sds_agent.ca.refusal import Reason, RefusalError, unauthenticated
from sds_agent.directories import UntrustedDirectoryError, own_directory, warn_shared
from sds_agent.errors import ConfigurationError
from sds_agent.files import (
    ForeignFileError,
    check_writable,
    create,
    fix_of,
    looked_up,
    may_access,
    read_own,
    read_own_link,
    sync_directory,
)
from sds_agent.pki.keys import PublicKey, public_bytes

P = ParamSpec("P")

LOG = logging.getLogger(__name__)

LINGER = timedelta(days=1)
"""How long a record stays at least after its end: a caller that is late with its token gets that as the reason."""
PREFIX = "sds-join-"
"""What distinguishes a join token from a JWT, which has dots and no such beginning."""

LARGEST_RECORD = 16 << 10
"""Bytes of a token's file, which holds one SPIFFE ID."""

_DAMAGED = (ValueError, KeyError, TypeError, OverflowError, AttributeError, RecursionError, ForeignFileError)
"""What reading raises for a file that is no record, or that another user put there."""
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
"""The errors of symlink(2) on a file system that has none."""
_RECORD = ".token"
_SPENT = ".spent"
_MARK = re.compile(r"[0-9a-f]{64}\.spent")
_BEGUN = re.compile(r"\.[0-9a-f]{16}")
"""The temporary name of a file. One that stays is of a process that was killed."""


class Record(Struct, frozen=True):
    """What the directory says of a token. `name` is the token's hash in hexadecimal."""

    name: str
    spiffe_id: str
    expires: datetime


class ListedToken(Struct, frozen=True):
    """What is known of a token, without what would let someone use it: when it was made, and when it was used first."""

    spiffe_id: str
    made: datetime
    expires: datetime
    used: datetime | None


class JoinTokens:
    """The tokens in one directory. Its methods block on the disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # Each peer can cause them again, with any text that looks like a token. A disk that is full can still be read.
        self._unreadable = log.LogOnChange(LOG, "join_tokens_unusable")
        self._unwritable = log.LogOnChange(LOG, "join_tokens_unusable")

    def prepare(self, *, for_its_owner: bool = False) -> None:
        """Make the directory (0700) if it is missing.

        Root may work `for_its_owner`, the user that the CA runs as. Raises ConfigurationError.
        """
        try:
            shared = own_directory(self._directory, 0o700, any_owner=for_its_owner and os.geteuid() == 0)
            warn_shared("callers.join_tokens", shared)
            check_writable(self._directory, self._directory)
            if not may_access(self._directory, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self._directory))
        except UntrustedDirectoryError as error:
            if for_its_owner and os.geteuid() == 0 and self._is_to_be_made_by_another():
                raise ConfigurationError(
                    f"callers.join_tokens: there is no {self._directory} yet, and a directory above it is another "
                    "user's; start the CA server first, which makes it, or run this as the server's user"
                ) from error
            raise ConfigurationError(f"callers.join_tokens: {error}") from error
        except OSError as error:
            fix = fix_of(error, "give the CA a directory that it may write to")
            raise ConfigurationError(
                f"callers.join_tokens: cannot use {error.filename or self._directory}: {error.strerror}; {fix}"
            ) from error

    def _is_to_be_made_by_another(self) -> bool:
        """Whether the directory is missing, and root does not know whose it is to be. Raises OSError."""
        above = [each.stat().st_uid for each in self._directory.parents if looked_up(each) is not None]
        return looked_up(self._directory) is None and any(above)

    def tidy(self) -> None:
        """Remove what has long expired. Reads every record, which takes seconds for thousands. Raises OSError."""
        self._remove_expired(datetime.now(UTC))

    def make(self, spiffe_id: str, expires: datetime) -> str:
        """Make a token for that identity, which may be used until `expires`; returns it. Raises OSError."""
        token = f"{PREFIX}{secrets.token_urlsafe(32)}"
        # with its own name, so that a record is void when another user renames it
        content = {"token": _hash(token), "spiffe_id": spiffe_id, "expires": expires.timestamp()}
        self._create(f"{_hash(token)}{_RECORD}", json.dumps(content).encode())
        return token

    def forget(self, token: str) -> None:
        """Remove the record of a token that nobody was given. Raises OSError."""
        self._remove(_hash(token))

    def withdraw(self, spiffe_id: str) -> int:
        """Remove every token for that identity, used or not; returns how many there were. Raises OSError.

        A call that has just used one may still get its certificate.
        """
        taken = 0
        for path in self._directory.glob(f"*{_RECORD}"):
            try:
                record = _read(path)
            except (FileNotFoundError, *_DAMAGED):  # just removed, or of no use
                continue
            if record.spiffe_id == spiffe_id:
                self._remove(record.name)
                taken += 1
        sync_directory(self._directory)
        return taken

    def listed(self) -> tuple[ListedToken, ...]:
        """Every token that ends later or ended less than LINGER ago; nothing is changed. Raises ConfigurationError."""
        try:
            os.listdir(self._directory)  # noqa: PTH208 - glob says nothing of a directory that it cannot read
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise ConfigurationError(
                f"callers.join_tokens: cannot read {self._directory}: {error.strerror}; run this as the CA's user"
            ) from error
        oldest = datetime.now(UTC) - LINGER
        found = (self._listed(record) for record in self._records() if record.expires >= oldest)
        return tuple(each for each in found if each is not None)

    def _listed(self, record: Record) -> ListedToken | None:
        """None where it was removed in this moment."""
        made = self._made(record)
        used = _changed(self._directory / f"{record.name}{_SPENT}")
        return None if made is None else ListedToken(record.spiffe_id, made, record.expires, used)

    def _made(self, record: Record) -> datetime | None:
        return _changed(self._directory / f"{record.name}{_RECORD}")

    def find(self, token: str) -> Record:
        """The record of a token, expired or not.

        Raises RefusalError for an unknown token, and when the directory cannot be read.
        """
        path = self._directory / f"{_hash(token)}{_RECORD}"
        with self.translated():
            try:
                record = _read(path)
            except FileNotFoundError as error:
                self._directory.stat()  # if that is gone too, it is not the caller's fault
                raise unauthenticated(
                    "the join token is not one of this CA's, or it was withdrawn, or expired long ago"
                ) from error
            except _DAMAGED as error:
                raise unauthenticated("the CA's record of the join token is damaged: make a new one") from error
        self._unreadable.resolved()
        return record

    def spend(self, record: Record, key: PublicKey) -> None:
        """Bind the token to this key for good.

        Raises RefusalError when another key has used it, and when the directory cannot be written to.
        """
        (refusal,) = self.spend_all([(record, key)])
        if refusal is not None:
            raise refusal

    def spend_all(self, asked: Sequence[tuple[Record, PublicKey]]) -> list[RefusalError | None]:
        """Bind each of these tokens to its key; returns for each what `spend` would raise.

        The directory is synchronized once for all of them.
        """
        refusals = [self._refusal(self._bind, *each) for each in asked]
        if None in refusals:
            # also for a mark that was there: another process may have made it and not have it on disk yet
            unsynchronized = self._refusal(sync_directory, self._directory)
            refusals = [each or unsynchronized for each in refusals]
            if unsynchronized is None:
                self._unwritable.resolved()
        return refusals

    def find_all(self, tokens: Sequence[str]) -> list[Record | RefusalError]:
        """The record of each of these tokens, or what `find` would raise."""
        found = list[Record | RefusalError]()
        for each in tokens:
            try:
                found.append(self.find(each))
            except RefusalError as error:
                found.append(error)
        return found

    def _refusal(self, act: Callable[P, None], *arguments: P.args, **options: P.kwargs) -> RefusalError | None:
        try:
            with self.translated(spending=True):
                act(*arguments, **options)
        except RefusalError as error:
            return error
        return None

    def _bind(self, record: Record, key: PublicKey) -> None:
        """Make the mark, or find that it names this key. Its name is on disk once the directory is synchronized.

        The call may have shown its token seconds ago. Where the token was withdrawn since, the mark went with the
        record, and only the record says so: without a look at it a spent token would be good for another key.
        """
        mark = self._directory / f"{record.name}{_SPENT}"
        self._mark(mark, key)
        if looked_up(self._directory / f"{record.name}{_RECORD}") is None:
            mark.unlink(missing_ok=True)
            raise unauthenticated("the join token was withdrawn")

    def _mark(self, mark: Path, key: PublicKey) -> None:
        digest = hashlib.sha256(public_bytes(key)).digest()
        as_link, as_file = base64.urlsafe_b64encode(digest).decode(), digest.hex()
        try:
            mark.symlink_to(as_link)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with suppress(FileExistsError):  # another call was faster
                self._create(mark.name, as_file.encode())
        else:
            return
        if self._spent_by(mark) not in {as_link, as_file}:
            raise unauthenticated("the join token was already used by another key: make a new one")

    def _spent_by(self, mark: Path) -> str:
        """What the mark says; empty where another user put it there."""
        with suppress(ForeignFileError):
            text = read_own_link(mark, also=self._directory.stat().st_uid)
            return _read_own(mark).decode(errors="replace") if text is None else text
        return ""

    @contextmanager
    def translated(self, *, spending: bool = False) -> Iterator[None]:
        """Turn an error of the disk's into a refusal (INTERNAL), and log it when it begins or changes."""
        try:
            yield
        except OSError as error:
            unusable = self._unwritable if spending else self._unreadable
            unusable.report(f"{self._directory}: {error.strerror}")
            raise RefusalError(
                Reason.INTERNAL, "the CA cannot use its directory of join tokens: see its log"
            ) from error

    def _create(self, name: str, content: bytes) -> None:
        """Put a file of that name there, whole and on disk. Raises FileExistsError if there is one, and OSError."""
        temporary = self._directory / f".{secrets.token_hex(8)}"
        create(temporary, content, owner=self._owner())
        try:
            os.link(temporary, self._directory / name)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(self._directory)

    def _owner(self) -> tuple[int, int] | None:
        """Root may make tokens for a CA that runs as another user: the directory's owner has to read them."""
        if os.geteuid() != 0:
            return None
        found = self._directory.stat()
        return found.st_uid, found.st_gid

    def _remove_expired(self, now: datetime) -> None:
        """Remove the records that expired more than LINGER ago, and what killed processes left behind of that age:
        temporary files, and marks whose record is gone.

        The clock alone removes no record, for one that is far ahead says of every token that it expired long ago. That
        a token was made since then says it too: so a record stays until there is one that is that much younger.
        """
        records = list(self._records())
        newest = max(filter(None, (self._made(each) for each in records)), default=now)
        for record in records:
            if min(newest, now) - record.expires > LINGER:
                self._remove(record.name)
        for path in self._directory.iterdir():
            with suppress(FileNotFoundError):  # another process makes or removes a token at this moment
                if self._is_left(path) and now.timestamp() - path.lstat().st_mtime > LINGER.total_seconds():
                    path.unlink()

    def _is_left(self, path: Path) -> bool:
        """Whether it is nothing by itself: a temporary file, or a mark without a record."""
        if _MARK.fullmatch(path.name):
            return looked_up(path.with_suffix(_RECORD)) is None
        return _BEGUN.fullmatch(path.name) is not None

    def _remove(self, name: str) -> None:
        """Remove the record before the mark, so that the token is never usable again."""
        for ending in (_RECORD, _SPENT):
            (self._directory / f"{name}{ending}").unlink(missing_ok=True)

    def _records(self) -> Iterator[Record]:
        for path in self._directory.glob(f"*{_RECORD}"):
            with suppress(OSError, *_DAMAGED):
                yield _read(path)


def _read(path: Path) -> Record:
    data = _read_own(path)
    if len(data) > LARGEST_RECORD:
        raise ValueError("it is larger than any record")
    content = json.loads(data)
    if content.get("token", path.stem) != path.stem:  # without one: made before records had it
        raise ValueError("it is the record of another token")
    return Record(path.stem, content["spiffe_id"], datetime.fromtimestamp(content["expires"], UTC))


def _changed(path: Path) -> datetime | None:
    """When a file got its content; None where it is not there. Records and marks are written once."""
    try:
        return datetime.fromtimestamp(path.lstat().st_mtime, UTC)
    except FileNotFoundError:
        return None
    except (ValueError, OverflowError):  # some file systems take any number for a time
        return datetime.max.replace(tzinfo=UTC)


def _read_own(path: Path) -> bytes:
    """Read a file of root's or of the CA's user, who owns the directory: other users may be able to write there."""
    return read_own(path, LARGEST_RECORD, also=path.parent.stat().st_uid)[0]


def _hash(token: str) -> str:
    """A plain hash is enough: a token has 256 random bits, so there is nothing to guess."""
    return hashlib.sha256(token.encode()).hexdigest()
