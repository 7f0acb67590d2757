"""Runs the real istiod as a peer for ca_serve.py, until it is interrupted.

    ISTIO_PARTS=.venvs/istio-VERSION python benchmarks/istiod.py [--signer ec-p256|rsa-2048] DIRECTORY [COMMAND ...]

scripts/istio-interop builds it. What istiod needs around it are the stand-ins of the tests: a Kubernetes API server and
an issuer of tokens. DIRECTORY gets the roots and a token. Printed are the arguments for ca_serve.py; with a COMMAND,
that is run with them at its end instead, and istiod ends with it.
"""

import argparse
import asyncio
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bench.processes import HERE
from bench.program import CANNOT_RUN

sys.path.insert(0, str(HERE.parent / "tests"))

from fakes.istio_parts import istiod, plugged
from fakes.kubernetes import WEB_POD, kubernetes


async def main() -> int:
    """Run it; the exit code of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--signer", default="ec-p256", help="the kind of its CA's key (ec-p256)")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    parts = Path(os.environ.get("ISTIO_PARTS", ""))
    if not (parts / "pilot-discovery").is_file():
        print("it needs istiod: scripts/istio-interop builds it; name its directory in ISTIO_PARTS", file=sys.stderr)
        return CANNOT_RUN
    folder = arguments.directory.resolve()
    folder.mkdir()
    with kubernetes(WEB_POD) as cluster:
        async with istiod(folder, cluster, plugged(folder, arguments.signer)) as running:
            (folder / "roots.pem").write_bytes(running.roots)
            (folder / "token").write_text(cluster.issuer.token("RS256", exp=datetime.now(UTC) + timedelta(hours=2)))
            given = [
                "--peer",
                f"{parts.name.replace('istio-', 'istiod ')}={running.address}:{running.program.process.pid}",
                "--peer-roots",
                f"{folder}/roots.pem",
            ]
            given += ["--peer-token", f"{folder}/token"]
            if arguments.command:
                return await asyncio.to_thread(subprocess.call, [*arguments.command, *given])
            print(*given, flush=True)
            return await running.program.process.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
