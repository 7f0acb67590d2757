"""One start of a server of secrets, from exec until a client that waits for it has its first secret."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import grpc
from msgspec import Struct
from sds_agent_proto import sds_pb2

from bench import processes
from bench.program import MissingError, environment

METHOD = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"
QUESTION = sds_pb2.DiscoveryRequest(node=sds_pb2.Node(id="bench"), resource_names=["default"]).SerializeToString()
"""With a node: some servers end a stream whose client does not say who it is."""
TIMEOUT = 20.0

CONFIG = """
trust_domain: demo.example
state_dir: {0}/state
sds: {{socket: {0}/agent.sock}}
workloads: [{{name: default, spiffe_id: spiffe://demo.example/default}}]
keep_certificates: {1}
"""
"""An agent on its embedded CA. 0: its directory; 1: whether it stores its certificates."""


class Program(Struct, frozen=True):
    """A server: its command line, the socket that it makes, and what the environment has beside the usual."""

    command: Sequence[str]
    socket: Path
    extra: Mapping[str, str] = {}
    forgets: Path | None = None
    """A directory that is removed before each start."""


class Start(Struct, frozen=True):
    """What a start took. The user time is that of the whole life of the process, its end left out: it was killed."""

    seconds: float
    processor_ms: float
    """Until the first secret, of the user and of the kernel."""
    resident_mb: float
    """After `settled` seconds."""
    user_ms: float


def start(program: Program, settled: float) -> Start:
    """Start the program, read its memory so many seconds after its first secret, and kill it. Raises MissingError."""
    if program.forgets is not None:
        shutil.rmtree(program.forgets, ignore_errors=True)
    program.socket.unlink(missing_ok=True)
    began = time.perf_counter()
    server = _popen(program.command, program.extra)
    try:
        _wait_for(server, program.command, program.socket, began)
        _ask(program.socket, QUESTION)
        seconds = time.perf_counter() - began
        processor = processes.precise_ms(server.pid)
        time.sleep(settled)
        resident = processes.resident_mb(server.pid)
    finally:
        server.send_signal(signal.SIGKILL)
        _, status, usage = os.wait4(server.pid, 0)
        server.returncode = os.waitstatus_to_exitcode(status)
        program.socket.unlink(missing_ok=True)
    return Start(seconds, processor, resident, usage.ru_utime * 1000)


def seconds_to_first_secret(
    command: Sequence[str], socket: Path, then: Callable[[int], None] | None = None, question: bytes = QUESTION
) -> float:
    """Start the server, ask for a secret as soon as its socket is there, and end it in order. `then` gets its pid
    before. Raises MissingError.
    """
    began = time.perf_counter()
    server = _popen(command, {})
    try:
        _wait_for(server, command, socket, began)
        _ask(socket, question)
        taken = time.perf_counter() - began
        if then is not None:
            then(server.pid)
        return taken
    finally:
        server.terminate()
        server.wait()
        socket.unlink(missing_ok=True)


def _popen(command: Sequence[str], extra: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environment(extra), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _wait_for(server: subprocess.Popen[bytes], command: Sequence[str], socket: Path, began: float) -> None:
    while not socket.exists():
        if server.poll() is not None or time.perf_counter() - began > TIMEOUT:
            raise MissingError(f"{shlex.join(command)} does not serve at {socket}")
        time.sleep(0.0005)


def _ask(socket: Path, question: bytes) -> None:
    with grpc.insecure_channel(f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(METHOD)
        next(iter(call(iter([question]), wait_for_ready=True, timeout=TIMEOUT)))
