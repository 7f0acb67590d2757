"""The store as sessions see it: every secret is encoded once, for all streams that ask for it."""

from sds_agent.sds.codec import encode_secret
from sds_agent.sds.protocol import Absence, Resource
from sds_agent.secrets.model import Secret
from sds_agent.secrets.store import SecretStore


class Catalog:
    """A live view of a store (`protocol.View`), one encoding for each secret shared by all streams."""

    def __init__(self, store: SecretStore) -> None:
        self._store = store
        self._encoded: dict[str, tuple[Secret, Resource]] = {}

    def __getitem__(self, name: str) -> Resource | Absence:
        """The resource of this exact name, or why there is none."""
        snapshot = self._store.snapshot
        if name not in snapshot:
            return Absence.UNKNOWN
        secret = snapshot[name]
        if secret is None:
            self._encoded.pop(name, None)
            return Absence.PENDING
        encoded = self._encoded.get(name)
        if encoded is None or encoded[0] is not secret:
            encoded = self._encoded[name] = (secret, encode_secret(name, secret))
        return encoded[1]

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that may be asked for."""
        return tuple(self._store.snapshot)
