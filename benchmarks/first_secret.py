"""From exec to the first secret: the agent on its embedded CA, beside a bare grpc.aio server.

    python benchmarks/first_secret.py [RUNS]

The agent is the installed command, as a service manager would start it. They are started in turn, so that a machine
whose speed drifts slows all alike; the ratio is taken run by run. A warm client dials until it is served. The bare
server (floor.py) makes one P-256 key and a self-signed certificate and gives those bytes to every client: it is the
least that a Python program on gRPC needs to serve a secret. The agent is started with a configuration file and without
one, where it reads no YAML. Both serve the certificate that they stored; a third agent stores none and has to get one.
One run of each comes first and is not counted: it writes Python's compiled files, and the agent's root.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
from sds_agent_proto import sds_pb2

METHOD = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"
QUESTION = sds_pb2.DiscoveryRequest(resource_names=["default"]).SerializeToString()
TIMEOUT = 20.0

CONFIG = """
trust_domain: demo.example
state_dir: {0}/state
sds: {{socket: {0}/agent.sock}}
workloads: [{{name: default, spiffe_id: spiffe://demo.example/default}}]
keep_certificates: {1}
"""


def seconds_to_first_secret(
    command: Sequence[str], socket: Path, then: Callable[[int], None] | None = None, question: bytes = QUESTION
) -> float:
    """Start the server, ask for a secret as soon as its socket is there, and end it. `then` gets its pid before."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    if command[-1] == "run":
        environment |= {"SDS_AGENT__SDS__SOCKET": str(socket), "SDS_AGENT__STATE_DIR": str(socket.with_name("state"))}
    started = time.perf_counter()
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not socket.exists():
            if server.poll() is not None or time.perf_counter() - started > TIMEOUT:
                sys.exit(f"{command[0]} did not serve at {socket}")
            time.sleep(0.0005)
        with grpc.insecure_channel(f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(METHOD)
            next(iter(call(iter([question]), wait_for_ready=True, timeout=TIMEOUT)))
            taken = time.perf_counter() - started
        if then is not None:
            then(server.pid)
        return taken
    finally:
        server.terminate()
        server.wait()
        socket.unlink(missing_ok=True)


def main() -> None:
    """Measure and print."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with tempfile.TemporaryDirectory() as directory:
        config, forgetful = (Path(directory, f"{name}.yaml") for name in ("sds-agent", "forgetful"))
        config.write_text(CONFIG.format(directory, "true"))
        forgetful.write_text(CONFIG.format(f"{directory}/forgetful", "false"))
        floor = Path(__file__).with_name("floor.py")
        agent = [str(Path(sys.executable).with_name("sds-agent")), "run"]
        commands = {
            "agent with a file": ([*agent, str(config)], Path(directory) / "agent.sock"),
            "agent that keeps none": ([*agent, str(forgetful)], Path(directory) / "forgetful" / "agent.sock"),
            "agent without a file": (agent, Path(directory) / "agent.sock"),
            "floor": ([sys.executable, str(floor), f"{directory}/floor.sock"], Path(directory) / "floor.sock"),
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(runs + 1):
            for name, (command, socket) in commands.items():
                times[name].append(seconds_to_first_secret(command, socket))
    for name, taken in times.items():
        counted = sorted(taken[1:])
        ratio = statistics.median(a / b for a, b in zip(taken[1:], times["floor"][1:], strict=True))
        low, middle, high = counted[0], statistics.median(counted), counted[-1]
        print(f"{name:21}  min {low:.3f} s  median {middle:.3f} s  max {high:.3f} s  {ratio:.2f} times the floor")


if __name__ == "__main__":
    main()
