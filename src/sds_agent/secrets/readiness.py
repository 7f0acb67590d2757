"""Whether the agent is ready: every name that may be asked for has a secret. And whether clients have the newest."""

import asyncio
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from sds_agent import log
from sds_agent.secrets.store import SecretStore

LOG = logging.getLogger(__name__)


async def complete(store: SecretStore) -> None:
    """Return as soon as every name has a secret."""
    changed = asyncio.Event()
    with store.watching(lambda _names: changed.set()):
        while not store.complete:
            changed.clear()
            await changed.wait()


async def acknowledged(store: SecretStore, names: Iterable[str]) -> None:
    """Return once every client that subscribes to one of these names has acknowledged what is served under it now."""
    wanted, changed = tuple(names), asyncio.Event()
    with store.acknowledgements.watching(changed.set), store.watching(lambda _names: changed.set()):
        while store.acknowledgements.outstanding(
            {name: secret.version for name in wanted if (secret := store.secret(name)) is not None}
        ):
            changed.clear()
            await changed.wait()


@contextmanager
def watched(store: SecretStore) -> Iterator[None]:
    """Log `ready` and `not_ready` when that changes, until the context is left."""
    ready: bool | None = None

    def check(_changed: frozenset[str] = frozenset()) -> None:
        nonlocal ready
        if store.complete is ready:
            return
        ready = store.complete
        if ready:
            log.event(LOG, "ready")
        else:
            log.event(LOG, "not_ready", level=logging.WARNING, without_secret=store.missing)

    check()
    with store.watching(check):
        yield
