"""The program behind scripts/compose-demo: it starts docker-compose.yml, disturbs it, and reports what it saw.

It uses the standard library alone, because it runs with the machine's own Python.
"""

import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

PROJECT = "sds-agent-demo"
"""The name of our own project: `docker compose up` in this directory has another."""
HOST = "127.0.0.1"
WEB_PORT = os.environ.get("WEB_PORT", "8000")
BACKEND_ENVOY_PORT = os.environ.get("BACKEND_ENVOY_PORT", "10443")
WEB_ID = "spiffe://demo.example/ns/default/sa/web"
BACKEND_ID = "spiffe://demo.example/ns/default/sa/backend"
LIFETIME = 90.0
"""Seconds that the certificates live, as the agents' configurations say."""
CA_AWAY = 35.0
"""Seconds without a CA. Both renewals fall due meanwhile: after a third of the lifetime, give or take five seconds."""
TIMEOUT = 120.0
"""Seconds within which each event has to happen."""
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Sends requests past the proxy that the environment may name."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KILL = """
import os
for process in map(int, filter(str.isdigit, os.listdir("/proc"))):
    if process not in (1, os.getpid()) and b"sds-agent" in open(f"/proc/{process}/cmdline", "rb").read():
        os.kill(process, 9)
"""
"""Runs inside an agent's container and kills the agent, but not the init that is its parent."""


class NotSeenError(Exception):
    """An event that should have happened did not."""


class Observer:
    """Reads the certificate of one side again and again, in a thread, and records each new one."""

    def __init__(self, who: str, serial: Callable[[], str], pause: float) -> None:
        self.who = who
        self.good = 0
        self.failures: list[str] = []
        self.serials: list[str] = []
        self._serial = serial
        self._pause = pause
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=who)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Read inside this context."""
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()

    @property
    def renewals(self) -> int:
        """How often the certificate changed."""
        return max(len(self.serials) - 1, 0)

    def _run(self) -> None:
        while not self._over.wait(self._pause):
            try:
                serial = self._serial().lower()
            except Exception as error:  # noqa: BLE001 - any error means that this request failed
                self.failures.append(f"{time.strftime('%H:%M:%S')} {self.who}: {error}")
            else:
                self._add(serial)

    def _add(self, serial: str) -> None:
        self.good += 1
        if self.serials[-1:] != [serial]:
            self.serials.append(serial)
            which = f"renewal {self.renewals}" if self.renewals else "the first"
            say(f"{self.who} shows certificate {serial[:8]} ({which})")


class Wire:
    """The certificate that backend-envoy presents, read from a handshake of our own and checked against the root."""

    def __init__(self, root: str) -> None:
        self._context = ssl.create_default_context(cadata=root)
        self._context.check_hostname = False  # the certificate names a SPIFFE ID and no host

    def serial(self) -> str:
        """The serial number. Raises OSError if the handshake fails and ValueError for a certificate of another."""
        with (
            socket.create_connection((HOST, int(BACKEND_ENVOY_PORT)), timeout=5) as connection,
            self._context.wrap_socket(connection) as tls,
        ):
            certificate = tls.getpeercert() or {}
        if certificate.get("subjectAltName") != (("URI", BACKEND_ID),):
            raise ValueError(f"the certificate is for {certificate.get('subjectAltName')}")
        return str(certificate["serialNumber"])


def ask() -> str:
    """Send one request to web, which calls backend; returns the serial of the certificate that web-envoy called with.

    Raises OSError if the request fails, and ValueError if one of the two has another identity.
    """
    try:
        with DIRECT.open(f"http://{HOST}:{WEB_PORT}/", timeout=10) as answer:
            call: dict[str, str] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise OSError(f"{error.code}, {error.read(500).decode(errors='replace').strip()}") from error
    if (call["caller"], call["called"]) != (WEB_ID, BACKEND_ID):
        raise ValueError(f"{call['caller']} called {call['called']}")
    return call["caller_serial"]


def say(text: str) -> None:
    """Print a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def until(happened: Callable[[], bool], what: str) -> float:
    """Wait until `happened` returns true; returns the seconds that took. Raises NotSeenError after TIMEOUT."""
    start = time.monotonic()
    while not happened():
        if time.monotonic() > start + TIMEOUT:
            raise NotSeenError(f"{what}: not seen within {TIMEOUT:.0f} s")
        time.sleep(0.2)
    return time.monotonic() - start


class Containers:
    """The containers of docker-compose.yml, under a project name of our own."""

    def __init__(self, compose: Sequence[str]) -> None:
        self._compose = [*compose, "-f", "docker-compose.yml", "-p", PROJECT]

    def compose(self, *arguments: str) -> str:
        """Run a command of Compose and return its output. Raises NotSeenError with that output if it fails."""
        return run([*self._compose, *arguments])

    def state(self, service: str, form: str) -> str:
        """A part of a container's state, as `docker inspect --format` writes it. Raises NotSeenError."""
        container = self.compose("ps", "-q", service).strip()
        return run(["docker", "inspect", "--format", form, container]).strip()

    def healthy(self, service: str) -> bool:
        """Whether its health check says so. Raises NotSeenError."""
        return self.state(service, "{{.State.Health.Status}}") == "healthy"

    def last_lines(self) -> str:
        """The newest lines of every container's log."""
        try:
            return self.compose("logs", "--no-color", "--tail", "15") if self.left() else ""
        except NotSeenError as error:
            return str(error)

    def left(self) -> list[str]:
        """The ids of this project's containers, volumes and networks."""
        mine = f"label=com.docker.compose.project={PROJECT}"
        kinds = (["ps", "-a"], ["volume", "ls"], ["network", "ls"])
        return [each for kind in kinds for each in run(["docker", *kind, "-q", "--filter", mine]).split()]

    def down(self) -> None:
        """Remove everything, the volumes too. Raises NotSeenError."""
        for _ in range(3):  # what an interrupted `up` had just asked for may appear after the first
            if self.left():
                self.compose("down", "-v", "--remove-orphans", "--timeout", "5")
        if left := self.left():
            raise NotSeenError(f"docker still has {', '.join(left)}: remove them with docker rm, volume rm, network rm")


def run(command: Sequence[str]) -> str:
    """Run a command and return its output. It gets SIGTERM for our Ctrl-C, so that it ends in order.

    Raises NotSeenError with its output if it fails.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, process_group=0
    ) as child:
        try:
            out, errors = child.communicate()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            raise
    if child.returncode:
        raise NotSeenError(f"{' '.join(command)} failed:\n{(out + errors)[-3000:].strip()}")
    return out


class Story:
    """What happens to the containers, and what their users see meanwhile."""

    def __init__(self, containers: Containers, root: str) -> None:
        self._containers = containers
        self._web = Observer("web-envoy", ask, 0.02)
        self._backend = Observer("backend-envoy", Wire(root).serial, 0.2)
        self._ca_away = 0.0
        self._returned_after = 0.0

    def run(self) -> None:
        """Play it. Raises NotSeenError, also as soon as a request or a handshake fails."""
        with self._web.observing(), self._backend.observing():
            self._renewals()
            self._ca_is_away()
            self._agent_is_killed()
        self._check()
        say(f"the requests end; {self._counts()}")

    def _check(self) -> None:
        for failure in self._web.failures + self._backend.failures:
            raise NotSeenError(f"a request failed at {failure}")

    def _until(self, happened: Callable[[], bool], what: str) -> float:
        def happened_without_failure() -> bool:
            self._check()
            return happened()

        return until(happened_without_failure, what)

    def _renewals(self) -> None:
        self._until(lambda: min(self._web.renewals, self._backend.renewals) >= 2, "two renewals of both agents")
        say(f"both agents have renewed twice; {self._counts()}")

    def _ca_is_away(self) -> None:
        self._containers.compose("stop", "ca")
        stopped = time.monotonic()
        say(f"the CA is stopped for {CA_AWAY:.0f} s: certificates live {LIFETIME:.0f} s and are renewed after a third")
        self._until(lambda: time.monotonic() > stopped + CA_AWAY, "the end of the time without a CA")
        web, backend = self._web.renewals, self._backend.renewals
        self._containers.compose("start", "ca")
        self._ca_away = time.monotonic() - stopped
        say(f"the CA is back after {self._ca_away:.0f} s; {self._counts()}")
        self._until(
            lambda: self._web.renewals > web and self._backend.renewals > backend,
            "a renewal of both agents after the CA came back",
        )
        say("both agents have renewed before their certificates ran out")

    def _agent_is_killed(self) -> None:
        before = self._started()
        renewals = self._backend.renewals
        with suppress(NotSeenError):  # the container may end before the command in it; the effect is seen next
            self._containers.compose("exec", "-T", "backend-agent", "python3", "-c", KILL)
        say("the process of backend-agent is killed (-9); its Envoy goes on with the certificate that it has")
        self._returned_after = self._until(
            lambda: self._started() != before and self._containers.healthy("backend-agent"), "the agent's return"
        )
        say(f"backend-agent is back and ready after {self._returned_after:.0f} s; {self._counts()}")
        self._until(lambda: self._backend.renewals > renewals, "a renewal by the agent that came back")

    def _started(self) -> str:
        return self._containers.state("backend-agent", "{{.State.StartedAt}}")

    def _counts(self) -> str:
        return f"{self._web.good} requests answered, none failed"

    def table(self) -> str:
        """The summary, for people."""
        rows = [("", "certificates on the wire", "renewals")]
        rows += [(w.who, " ".join(s[:8] for s in w.serials), str(w.renewals)) for w in (self._web, self._backend)]
        first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
        return "\n".join(
            [
                *(f"  {who:{first}}  {serials:{second}}  {renewals:>8}" for who, serials, renewals in rows),
                "",
                f"  the CA was away      {self._ca_away:.0f} s; certificates live {LIFETIME:.0f} s",
                f"  an agent was killed  ready again after {self._returned_after:.0f} s",
                f"  requests             {self._web.good} answered, {len(self._web.failures)} failed",
                f"  handshakes           {self._backend.good} good, {len(self._backend.failures)} failed",
            ]
        )


def play(containers: Containers) -> Story:
    """Bring everything up and play the story. Raises NotSeenError."""
    say("making the image sds-agent (the first time it takes a minute or more)")
    containers.compose("build", "setup")
    say("starting the CA, then the agents of web and backend, then their Envoys")
    containers.compose("up", "-d")
    until(lambda: containers.healthy("web"), "an answer to web")
    say(f"requests flow: web -> web-envoy == mutual TLS ==> backend-envoy -> backend; watch http://{HOST}:{WEB_PORT}")
    story = Story(containers, containers.compose("exec", "-T", "web-agent", "cat", "/join/root-cert.pem"))
    story.run()
    return story


def check_ports() -> None:
    """Raises NotSeenError if a port that the containers need is not free."""
    for name, port in (("WEB_PORT", WEB_PORT), ("BACKEND_ENVOY_PORT", BACKEND_ENVOY_PORT)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, int(port)))
            except (OSError, ValueError, OverflowError) as error:
                why = error.strerror if isinstance(error, OSError) else "it is not a port number"
                raise NotSeenError(
                    f"{HOST}:{port} cannot be used ({why}): free it, or set {name} to another port"
                ) from error


@contextmanager
def alone() -> Iterator[None]:
    """Keeps a second one out, which would remove the containers of the first as what an earlier run left.

    An abstract address lasts as long as the process that has it. Raises NotSeenError while another one has it.
    """
    engine = hashlib.sha256(os.environ.get("DOCKER_HOST", "").encode()).hexdigest()[:16]
    with socket.socket(socket.AF_UNIX) as held:
        try:
            held.bind(f"\0{PROJECT}-{engine}")
        except OSError as error:
            raise NotSeenError("another one runs on this machine: start this one when that has ended") from error
        yield


@contextmanager
def taken_down(containers: Containers) -> Iterator[None]:
    """Removes the containers when the block ends, also by an error. Raises NotSeenError if some remain."""
    try:
        yield
    except NotSeenError:
        print(containers.last_lines(), end="", file=sys.stderr)
        raise
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        say("removing everything: containers, networks and volumes")
        containers.down()


def leave(number: int, _frame: object) -> None:
    """End at a signal, after every cleanup that is due."""
    sys.exit(128 + number)


def main() -> int:
    """Play it; returns the exit code."""
    for number in SIGNALS:
        signal.signal(number, leave)
    containers = Containers(sys.argv[1:])
    try:
        with alone():
            containers.down()  # what an earlier run left that was killed
            check_ports()
            with taken_down(containers):
                story = play(containers)
    except NotSeenError as error:
        print(f"compose-demo: {error}", file=sys.stderr)
        return 1
    print(f"\n{story.table()}\n\nNo request failed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
