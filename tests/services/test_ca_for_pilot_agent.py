"""What Istio's pilot-agent needs of our CA beyond the protocol; scripts/istio-interop shows it with the real one."""

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from cryptography import x509
from fakes.ca_servers import WEB, Served, Shifted, served

from sds_agent.pki.certificates import subject_alternative_uris

PILOT_AGENTS_CSR = """\
-----BEGIN CERTIFICATE REQUEST-----
MIIBAzCBqwIBADALMQkwBwYDVQQKEwAwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AARm0JFw+IbcHf6jj3dgkSeIQMLFBxu+LujA4dtVMmGs/PP9Sw36lLLMcBEvV22A
pL5eNMdGOCp1v+eILEKQTVQAoD4wPAYJKoZIhvcNAQkOMS8wLTArBgNVHREBAf8E
ITAfhh1zcGlmZmU6Ly9kZW1vLmV4YW1wbGUvbnMvL3NhLzAKBggqhkjOPQQDAgNH
ADBEAiBe1y98Bfp/mHkWbSBb/r8QScVQqAy0uQSj1C4iNL3cDgIgFjpFbWTephBu
ipnuSj/7TpiN9AXSx0/9rlPG8i+Bhbs=
-----END CERTIFICATE REQUEST-----
"""
"""As Istio's pilot-agent of August 2026 wrote it, where it knew neither namespace nor account: with the subject `O=`
and the URI `spiffe://demo.example/ns//sa/`.
"""


@pytest.fixture
async def ca(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as it:
        yield it


async def test_the_request_of_a_pilot_agent_that_does_not_know_who_it_is_is_good(ca: Served) -> None:
    """Its token says that. It names no signer and no cluster, with empty words for both."""
    got = await ca.ask(
        ca.issuer.token(), csr=PILOT_AGENTS_CSR, metadata={"CertSigner": ""}, headers=[("clusterid", "")]
    )
    assert subject_alternative_uris(got.leaf) == (WEB,)
    assert got.leaf.public_key() == x509.load_pem_x509_csr(PILOT_AGENTS_CSR.encode()).public_key()
    assert got.leaf.subject.rdns == []


async def test_a_connection_ends_with_its_certificate(tmp_path: Path) -> None:
    """A pilot-agent that renewed on it comes back with the newer one; on the old connection it would be refused."""
    clock = Shifted()
    async with served(tmp_path, clock=clock) as ca:
        identity = await ca.ask(ca.issuer.token())
        clock.ahead = identity.leaf.not_valid_after_utc - datetime.now(UTC) - timedelta(milliseconds=500)
        context = identity.context(tmp_path)
        context.set_alpn_protocols(["h2"])
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # with empty settings
        await anyio.to_thread.run_sync(listen_until_the_end, ca.address, context, preface)


def listen_until_the_end(address: str, context: ssl.SSLContext, first: bytes) -> None:
    """Connect, say something, and read until the server closes the connection."""
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection,
    ):
        connection.sendall(first)
        with suppress(ssl.SSLEOFError):  # the end may come without a farewell
            while connection.recv(4096):
                pass
