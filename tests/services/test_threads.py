"""No thread can be started, as at a container's limit of processes: what needs one fails, or does without, and is
tried again.
"""

import json
import subprocess
from typing import Any

import pytest
from fakes.limits import as_user, users_directory

BEGIN = """
import asyncio, json, logging, os, resource, sys
from datetime import timedelta
from pathlib import Path
from sds_agent import log
soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
def threads(*, some):
    resource.setrlimit(resource.RLIMIT_NPROC, (soft if some else 0, hard))
"""
CALLS = """
from sds_agent.ca.service import Signers
from sds_agent.tasks import NoThreadError, TimeLimit, NonBlockingLookups, in_thread

async def outcome(coroutine):
    try:
        return str(await coroutine)
    except (NoThreadError, OSError) as error:
        return f"{type(error).__name__}: {error}"

timeout, signers = TimeLimit(5), Signers(1)

async def ask():
    look_up = asyncio.get_running_loop().getaddrinfo("127.0.0.1", 80)
    calls = in_thread(len, "abc"), signers.call(lambda: len("abc")), timeout.call(len, "abc"), look_up
    return [await outcome(each) for each in calls]

def run():
    with asyncio.Runner(loop_factory=NonBlockingLookups) as runner:
        return runner.run(ask())

threads(some=False)
without = run()
threads(some=True)
print(json.dumps({"without": without, "again": run()}))
"""
LOG = """
threads(some=False)
reader, writer = os.pipe()
os.set_blocking(reader, False)
log.configure("json", stream=os.fdopen(writer, "w"))
for number in range(3000):  # more than a pipe takes
    log.event(logging.getLogger("sds_agent"), "line", number=number)
lines = b""
for _ in range(20):
    try:
        lines += os.read(reader, 1 << 20)
    except BlockingIOError:
        break
    logging.getLogger("sds_agent").handlers[0].flush()
print(json.dumps([json.loads(line)["number"] for line in lines.splitlines()]))
"""
AUTHORITIES = """
from sds_agent.authority.in_process import InProcessAuthority
from sds_agent.authority.protocol import IssueRequest
from sds_agent.cli.main import main
from sds_agent.clock import SystemClock
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, generate
from sds_agent.signing.plugged import PluggedCa
from sds_agent.signing.self_signed import SelfSignedCa

class Later(SystemClock):
    later = timedelta()
    def now(self):
        return super().now() + self.later

async def plugged(folder, clock):
    assert main(["ca", "root", str(folder / "root"), "--trust-domain", "demo.example"]) == 0
    assert main(["ca", "intermediate", str(folder / "ca"), "--root", str(folder / "root"), "--name", "one"]) == 0
    ca = await PluggedCa.open(folder / "ca", trust_domain="demo.example", passphrase_file=None, clock=clock)
    return InProcessAuthority(ca, "the plugged CA", clock, timedelta(seconds=5))

async def embedded(folder, clock):
    key, life = KeyType.RSA_2048, timedelta(days=9)
    ca = await SelfSignedCa.open(
        folder, trust_domain="demo.example", key_type=key, lifetime=life, clock=clock, setting="state_dir"
    )
    return InProcessAuthority(ca, "the embedded CA", clock, timedelta(minutes=5))

clock = Later()
authority = asyncio.run({"plugged": plugged, "embedded": embedded}[sys.argv[2]](Path(sys.argv[1]), clock))
clock.later = timedelta(days=8)  # a new root is due

async def ask():
    uri = "spiffe://demo.example/x"
    csr = make_csr(generate(KeyType.EC_P256), uri)
    request = IssueRequest(SpiffeId.parse(uri), csr, timedelta(hours=1), "1")
    return (await authority.issue(request)).chain_pem.startswith(b"-----BEGIN")

threads(some=False)
print(json.dumps(asyncio.run(ask())))
"""
MODULES = [
    "concurrent.futures.thread",
    "encodings.idna",
    "json",
    "sds_agent.ca.service",
    "sds_agent.cli.main",
    "sds_agent.log",
    "shutil",
    "uuid",
]


def outcome(program: str, *arguments: str, modules: list[str] = MODULES) -> Any:
    """What the program says at last, and what it logs."""
    command = [*as_user(BEGIN + program, modules=modules), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_needs_a_thread_says_that_there_is_none_and_works_again_afterwards() -> None:
    found = outcome(CALLS)
    in_thread, signers, timeout, look_up = found["without"]
    assert in_thread.startswith("NoThreadError: no thread can be started: ")
    assert signers == timeout == in_thread
    assert look_up.startswith("gaierror: [Errno -3] no thread can be started: ")
    assert found["again"][:3] == ["3", "3", "3"], "and no place was reserved for what did not begin"
    assert "127.0.0.1" in found["again"][3]


def test_every_line_of_the_log_comes_in_order_without_a_thread_to_write_it() -> None:
    """A log that is not read for a moment would end the agent."""
    assert outcome(LOG) == list(range(3000))


@pytest.mark.parametrize("authority", ["plugged", "embedded"])
def test_a_ca_in_the_agent_signs_on_though_it_cannot_look_for_a_new_one(authority: str) -> None:
    """The one reads its directory in a thread, the other makes the key of its next root in one."""
    modules = [*MODULES, "sds_agent.authority.cacerts", "sds_agent.authority.embedded", "sds_agent.cli.ca_intermediate"]
    with users_directory() as directory:
        assert outcome(AUTHORITIES, str(directory), authority, modules=modules)
