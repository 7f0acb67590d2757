"""What one certificate costs the CA server, counted: on no machine does it take more than this."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fakes.ca_servers import WEB, Identity, Served, ask, fresh, plug, rsa_key, served
from fakes.calls import Calls, counted
from fakes.clocks import HandClock
from fakes.hierarchy import Key

from sds_agent.pki.certificates import write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, generate

REQUESTS = 50
"""So many that what is done once does not count."""
MOST_CALLS = 187
"""Calls of our own functions for one certificate; 174 by token and 164 by certificate when this was written."""
ONCE = (
    "NoneType.load_pem_x509_csr",  # cryptography's own functions have no module
    "_fault_of_possession",
    "AuditLog.write",
    "NoneType.load_der_x509_certificate",
)


async def certificates(ca: Served, token: str | None, identity: Identity | None) -> Calls:
    """What REQUESTS certificates cost a server that has already issued some to that caller."""
    key = generate(KeyType.EC_P256)
    csr = make_csr(key, WEB).decode()
    async with ca.connected(identity) as channel:
        await ask(channel, token, key=key, csr=csr)
        with counted() as calls:
            for _ in range(REQUESTS):
                await ask(channel, token, key=key, csr=csr)
    return calls


@asynccontextmanager
async def signing(directory: Path, key: Key | None = None) -> AsyncIterator[Served]:
    """A CA that does nothing by time, which a busy machine would have it do among the requests: its clock stands still,
    and it has no state of its own to look after.
    """
    root = fresh("root")
    signer = fresh("signer", root, key)
    plug(directory / "cacerts", signer, [signer], [root])
    clock, roots = HandClock(datetime.now(UTC)), write_pem([root.certificate])
    async with served(directory, signer="{cacerts: cacerts}", clock=clock, roots=roots) as ca:
        await ca.ask(ca.issuer.token())  # what follows has no first time any more
        yield ca


def named(calls: Calls, part: str) -> int:
    return sum(count for name, count in calls.of.items() if part in name)


@pytest.mark.parametrize("by_certificate", [False, True])
async def test_a_certificate_costs_one_reading_one_signature_one_line_and_no_thread(
    tmp_path: Path, *, by_certificate: bool
) -> None:
    """A fleet that renews at once waits for the sum of these."""
    async with signing(tmp_path) as ca:
        token = ca.issuer.token("RS256")
        identity = await ca.ask(token) if by_certificate else None
        calls = await certificates(ca, None if by_certificate else token, identity)
    assert {name: calls.of[name] for name in ONCE} == dict.fromkeys(ONCE, REQUESTS)
    assert calls.of["ECPrivateKey.sign"] == REQUESTS
    assert calls.of["CertificateService._create"] == 2 * REQUESTS, "begun, and gone on when the request was there"
    assert named(calls, "create_x509_certificate") == 0, "a builder encodes anew what a template has"
    assert calls.of["ECPublicKey.verify"] == REQUESTS, "of the CSR"
    assert calls.of["RSAPublicKey.verify"] == 0, "the token was verified when it was new"
    assert named(calls, "load_pem_x509_certificate") == named(calls, "_parse_all") == 0
    assert named(calls, "start_new_thread") == named(calls, "run_in_executor") == 0
    assert calls.of["posix.open"] <= REQUESTS, "no file is opened but the audit log"
    assert calls.ours <= MOST_CALLS * REQUESTS


async def test_a_certificate_of_an_rsa_signer_costs_one_hop_to_a_thread(tmp_path: Path) -> None:
    """A signature would hold up the event loop, and all other callers, for a millisecond or more."""
    async with signing(tmp_path, rsa_key()) as ca:
        calls = await certificates(ca, ca.issuer.token("RS256"), None)
    assert calls.of["BaseEventLoop.run_in_executor"] == REQUESTS
    assert calls.of["RSAPrivateKey.sign"] == 0, "it ran on the event loop"
    assert calls.of["CertificateService._create"] == 3 * REQUESTS, "gone on when the signature was there, too"
    assert {name: calls.of[name] for name in ONCE[:-1]} == dict.fromkeys(ONCE[:-1], REQUESTS)


async def test_a_join_token_costs_two_hops_to_a_thread_that_is_there_and_no_file(tmp_path: Path) -> None:
    """To begin a thread, and a wait for the disk, cost more than the rest of a certificate does."""
    async with signing(tmp_path) as ca:
        tokens = [ca.join_token() for _ in range(REQUESTS)]
        key = generate(KeyType.EC_P256)
        csr = make_csr(key, WEB).decode()
        async with ca.connected() as channel:
            await ask(channel, ca.join_token(), key=key, csr=csr)
            with counted() as calls:
                for token in tokens:
                    await ask(channel, token, key=key, csr=csr)
    assert calls.of["SimpleQueue.put"] == 2 * REQUESTS, "to find its record, and to spend it"
    assert named(calls, "start_new_thread") == 0
    assert calls.of["posix.open"] <= REQUESTS, "no file is opened on the event loop but the audit log"
    marks = list((tmp_path / "tokens").glob("*.spent"))
    assert len(marks) == REQUESTS + 1
    assert all(each.is_symlink() for each in marks), "a mark with a content would have to be on the disk by itself"
    assert len(list((tmp_path / "tokens").iterdir())) == 2 * len(marks)
