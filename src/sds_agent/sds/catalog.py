"""The store as sessions see it: every secret is encoded once, for all streams that ask for it.

Names beside those of the store exist for as long as a stream asks for them (`OnDemand`): those of files.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from sds_agent.sds.codec import encode_secret
from sds_agent.sds.protocol import Absence, Resource
from sds_agent.secrets.model import Secret
from sds_agent.secrets.store import SecretStore


class OnDemand(Protocol):
    """Secrets whose names are not known before a stream asks for them."""

    @property
    def directories(self) -> tuple[Path, ...]:
        """Where their files are."""
        ...

    def __getitem__(self, name: str) -> Resource | Absence:
        """The resource of this exact name, or why there is none. Never raises."""
        ...

    def want(self, client: object, names: Iterable[str]) -> None:
        """`client` (any hashable) asks for these names, and for no others any more."""
        ...


class Catalog:
    """A live view of a store (`protocol.View`), one encoding for each secret shared by all streams."""

    def __init__(self, store: SecretStore, files: OnDemand | None = None) -> None:
        self._store = store
        self._files = files
        self._encoded: dict[str, tuple[Secret, Resource]] = {}

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

    def forget(self, names: Iterable[str]) -> None:
        """The secrets of these names have changed, or are there no longer: drop what was encoded, with its key. Nobody
        may ever ask for them again.
        """
        for name in names:
            self._encoded.pop(name, None)

    def want(self, client: object, names: Iterable[str]) -> None:
        """`client` (any hashable) asks for these names, and for no others any more: what is made on demand is made."""
        if self._files is not None:
            self._files.want(client, names)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that the store has."""
        return self._store.names

    @property
    def directories(self) -> tuple[Path, ...]:
        """The directories of which files may be asked for by name."""
        return () if self._files is None else self._files.directories
