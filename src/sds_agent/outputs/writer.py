"""The loop that keeps one workload's secrets in a directory. It watches the store: issuance never waits for a disk."""

import logging
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import anyio
from msgspec import Struct

from sds_agent import log
from sds_agent.clock import Clock
from sds_agent.directories import LockedDirectory
from sds_agent.errors import SdsAgentError
from sds_agent.outputs.directory import File, holding, is_whole, write_set
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import SecretStore, Snapshot
from sds_agent.tasks import DISK_TIMEOUT, NoThreadError, TimeLimit, uninterrupted

LOG = logging.getLogger(__name__)

FIRST_RETRY = timedelta(seconds=1)
LONGEST_RETRY = timedelta(minutes=1)
LOOK = 5.0
"""Seconds between two looks whether the files are still there."""


class Output(Struct, frozen=True):
    """What goes where: the certificate served as `name` and the bundle served as `bundle`, into `directory`.

    The files have the names that Istio gives them in OUTPUT_CERTS.
    """

    directory: Path
    name: str
    bundle: str

    def files(self, snapshot: Snapshot) -> dict[str, File]:
        """The set; empty while a part of it is missing, since half a set is of no use."""
        certificate, bundle = snapshot.get(self.name), snapshot.get(self.bundle)
        if not isinstance(certificate, CertificateSecret) or not isinstance(bundle, BundleSecret):
            return {}
        return {
            "cert-chain.pem": File(certificate.chain_pem),
            "key.pem": File(certificate.private_key_pem, private=True),
            "root-cert.pem": File(bundle.anchors_pem),
        }


async def keep(output: Output, store: SecretStore, clock: Clock, look_every: float = LOOK) -> None:
    """Write every change of the secrets, for ever; try again where that fails, and write anew what is removed.

    What has been withheld because it expired stays in the files.
    """
    held = holding(output.directory)
    try:
        await _keep(_Place(output, held, clock), store, look_every)
    finally:
        held.release()


async def _keep(place: "_Place", store: SecretStore, look_every: float) -> None:
    output = place.output
    changed = anyio.Event()

    def look(names: frozenset[str]) -> None:
        if not names.isdisjoint({output.name, output.bundle}):
            changed.set()

    written: dict[str, File] = {}
    with store.watching(look):
        while True:
            files = output.files(store.snapshot)
            changed = anyio.Event()
            if files and files != written:
                written = files if await place.write(files) else {}
                continue
            with anyio.move_on_after(look_every):
                await changed.wait()
            if written and await place.lost(written):
                written = {}


class _Place:
    """The directory of an output, and how often it could not be written to."""

    def __init__(self, output: Output, held: LockedDirectory, clock: Clock) -> None:
        self.output = output
        self._held = held
        self._clock = clock
        self._delay = FIRST_RETRY
        self._disk = TimeLimit(DISK_TIMEOUT)

    async def write(self, files: Mapping[str, File]) -> bool:
        """Put the files in force; whether it went well. If not, return when it is time to try again."""
        try:
            # to its end also when the agent stops, or else a part of a set would lie there
            await uninterrupted(self._disk.call(self._put, files))
        except (OSError, SdsAgentError) as error:
            cause = _told(error, self.output.directory) if isinstance(error, OSError) else str(error)
            self._log("output_not_written", logging.ERROR, cause=cause, in_seconds=self._delay)
            await self._clock.sleep(self._delay.total_seconds())
            self._delay = min(self._delay * 2, LONGEST_RETRY)
            return False
        self._delay = FIRST_RETRY
        self._log("output_written", logging.INFO)
        return True

    async def lost(self, files: Mapping[str, File]) -> bool:
        """Whether the files, which were put in force, were removed since."""
        try:
            if await self._disk.call(self._is_there, files):
                return False
        except (NoThreadError, TimeoutError):  # the next look tells
            return False
        self._log("output_lost", logging.WARNING)
        return True

    def _put(self, files: Mapping[str, File]) -> None:
        if not self._held.in_place():
            self._held.claim()
        write_set(self.output.directory, files, self._clock.now())

    def _is_there(self, files: Mapping[str, File]) -> bool:
        return self._held.in_place() and is_whole(self.output.directory, files)

    def _log(self, event: str, level: int, **fields: log.Value) -> None:
        log.event(LOG, event, level=level, directory=str(self.output.directory), secret=self.output.name, **fields)


def _told(error: OSError, directory: Path) -> str:
    place = error.filename2 or error.filename or directory  # of a rename the second one is what is in the way
    return (
        f"cannot write to {place}: {error.strerror}; see that the agent's user may, that there is room, and that no "
        "directory stands where a file goes"
    )
