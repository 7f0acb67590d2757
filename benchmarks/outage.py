"""An outage of the CA between two Envoys that speak mTLS: which requests fail, and when.

    python benchmarks/outage.py [LIFETIME] [LIFETIMES]

`sds-agent ca serve` issues certificates of LIFETIME seconds (20) for two real Envoys on one agent, which stores them.
The CA is stopped; soon after it the agent is killed and started again; the CA comes back after so many LIFETIMES (10).
A client sends twenty requests a second, each with a new handshake between the Envoys. Certificates end one lifetime
after their issue, whatever the agent does: a request that fails before that, or after the CA is back and has issued, is
one too many.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import anyio
import httpx
from bench.program import numbers
from bench.starts import seconds_to_first_secret
from sds_agent_proto import sds_pb2

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from demo_app import files, server
from demo_app.play import _envoy, _listener_port

COMMAND = str(Path(sys.executable).with_name("sds-agent"))
IDENTITIES = {"web": files.WEB, "backend": files.BACKEND}
QUESTION = sds_pb2.DiscoveryRequest(resource_names=["web"]).SerializeToString()
PAUSE = 0.05


class Node:
    """The CA, the agent and two Envoys in one directory."""

    def __init__(self, directory: Path, lifetime: int) -> None:
        self.places = files.Places(directory)
        self.directory = directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.ca_port = free.getsockname()[1]
        for arguments in (
            ("ca", "root", str(directory / "root"), "--trust-domain", "demo.example"),
            ("ca", "intermediate", str(directory / "ca"), "--root", str(directory / "root"), "--name", "cluster1"),
        ):
            subprocess.run([COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL)
        self.ca_file = _written(directory / "ca.yaml", self._ca())
        self.agent_file = _written(directory / "agent-outage.yaml", self._agent(lifetime))

    def _ca(self) -> dict[str, object]:
        return {
            "trust_domain": "demo.example",
            "listen": f"127.0.0.1:{self.ca_port}",
            "server_names": ["localhost", "127.0.0.1"],
            "signer": {"cacerts": str(self.directory / "ca")},
            "callers": {"mtls": True, "join_tokens": str(self.directory / "tokens")},
            "audit": str(self.directory / "audit"),
        }

    def _agent(self, lifetime: int) -> dict[str, object]:
        """The agent's configuration: an authority for each token, which is made here."""
        authorities: dict[str, object] = {}
        self.provision()
        for name in IDENTITIES:
            authorities[name] = {
                "type": "istio",
                "address": f"127.0.0.1:{self.ca_port}",
                "ca_file": str(self.directory / "ca" / "root-cert.pem"),
                "server_name": "localhost",
                "token_file": str(self.directory / f"{name}.token"),
            }
        return {
            "trust_domain": "demo.example",
            "state_dir": str(self.directory / "state"),
            "sds": {"socket": str(self.places.socket)},
            "authorities": authorities,
            "workloads": [
                {"name": name, "spiffe_id": identity, "ttl": f"{lifetime}s", "authority": name}
                for name, identity in IDENTITIES.items()
            ],
        }

    def provision(self) -> None:
        """Make a join token for each identity: the first is spent, and no certificate proves it after its end."""
        for name, identity in IDENTITIES.items():
            token = self.directory / f"{name}.token"
            token.unlink(missing_ok=True)
            command = [COMMAND, "ca", "token", str(self.ca_file), identity, "--output", str(token)]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a program that writes to a log in the directory."""
        log = (self.directory / "log").open("ab")
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory)

    def ends(self) -> datetime:
        """The first end among the certificates that the agent logged last."""
        newest: dict[str, str] = {}
        for line in (self.directory / "log").read_text(errors="replace").splitlines():
            if line.startswith("{") and (event := json.loads(line)).get("event") in {"issued", "renewed", "restored"}:
                newest[event["workload"]] = event["not_after"]
        return min(map(datetime.fromisoformat, newest.values()))


def _written(file: Path, content: dict[str, object]) -> Path:
    file.write_text(json.dumps(content))
    return file


class Traffic(threading.Thread):
    """Requests from now until `ended`; each is the time and what went wrong, if anything did."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.url = f"http://127.0.0.1:{port}/"
        self.seen: list[tuple[float, str]] = []
        self.ended = threading.Event()

    def run(self) -> None:
        """Send them."""
        with httpx.Client(timeout=5, trust_env=False) as client:
            while not self.ended.wait(PAUSE):
                begun = time.time()
                try:
                    answer = client.get(self.url)
                    self.seen.append((begun, "" if answer.status_code == 200 else f"status {answer.status_code}"))
                except httpx.HTTPError as error:
                    self.seen.append((begun, type(error).__name__))


@contextlib.contextmanager
def ending(program: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """End the program with the context."""
    try:
        yield program
    finally:
        program.terminate()
        program.wait()


def measured(node: Node, lifetime: int, lifetimes: int) -> None:
    """Run it and print what was seen."""
    agent = [COMMAND, "run", str(node.agent_file), "--log-format", "json"]
    with contextlib.ExitStack() as stack:
        ca = node.start(COMMAND, "ca", "serve", str(node.ca_file))
        running = node.start(*agent)
        upstream = stack.enter_context(server.listening())
        behind = stack.enter_context(
            ending(node.start(_envoy(), "--disable-hot-restart", "-c", str(files.server(node.places, upstream))))
        )
        port = anyio.run(_listener_port, node.places.admin("envoy-b"))
        front = stack.enter_context(
            ending(node.start(_envoy(), "--disable-hot-restart", "-c", str(files.client(node.places, port))))
        )
        traffic = Traffic(anyio.run(_listener_port, node.places.admin("envoy-a")))
        time.sleep(2)
        traffic.start()
        time.sleep(lifetime)  # the certificates are renewed once or more
        ca.terminate()
        ca.wait()
        outage = time.time()
        time.sleep(lifetime / 10)
        running.send_signal(signal.SIGKILL)
        running.wait()
        again = seconds_to_first_secret(agent, node.places.socket, question=QUESTION)
        running = node.start(*agent)
        time.sleep(lifetime / 10)
        end = node.ends().timestamp()
        time.sleep(max(0.0, outage + lifetime * lifetimes - time.time()))
        node.provision()
        ca, back = stack.enter_context(ending(node.start(COMMAND, "ca", "serve", str(node.ca_file)))), time.time()
        time.sleep(lifetime)
        traffic.ended.set()
        traffic.join()
        stack.callback(running.wait)
        stack.callback(running.terminate)
        assert front.poll() is behind.poll() is ca.poll() is None
    report(traffic.seen, outage, end, back, again)


def report(seen: list[tuple[float, str]], outage: float, end: float, back: float, again: float) -> None:
    """Print it."""
    early = [(at, why) for at, why in seen if why and at < end]
    good_again = next((at for at, why in seen if at > back and not why), None)
    late = [why for at, why in seen if why and good_again is not None and at > good_again]
    print(f"requests: {len(seen)}; the outage took {back - outage:.0f} s; the first certificate to end did so")
    print(f"{end - outage:.1f} s after its begin")
    print(f"failed before that: {len(early)} of {sum(at < end for at, _ in seen)} {early[:3]}")
    first_failed = next((at for at, why in seen if why and at >= end), None)
    if first_failed is not None:
        print(f"the first that failed came {first_failed - end:.2f} s after that end")
    print(f"the killed agent's first secret, from exec: {again:.3f} s, the CA still down")
    if good_again is None:
        print("no request succeeded after the CA was back")
    else:
        print(
            f"the first good request came {good_again - back:.1f} s after the CA was back; failed after it: {len(late)}"
        )


def main() -> None:
    """Measure and print."""
    lifetime, lifetimes = numbers(__doc__, lifetime=(20, 5), lifetimes=(10, 1))
    with tempfile.TemporaryDirectory(prefix="o") as directory:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        measured(Node(Path(directory), lifetime), lifetime, lifetimes)


if __name__ == "__main__":
    main()
