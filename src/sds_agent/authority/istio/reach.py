"""Why no caller can reach a CA.

gRPC has one status for everything that can be wrong with a connection, and explains it in long texts. So after a
failed connection the client makes a second one, of TLS alone and without a client certificate. It shows that no server
answers, that the roots do not vouch for the server, or that the server's certificate is for another name. Where it
succeeds the CA is there, and the first connection failed for another reason.
"""

import asyncio
import os
import ssl
from collections.abc import Iterable
from ipaddress import ip_address

from cryptography import x509
from cryptography.x509.oid import NameOID

from sds_agent.authority.answers import words
from sds_agent.pki import openssl
from sds_agent.pki.certificates import CertificateError, read_pem, san_values

MOST_NAMES = 5
"""Names of a certificate that a message lists."""


async def connection_fault(address: str, name: str, roots: bytes, seconds: float) -> str | None:
    """A clause that says what is wrong and what to do; None where a connection succeeds, or fails for another reason.

    `address` is `HOST:PORT`, `name` what the server's certificate has to be for, `roots` what vouches for it, in PEM.
    """
    try:
        async with asyncio.timeout(seconds):
            der = await _certificate(address, name, read_pem(roots))
    except ssl.SSLCertVerificationError as error:
        if fault := openssl.fault_of_server(error, "its certificate"):
            return fault
        return (
            f"the roots in ca_file do not vouch for its certificate ({error.verify_message}); put its CA's root there"
        )
    except (TimeoutError, ssl.SSLError, ConnectionResetError, ConnectionAbortedError, UnicodeError):
        return None  # the last: it cannot be a host's name
    except RuntimeError:  # no thread is left to look up a name
        return None
    except OSError as error:
        number = error.errno or 0
        known = os.strerror(number) if number > 0 else error.strerror or str(error)
        return f"nothing answers there ({words(known)}); check that it runs at this address"
    return fault_of_name(der, name)


def fault_of_name(der: bytes, name: str) -> str | None:
    """Whether a server's certificate is for another name (RFC 6125 section 6.4), as a clause, or None."""
    try:
        (certificate,) = read_pem(ssl.DER_cert_to_PEM_cert(der).encode())
    except CertificateError:
        return None
    names = _names(certificate)
    if any(_matches(each, name) for each in names):
        return None
    listed = ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
    return f"its certificate is for {words(listed) or 'no name'}, not for {name}; set server_name"


async def _certificate(address: str, name: str, roots: Iterable[x509.Certificate]) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # `fault_of_name` checks it and lists the names
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # an anchor need not be self-signed
    context.set_alpn_protocols(["h2"])
    openssl.trust(context, roots)
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context, server_hostname=name)
    try:
        return bytes(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
    finally:
        writer.transport.abort()


def _names(certificate: x509.Certificate) -> list[str]:
    kinds = (x509.DNSName, x509.IPAddress)
    names = [str(each.value) for each in san_values(certificate) if isinstance(each, kinds)]
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return names or [str(each.value) for each in common]  # as gRPC has it


def _matches(pattern: str, name: str) -> bool:
    try:
        return ip_address(pattern) == ip_address(name)
    except ValueError:
        below = name.lower().partition(".")[2]
        return pattern.lower() in {name.lower(), f"*.{below}" if below else name.lower()}
