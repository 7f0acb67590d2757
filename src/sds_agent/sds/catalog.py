"""The store as sessions see it: every secret is encoded once, for all streams that ask for it.

What was served before stays for as long as a client of it needs it: one that refuses the newer is sent it again.

Names beside those of the store exist for as long as a stream asks for them (`OnDemand`): those of files.
"""

from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Protocol

from sds_agent import log
from sds_agent.sds.codec import encode_secret
from sds_agent.sds.protocol import Absence, Resource
from sds_agent.secrets.model import Secret
from sds_agent.secrets.store import SecretStore
from sds_agent.text import printable


class OnDemand(Protocol):
    """Secrets whose names are not known before a stream asks for them."""

    @property
    def directories(self) -> tuple[Path, ...]:
        """Where their files are."""
        ...

    def __getitem__(self, name: str) -> Resource | Absence:
        """The resource of this exact name, or why there is none. Never raises."""
        ...

    def replaced(self, name: str) -> Resource | None:
        """What was served before the change that is being announced; None where there was nothing."""
        ...

    def want(self, client: object, names: Iterable[str]) -> None:
        """`client` (any hashable) asks for these names, and for no others any more."""
        ...


MOST_FORMER = 4
"""Former versions of a name that are kept; of more the oldest goes that no client uses, or else the oldest."""


class Catalog:
    """A live view of a store (`protocol.View`), one encoding for each secret shared by all streams."""

    def __init__(self, store: SecretStore, files: OnDemand | None = None) -> None:
        self._store = store
        self._files = files
        self._encoded: dict[str, tuple[Secret, Resource]] = {}
        self._former: dict[str, dict[str, Resource]] = {}  # by name and version

    def __getitem__(self, name: str) -> Resource | Absence:
        """The resource of this exact name, or why there is none."""
        store = self._store
        secret = store.secret(name)
        if secret is None and name not in store:
            return Absence.UNKNOWN if self._files is None else self._files[name]
        if secret is None:
            return Absence.PENDING
        encoded = self._encoded.get(name)
        if encoded is None or encoded[0] is not secret:
            encoded = self._encoded[name] = (secret, encode_secret(name, secret))
        return encoded[1]

    def change(
        self, names: Iterable[str], in_use: Container[str], used: Callable[[str], Container[str]] = lambda _: ()
    ) -> None:
        """The secrets of these names have changed, or are there no longer: drop what was encoded, with its key. Nobody
        may ever ask for them again. Of those that are `in_use` it is kept, until `release`; not of a name that has gone
        to another owner, whose clients must not be sent the key of the former one. `used` gives the versions in use.
        """
        for name in names:
            before = self._before(name)
            if before is None and name not in self._former:
                continue  # it was asked for by nobody
            now = self[name] if name in in_use else Absence.UNKNOWN
            if isinstance(now, Absence) or name in self._store.handed_over:
                self._former.pop(name, None)
            elif before is not None:
                former = self._former.setdefault(name, {})
                former[before.version] = before
                former.pop(now.version, None)
                if len(former) > MOST_FORMER:
                    versions = used(name)
                    del former[next((each for each in former if each not in versions), next(iter(former)))]

    def former(self, name: str, version: str) -> Resource | None:
        """What was served under the name at that version, if it is still kept."""
        return self._former.get(name, {}).get(version)

    def release(self, used: Callable[[str], Container[str]]) -> None:
        """Drop all former secrets but those whose clients use them still: `used` gives the versions in use of a name.
        To be called every few seconds.
        """
        for name, former in tuple(self._former.items()):
            versions = used(name)
            if kept := {version: each for version, each in former.items() if version in versions}:
                self._former[name] = kept
            else:
                del self._former[name]

    def _before(self, name: str) -> Resource | None:
        """What was served before the change of this name; it is not encoded any more."""
        encoded = self._encoded.pop(name, None)
        if encoded is not None:
            return encoded[1]
        return None if self._files is None else self._files.replaced(name)

    def want(self, client: object, names: Iterable[str]) -> None:
        """`client` (any hashable) asks for these names, and for no others any more: what is made on demand is made."""
        if self._files is not None:
            self._files.want(client, names)

    def shown(self, name: str) -> str:
        """A name as views have it: one of the store as it is, by which they find what is served; another, which a peer
        may have made up, as the log shows it.
        """
        return name if name in self._store else printable(name, log.LONGEST_VALUE)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that the store has."""
        return self._store.names

    @property
    def directories(self) -> tuple[Path, ...]:
        """The directories of which files may be asked for by name."""
        return () if self._files is None else self._files.directories
