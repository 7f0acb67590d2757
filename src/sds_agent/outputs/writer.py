"""The loop that keeps one workload's secrets in a directory. It watches the store: issuance never waits for a disk."""

import logging
from datetime import timedelta
from pathlib import Path

import anyio
from msgspec import Struct

from sds_agent import log
from sds_agent.clock import Clock
from sds_agent.directories import UntrustedDirectoryError
from sds_agent.outputs.directory import File, write_set
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import SecretStore, Snapshot
from sds_agent.tasks import NoThreadError
from sds_agent.workers import in_worker

LOG = logging.getLogger(__name__)

FIRST_RETRY = timedelta(seconds=1)
LONGEST_RETRY = timedelta(minutes=1)


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


async def keep(output: Output, store: SecretStore, clock: Clock) -> None:
    """Write every change of the secrets, for ever; try again where that fails.

    What has been withheld because it expired stays in the files.
    """
    changed = anyio.Event()

    def look(names: frozenset[str]) -> None:
        if not names.isdisjoint({output.name, output.bundle}):
            changed.set()

    written: dict[str, File] = {}
    delay = FIRST_RETRY
    with store.watching(look):
        while True:
            files = output.files(store.snapshot)
            changed = anyio.Event()
            if not files or files == written:
                await changed.wait()
            elif await _written(output, files, clock, delay):
                written, delay = files, FIRST_RETRY
            else:
                await clock.sleep(delay.total_seconds())
                delay = min(delay * 2, LONGEST_RETRY)


async def _written(output: Output, files: dict[str, File], clock: Clock, delay: timedelta) -> bool:
    try:
        await in_worker(write_set, output.directory, files, clock.now())
    except (OSError, UntrustedDirectoryError, NoThreadError) as error:
        cause = _told(error, output.directory) if isinstance(error, OSError) else str(error)
        log.event(
            LOG,
            "output_not_written",
            level=logging.ERROR,
            directory=str(output.directory),
            secret=output.name,
            cause=cause,
            in_seconds=delay,
        )
        return False
    log.event(LOG, "output_written", directory=str(output.directory), secret=output.name)
    return True


def _told(error: OSError, directory: Path) -> str:
    place = error.filename2 or error.filename or directory  # of a rename the second one is what is in the way
    return (
        f"cannot write to {place}: {error.strerror}; see that the agent's user may, that there is room, and that no "
        "directory stands where a file goes"
    )
