"""Secrets in files, under the names by which Istio's Envoys ask for them: made on demand, followed, and dropped.

A name exists while a stream subscribes to it. Only files below the directories that the configuration allows are read,
and a name that leads elsewhere is as unknown as any other. Each directory is followed by itself: one on a network's
disk that does not answer delays no other.

What is served goes together and can be used: the certificate is for the key, Envoy loads both, and it is valid now.
These need not be SVIDs, so nothing else is checked. A set that cannot be used leaves the one before it in use.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from sds_agent import log
from sds_agent.budget import Bucket, Rate
from sds_agent.clock import Clock
from sds_agent.errors import SdsAgentError
from sds_agent.file_sets import CHECK_EVERY, LARGEST_FILE, Doubt, doubted, settled
from sds_agent.files import OutsideError, read_below
from sds_agent.path_watch import PathWatch
from sds_agent.pki.certificates import (
    CertificateError,
    describe_time,
    has_key_in_usual_form,
    read_bundle,
    write_pem,
)
from sds_agent.pki.forms import without_certificate
from sds_agent.pki.keys import to_pkcs8_pem
from sds_agent.pki.pairs import KEY, PairError, read_pair_of
from sds_agent.pki.strength import IN_SECRETS
from sds_agent.sds.codec import encode_secret
from sds_agent.sds.file_names import FileName, RootsFile, parsed
from sds_agent.sds.protocol import Absence, Resource
from sds_agent.secrets.model import BundleSecret, CertificateSecret, Secret
from sds_agent.secrets.store import SecretStore
from sds_agent.tasks import DISK_TIMEOUT, NoThreadError, TimeLimit

LOG = logging.getLogger(__name__)

MOST_NAMES = 1000
"""Names of files at one time. Each costs some readings every few seconds, and the memory of its content."""
BREAK = 4
"""How many times as long as a pass over the files took the next one waits: a peer that asks for other names all the
time costs a fifth of a core."""
LONGEST_BREAK = 1.0
"""Seconds."""
LINES = Rate(100, 100 / 3600)
"""Lines of the log on names that cannot be served: peers choose these names."""


class _FileContent(Struct, frozen=True):
    """What a name's files give, and from when to when it is good; what is left out of it because it cannot be used."""

    secret: Secret
    not_before: datetime | None = None
    not_after: datetime | None = None
    left_out: tuple[str, ...] = ()

    def fault(self, now: datetime) -> str:
        """Why it cannot be served now, as a clause; empty where it can."""
        if self.not_after is not None and self.not_after <= now:
            return f"the certificate expired at {describe_time(self.not_after)}; have its writer renew it"
        if self.not_before is not None and now < self.not_before:
            return f"the certificate is valid only from {describe_time(self.not_before)}; compare the clocks"
        return ""


class _FileFault(Struct, frozen=True):
    """Why a name's files give nothing. `outside`: a path leads to what the configuration does not allow."""

    cause: str
    outside: bool = False


class _FileOutcome(Struct, frozen=True):
    """One reading of a name's files: a hash of their contents, and what they give."""

    digest: bytes
    result: _FileContent | _FileFault


class _UnreadableError(SdsAgentError):
    """A file gives no content; the message names it."""


class _FileEntry:
    """A name that streams ask for, and what is served under it."""

    def __init__(self, name: str, files: FileName) -> None:
        self.name = name
        self.files = files
        self.clients: set[object] = set()
        self.outcome: _FileOutcome | None = None
        self.served: Resource | None = None
        self.replaced: Resource | None = None
        """What was served before, while the change is announced."""
        self.not_after: datetime | None = None
        self.absence = Absence.PENDING
        self.doubt: Doubt | None = None
        self.reported = ""
        self.is_late = False
        """Whether clients know of it only that it is not served."""

    @property
    def view(self) -> Resource | Absence:
        """What a session sees."""
        return self.served or self.absence

    def take(self, outcome: _FileOutcome, now: datetime) -> str:
        """Serve what was read, if it can be; returns what to report, empty where that is nothing."""
        result, self.outcome = outcome.result, outcome
        cause = result.cause if isinstance(result, _FileFault) else result.fault(now)
        if isinstance(result, _FileContent) and not cause:
            self._serve(result)
            self.doubt = None
            return "; ".join(result.left_out)
        self.doubt = doubted(self.doubt, cause, now)
        if self.not_after is not None and self.not_after <= now:
            self.served = None
        outside = isinstance(result, _FileFault) and result.outside
        self.absence = Absence.UNKNOWN if outside else Absence.PENDING
        return cause if outside or self.doubt.overdue(now) else ""

    def _serve(self, found: _FileContent) -> None:
        self.absence, self.not_after = Absence.PENDING, found.not_after
        if self.served is None or self.served.version != found.secret.version:
            self.served = encode_secret(self.name, found.secret)


class FileSecrets:
    """The names of files that streams ask for, and what is served under each. `run` follows the files."""

    def __init__(self, directories: Iterable[Path], store: SecretStore, clock: Clock) -> None:
        self.directories = tuple(directories)
        self._store = store
        self._clock = clock
        self._entries: dict[str, _FileEntry] = {}
        self._wanted: dict[object, frozenset[str]] = {}
        self._left_out: dict[object, frozenset[str]] = {}  # for which there was no room
        self._watches = {directory: PathWatch() for directory in self.directories}
        self._lines = Bucket(LINES, time.monotonic())

    def __getitem__(self, name: str) -> Resource | Absence:
        """The resource of this exact name. One that would be followed if it was wanted is pending."""
        if (entry := self._entries.get(name)) is not None:
            return entry.view
        may_be = len(self._entries) < MOST_NAMES and parsed(name, self.directories) is not None
        return Absence.PENDING if may_be else Absence.UNKNOWN

    @property
    def names(self) -> tuple[str, ...]:
        """The names that are followed."""
        return tuple(self._entries)

    def replaced(self, name: str) -> Resource | None:
        """What was served before the change that is being announced; None where there was nothing."""
        entry = self._entries.get(name)
        return None if entry is None else entry.replaced

    def want(self, client: object, names: Iterable[str]) -> None:
        """`client` (any hashable) asks for these names, and for no others any more. Those that no client asks for
        are dropped, with the key that was read.
        """
        if self._follows(client, tuple(names)):
            self._let_in()

    def _follows(self, client: object, names: Sequence[str]) -> bool:
        """Follow the names that this client asks for, as far as there is room; whether others are dropped."""
        before, wanted = self._wanted.get(client, frozenset()), frozenset(self._known(names))
        _put(self._wanted, client, wanted)
        full = len(self._entries) >= MOST_NAMES
        left_out = [
            each for each in names if full and each not in wanted and parsed(each, self.directories) is not None
        ]
        _put(self._left_out, client, frozenset(left_out))
        for name in wanted - before:
            self._entries[name].clients.add(client)
        for name in before - wanted:
            entry = self._entries[name]
            entry.clients.discard(client)
            if not entry.clients:
                del self._entries[name]
        return bool(before - wanted)

    def _let_in(self) -> None:
        """Follow names for which there was no room, while there is some: their clients do not ask for them again."""
        new = set[str]()
        for client, names in tuple(self._left_out.items()):
            if len(self._entries) < MOST_NAMES or not new.isdisjoint(names):
                self._follows(client, (*self._wanted.get(client, ()), *names))
                new |= names & self._entries.keys()
        for name in new:
            self._entries[name].is_late = True

    async def run(self) -> None:
        """Read the files whenever they change, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for directory in self.directories:
                tasks.create_task(self._follow(directory))

    def _known(self, names: Iterable[str]) -> Iterator[str]:
        """Those of the names that are followed, from now on where there is room."""
        for name in names:
            if name in self._entries:
                yield name
            elif len(self._entries) < MOST_NAMES and (files := parsed(name, self.directories)) is not None:
                self._entries[name] = _FileEntry(name, files)
                self._watches[files.directory].wake()
                yield name

    async def _follow(self, directory: Path) -> None:
        watch, disk = self._watches[directory], TimeLimit(DISK_TIMEOUT)
        try:
            while True:
                entries = [each for each in self._entries.values() if each.files.directory == directory]
                began = time.monotonic()
                await self._look(entries, watch, disk)
                await asyncio.sleep(min(BREAK * (time.monotonic() - began), LONGEST_BREAK))
                now = self._clock.now()
                pauses = [each.doubt.pause(now) for each in entries if each.doubt is not None]
                await watch.changed(self._clock, min(pauses, default=CHECK_EVERY))
        finally:
            watch.close()

    async def _look(self, entries: Sequence[_FileEntry], watch: PathWatch, disk: TimeLimit) -> None:
        """Read the files of these names once, and push what has changed."""
        asked = [(each.files, each.outcome) for each in entries]
        try:
            outcomes = await disk.call(self._outcomes, asked, watch)
        except (TimeoutError, NoThreadError) as error:
            why = error.strerror if isinstance(error, TimeoutError) else str(error)
            outcomes = [_FileOutcome(b"", _FileFault(f"the files cannot be read: {why}"))] * len(entries)
        now, changed = self._clock.now(), list[_FileEntry]()
        for entry, outcome in zip(entries, outcomes, strict=True):
            before, served = entry.view, entry.served
            self._report(entry, entry.take(outcome, now))
            if entry.view is not before or entry.is_late:
                entry.replaced, entry.is_late = served, False
                changed.append(entry)
        if changed:
            self._store.announce(frozenset(each.name for each in changed))
        for entry in changed:
            entry.replaced = None

    def _outcomes(self, asked: Iterable[tuple[FileName, _FileOutcome | None]], watch: PathWatch) -> list[_FileOutcome]:
        """Blocks on the disk."""
        wanted = list(asked)
        watch.arm(path for files, _ in wanted for path in files.paths)
        return [_read(files, self.directories, before) for files, before in wanted]

    def _report(self, entry: _FileEntry, cause: str) -> None:
        """Log it, once for each cause, and within a budget."""
        if cause and cause != entry.reported and self._lines.holds(time.monotonic()):
            self._lines.draw()
            log.event(
                LOG,
                "file_secret_unusable",
                level=logging.WARNING,
                secret=entry.name,
                cause=cause,
                serving="nothing" if entry.served is None else "what was read before",
            )
        entry.reported = cause


def _put(names: dict[object, frozenset[str]], client: object, some: frozenset[str]) -> None:
    if some:
        names[client] = some
    else:
        names.pop(client, None)


def _read(files: FileName, directories: Sequence[Path], before: _FileOutcome | None) -> _FileOutcome:
    try:
        contents = settled(lambda: {path: _content(path, directories) for path in files.paths})
    except OutsideError as error:
        return _FileOutcome(b"", _FileFault(str(error), outside=True))
    except _UnreadableError as error:
        return _FileOutcome(b"", _FileFault(str(error)))
    if contents is None:
        return _FileOutcome(b"", _FileFault("the files change all the time"))
    digest = _digest(contents[path] for path in files.paths)
    if before is not None and before.digest == digest:
        return before
    try:
        return _FileOutcome(digest, _judged(files, contents))
    except Exception as error:  # noqa: BLE001 - what another program writes must not end the agent
        log.fault(LOG, "sds files", error)
        cause = f"the files led to a {type(error).__name__}; please report the event fault"
        return _FileOutcome(digest, _FileFault(cause))


def _content(path: Path, directories: Sequence[Path]) -> bytes:
    try:
        data = read_below(path, directories, LARGEST_FILE)
    except OutsideError as error:
        raise OutsideError(f"{path}: {error}") from error
    except OSError as error:
        raise _UnreadableError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > LARGEST_FILE:
        raise _UnreadableError(f"{path} has more than {LARGEST_FILE} bytes")
    return data


def _judged(files: FileName, contents: dict[Path, bytes]) -> _FileContent | _FileFault:
    if isinstance(files, RootsFile):
        return _roots(files.roots, contents[files.roots])
    try:
        pair = read_pair_of(contents[files.certificate], contents[files.key])
    except PairError as error:
        place = files.key if KEY in error.problem.where else files.certificate
        return _FileFault(f"{place} {error.problem.found}; {error.problem.fix}")
    if fault := IN_SECRETS.fault(pair.key):
        return _FileFault(
            f"{files.key} is {fault.found}, by which Envoys do not accept each other; make {fault.wanted}"
        )
    leaf = pair.leaf
    if not has_key_in_usual_form(leaf):
        return _FileFault(
            f"{files.certificate} has its key in a form that Envoy does not load, such as that of an RSA-PSS key; have "
            "it issued with a plain RSA or EC key"
        )
    secret = CertificateSecret(write_pem(pair.chain), to_pkcs8_pem(pair.key), leaf.not_valid_after_utc)
    left_out = tuple(f"left out of {files.certificate}: {each}" for each in pair.left_out)
    return _FileContent(secret, leaf.not_valid_before_utc, leaf.not_valid_after_utc, left_out)


def _roots(file: Path, data: bytes) -> _FileContent | _FileFault:
    try:
        read = read_bundle(data)
    except CertificateError as error:
        return _FileFault(f"{file} cannot be read: {error}")
    if not read.certificates:
        problem = without_certificate(data, "the roots")
        return _FileFault(f"{file} {problem.found}; {problem.fix}")
    left_out = tuple(f"left out of {file}: {each}" for each in read.left_out)
    return _FileContent(BundleSecret(write_pem(read.certificates)), left_out=left_out)


def _digest(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()
