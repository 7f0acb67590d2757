"""The client of Envoy A, and one that reads the certificate that Envoy B presents."""

import ssl
import time

import anyio
import httpx
from anyio.streams.tls import TLSAttribute
from cryptography import x509

from .files import WEB
from .record import Record, short
from .view import WIRE, View

RATE = 40
"""Requests a second."""
CLIENTS = 4
HANDSHAKE_EVERY = 0.25
"""Seconds between two handshakes with Envoy B."""
TIMEOUT = 10.0


async def requests(port: int, seconds: float, record: Record, shown: View) -> None:
    """Send requests to Envoy A at an even rate for so long, and wait for the last answers."""
    end = time.monotonic() + seconds
    # trust_env: these requests must not go through a proxy that the environment names
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT, trust_env=False)
    async with client, anyio.create_task_group() as tasks:
        for number in range(CLIENTS):
            tasks.start_soon(_one_client, client, number / RATE, end, record, shown)


async def _one_client(client: httpx.AsyncClient, offset: float, end: float, record: Record, shown: View) -> None:
    due = time.monotonic() + offset
    while due < end:
        await anyio.sleep(max(0.0, due - time.monotonic()))
        await _request(client, record, shown)
        due += CLIENTS / RATE


async def _request(client: httpx.AsyncClient, record: Record, shown: View) -> None:
    start = time.perf_counter()
    try:
        answer = await client.get("/")
    except httpx.HTTPError as error:
        _failed(f"{type(error).__name__}: {error}", record, shown)
        return
    took = (time.perf_counter() - start) * 1000
    if answer.status_code != 200:
        _failed(f"status {answer.status_code}, {answer.text[:200]!r}", record, shown)
        return
    caller = answer.json()
    if f"URI={WEB}" not in caller["certificate"]:
        _failed(f"Envoy B named another caller to the server: {caller['certificate']!r}", record, shown)
        return
    record.requests.took_ms.append(took)
    serial = int(caller["serial"], 16)
    if record.envoys["envoy-a"].presented(serial):
        shown.line(WIRE, f"Envoy A presents certificate {short(serial)}")


def _failed(why: str, record: Record, shown: View) -> None:
    record.requests.failures.append(why)
    shown.line("request", f"failed: {why}", bad=True)


async def handshakes(port: int, record: Record, shown: View) -> None:
    """Make handshakes with Envoy B until cancelled, and record the certificate that it presents."""
    while True:
        try:
            serial = await _presented(port)
        except (OSError, ssl.SSLError, anyio.BrokenResourceError, anyio.EndOfStream) as error:
            shown.line(WIRE, f"no handshake with Envoy B: {type(error).__name__}: {error}", bad=True)
        else:
            if record.envoys["envoy-b"].presented(serial):
                shown.line(WIRE, f"Envoy B presents certificate {short(serial)}")
        await anyio.sleep(HANDSHAKE_EVERY)


async def _presented(port: int) -> int:
    """The serial number of the certificate that Envoy B presents, which it does before it checks for ours."""
    async with await anyio.connect_tcp(
        "127.0.0.1", port, ssl_context=_unchecked(), tls_hostname="", tls_standard_compatible=False
    ) as connection:
        der = connection.extra(TLSAttribute.peer_certificate_binary)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


def _unchecked() -> ssl.SSLContext:
    """A context that accepts any certificate: the caller only reads it, and sends nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
