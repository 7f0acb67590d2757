"""The program behind scripts/compose-demo: plays the story of docker-compose.yml and tells what was seen.

Only the standard library is used, as this runs with the machine's own Python.
"""

import json
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

PROJECT = "sds-agent-demo"
WEB = "http://127.0.0.1:8000/"
BACKEND_ENVOY = ("127.0.0.1", 10443)
LIFETIME = 60.0
"""Seconds that the certificates live, as the agents' configurations say."""
PATIENCE = 180.0
KILL = """
import os
for process in map(int, filter(str.isdigit, os.listdir("/proc"))):
    if process not in (1, os.getpid()) and b"sds-agent" in open(f"/proc/{process}/cmdline", "rb").read():
        os.kill(process, 9)
"""
"""Run inside an agent's container: the agent is killed, the init that is its parent is not."""


class NotSeenError(Exception):
    """Something that should have come about did not."""


class Traffic:
    """Requests through both Envoys, one after another, and the client certificates that they were made with."""

    def __init__(self) -> None:
        self.good = 0
        self.failures: list[str] = []
        self.client_serials: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """Send requests inside this context."""
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            try:
                note(self.client_serials, ask()["caller_serial"])
                self.good += 1
            except (OSError, ValueError, KeyError) as error:
                self.failures.append(f"{time.strftime('%H:%M:%S')} {error}")


class Wire:
    """The certificates that backend-envoy presents, each read from a handshake."""

    def __init__(self) -> None:
        self.serials: list[str] = []

    def look(self) -> None:
        """Read the one of this moment."""
        pem = ssl.get_server_certificate(BACKEND_ENVOY, timeout=5)
        read = subprocess.run(
            ["openssl", "x509", "-noout", "-serial"], input=pem, text=True, capture_output=True, check=True
        )
        note(self.serials, read.stdout.strip().removeprefix("serial=").lower())


def note(seen: list[str], value: str) -> None:
    """Add what is new."""
    if not seen or seen[-1] != value:
        seen.append(value)


def ask() -> dict[str, str]:
    """One request to the service web, answered by the service backend."""
    with urllib.request.urlopen(WEB, timeout=10) as answer:
        found: dict[str, str] = json.load(answer)
    return found


def say(text: str) -> None:
    """Tell what happens."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def until(told: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Wait for something that is looked at again and again. Raises NotSeenError."""
    end = time.monotonic() + patience
    while not told():
        if time.monotonic() > end:
            raise NotSeenError(f"{what}: not seen within {patience:.0f} s")
        time.sleep(0.3)


class Story:
    """The containers, the traffic and what was seen of them."""

    def __init__(self, compose: Sequence[str]) -> None:
        self._compose = [*compose, "-p", PROJECT]
        self.traffic = Traffic()
        self.wire = Wire()

    def compose(self, *arguments: str) -> str:
        """Run a command of Compose. Raises NotSeenError with what it said when it fails."""
        done = subprocess.run([*self._compose, *arguments], text=True, capture_output=True, check=False)
        if done.returncode:
            raise NotSeenError(
                f"{' '.join([*self._compose, *arguments])} failed:\n{(done.stdout + done.stderr)[-3000:]}"
            )
        return done.stdout

    def tell(self) -> None:
        """Play the whole story. Raises NotSeenError."""
        say("bringing up two services, their Envoys, their agents and the CA (the first time builds the image)")
        self.compose("up", "-d", "--build")
        until(answers, "an answer through both Envoys")
        self.wire.look()
        say("the services speak mutual TLS; requests flow from here on")
        with self.traffic.flowing():
            self._renewals(3)
            self._ca_is_away()
            self._agent_is_killed()
        say("done: no more requests")

    def _look(self, serials: int) -> bool:
        self.wire.look()
        return min(len(self.wire.serials), len(self.traffic.client_serials)) >= serials

    def _renewals(self, serials: int) -> None:
        until(lambda: self._look(serials), "two renewals of both agents")
        say(f"both agents have renewed {serials - 1} times; backend-envoy presents {self.wire.serials[-1][:8]}")

    def _ca_is_away(self) -> None:
        self.compose("stop", "ca")
        away = LIFETIME / 2 + 8
        say(f"the CA is stopped, for {away:.0f} s: longer than half of a certificate's life")
        time.sleep(away)
        before = self.wire.serials[-1], self.traffic.client_serials[-1]
        self.compose("start", "ca")
        say("the CA is back")
        until(lambda: self._look(1) and self._both_new(before), "a renewal after the CA came back")
        say("both agents have renewed again, before their certificates ran out")

    def _both_new(self, before: tuple[str, str]) -> bool:
        return self.wire.serials[-1] != before[0] and self.traffic.client_serials[-1] != before[1]

    def _agent_is_killed(self) -> None:
        before = self.started()
        subprocess.run(
            [*self._compose, "exec", "-T", "backend-agent", "python3", "-c", KILL], check=False, capture_output=True
        )
        say("the process of backend-agent is killed (-9)")
        until(lambda: self.started() != before and self._healthy("backend-agent"), "the agent's return")
        say("it is back, and ready")
        serial = self.wire.serials[-1]
        until(lambda: self._look(1) and self.wire.serials[-1] != serial, "a renewal by the agent that came back")
        say(f"and has renewed: backend-envoy presents {self.wire.serials[-1][:8]}")

    def _container(self, service: str) -> str:
        return self.compose("ps", "-q", service).strip()

    def _inspect(self, service: str, form: str) -> str:
        command = ["docker", "inspect", "--format", form, self._container(service)]
        return subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip()

    def started(self) -> str:
        """When backend-agent's container was last started."""
        return self._inspect("backend-agent", "{{.State.StartedAt}}")

    def _healthy(self, service: str) -> bool:
        return self._inspect(service, "{{.State.Health.Status}}") == "healthy"

    def down(self) -> None:
        """Take everything down, the volumes too."""
        say("taking everything down")
        subprocess.run([*self._compose, "down", "-v", "--timeout", "5"], check=False, capture_output=True)


def answers() -> bool:
    """Whether a request comes through."""
    try:
        return "caller_serial" in ask()
    except (OSError, ValueError):
        return False


def table(story: Story) -> str:
    """What was seen."""
    rows = {
        "certificates of backend-envoy": str(len(story.wire.serials)),
        "certificates of web-envoy": str(len(story.traffic.client_serials)),
        "requests that were good": str(story.traffic.good),
        "requests that failed": str(len(story.traffic.failures)),
    }
    width = max(map(len, rows))
    return "\n".join(f"  {name:{width}}  {value:>6}" for name, value in rows.items())


def interrupt(*_: object) -> None:
    """Let SIGTERM end the story as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> int:
    """Play it; returns the exit code."""
    signal.signal(signal.SIGTERM, interrupt)
    story = Story(sys.argv[1:])
    try:
        story.tell()
    except NotSeenError as error:
        print(f"compose-demo: {error}", file=sys.stderr)
        print(story.compose("logs", "--tail", "15"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        story.down()
    print(table(story))
    for failure in story.traffic.failures[:5]:
        print(f"  failed: {failure}")
    print("No request failed." if not story.traffic.failures else "Requests failed.")
    return 1 if story.traffic.failures else 0


if __name__ == "__main__":
    sys.exit(main())
