"""A program for tests: an agent with identities on its embedded CA, in a process of its own, which counts their cost.

    python counting_agent.py DIRECTORY NUMBER...

An agent with each number of identities follows the one before, in an empty state; a line of JSON has what it held once
all were issued. The first one is there to make all warm. Their clock stands still: what is done from time to time would
be counted on a slow machine alone.
"""

import asyncio
import gc
import json
import sys
import tracemalloc
from pathlib import Path
from types import FrameType

from fakes.clocks import HandClock
from fakes.counting_server import Calls, Lines, entries, settled

from sds_agent import app
from sds_agent.config.loading import load
from sds_agent.config.settings import Settings
from sds_agent.secrets.readiness import complete

SIGN, VERIFY, ENCODE = "ECPrivateKey.sign", "ECPublicKey.verify", "Certificate.public_bytes"


class CallsOfKeys(Calls):
    """Counts what keys and certificates of cryptography are asked for, too."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = dict.fromkeys((SIGN, VERIFY, ENCODE), 0)

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        super().__call__(frame, event, argument)
        if event == "c_call" and (name := getattr(argument, "__qualname__", "")) in self.asked:
            self.asked[name] += 1


async def count(directory: Path, number: int) -> dict[str, int]:
    """What such an agent holds, and what it took."""
    settings, clock, lines, calls = configured(directory, number), HandClock(), Lines.recording(), CallsOfKeys()
    sys.setprofile(calls)
    async with app.authorities(settings, clock) as cas, app.agent(settings, cas, clock) as running:
        await complete(running.store)
        sys.setprofile(None)
        await settled()
        gc.collect()
        return {
            "identities": len(running.workloads),
            "functions": calls.functions,
            **calls.asked,
            "lines": lines.lines,
            "tasks": len(asyncio.all_tasks()),
            "threads": entries("task"),
            "descriptors": entries("fd"),
            "bytes": tracemalloc.get_traced_memory()[0],
        }


def configured(directory: Path, number: int) -> Settings:
    """So many workloads. None of their certificates is stored: when that is done, in threads, depends on the disk."""
    directory.mkdir()
    config = directory / "sds-agent.yaml"
    given = {
        "trust_domain": "demo.example",
        "state_dir": str(directory),
        "keep_certificates": False,
        "sds": {"socket": str(directory / "sds.sock")},
        "workloads": [{"name": f"w{each}", "spiffe_id": f"spiffe://demo.example/w{each}"} for each in range(number)],
    }
    config.write_text(json.dumps(given))
    return load(config, {}).settings


async def main(directory: Path, numbers: list[int]) -> None:
    """One after another."""
    for place, number in enumerate(numbers):
        print(json.dumps(await count(directory / str(place), number)), flush=True)


if __name__ == "__main__":
    tracemalloc.start()
    asyncio.run(main(Path(sys.argv[1]), [int(each) for each in sys.argv[2:]]))
