"""Whether an agent that is killed at any moment leaves a state that the next one starts from.

    python benchmarks/kills.py [KILLS [MILLISECONDS]]

The installed command runs on its embedded CA with two workloads, certificates of five seconds and encrypted state. It
is killed (SIGKILL) at a random moment of its first MILLISECONDS (1500 unless given), KILLS times (100 unless given). No
start may find a file that it cannot use, the last has to end in a certificate under every name, and all have the first
one's root. Unfinished files are counted too: the next start removes them.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench.program import numbers

CONFIG = """
trust_domain: demo.example
state_dir: {0}/state
sds: {{socket: {0}/agent.sock}}
state_encryption: {{key_file: {0}/state.key}}
workloads:
  - {{name: a, spiffe_id: spiffe://demo.example/a, ttl: 5s}}
  - {{name: b, spiffe_id: spiffe://demo.example/b, ttl: 5s}}
log: {{format: json}}
"""
FAULTS = {"not_restored", "anchors_not_restored", "fault", "state_lost", "not_kept", "anchors_not_kept"}
EXPIRED = "expired"
LONGEST = 20.0
"""Seconds for one agent to be ready, for the last one alone."""


def run_and_kill(command: list[str], log: Path, seconds: float | None) -> list[dict[str, object]]:
    """Run the agent for so long, or until it is ready; returns its events."""
    with log.open("w") as errors:
        agent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            if seconds is not None:
                time.sleep(seconds)
            begin = time.monotonic()
            while seconds is None and '"ready"' not in log.read_text() and time.monotonic() - begin < LONGEST:
                time.sleep(0.01)
        finally:
            agent.kill()
            agent.wait()
    lines = log.read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def main() -> None:
    """Kill, count and print; exits with 1 when a state was not good."""
    kills, most = numbers(__doc__, kills=(100, 1), milliseconds=(1500, 50))
    chance = random.Random(1)  # noqa: S311 - it only chooses moments, the same in each run
    counted, bad = Counter[str](), list[object]()
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        (directory / "state.key").write_bytes(os.urandom(32))
        (directory / "state.key").chmod(0o600)
        config = directory / "sds-agent.yaml"
        config.write_text(CONFIG.format(directory))
        command = [str(Path(sys.executable).with_name("sds-agent")), "run", str(config)]
        for number in range(kills + 1):
            seconds = chance.uniform(0.05, most / 1000) if 0 < number < kills else None  # the first makes the root
            events = run_and_kill(command, directory / "log", seconds)
            counted.update(str(each["event"]) for each in events)
            bad += [each for each in events if each["event"] in FAULTS and EXPIRED not in str(each.get("cause"))]
            counted["unfinished files"] += len([*directory.glob("state/**/.*")])
            if seconds is None and "ready" not in {each["event"] for each in events}:
                bad.append(f"start {number} was not ready")
    for name in ("root_created", "restored", "issued", "renewed", "unfinished files"):
        print(f"{counted[name]:6}  {name}")
    print(f"{len(bad):6}  states that were not good after {kills} kills")
    for each in bad:
        print(each)
    sys.exit(1 if bad or counted["root_created"] != 1 else 0)


if __name__ == "__main__":
    main()
